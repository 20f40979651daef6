"""The rendered files: which there are, what another service gets of them, and that the committed ones are these."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ...project import render, topology
from .topologies import REDIS, ROOT, TOPOLOGY


def test_the_chosen_broker_is_rendered_and_no_other() -> None:
    assert render.rendered(TOPOLOGY).keys() == {render.DEFINITIONS, render.ACL}
    assert render.rendered(REDIS).keys() == {render.BROKER_ACL, render.ACL}


SHOP = """
application = "shop"
trust_domain = "shop.test"
broker = "redis"
[queues.default]
[queues.slow]
[pools.worker]
queues = ["default", "slow"]
[callers.client]
queues = ["default", "slow"]
sends = ["shop.tasks.*"]
[callers.pay]
identity = "spiffe://pay.test/{environment}/pay/worker"
queues = ["slow"]
sends = ["shop.tasks.refund"]
"""


@pytest.fixture
def shop(tmp_path: Path) -> topology.Topology:
    (tmp_path / "topology.toml").write_text(SHOP)
    return topology.Topology.load(tmp_path / "topology.toml")


def test_another_service_has_an_account_for_its_queue_and_its_own_results(shop: topology.Topology) -> None:
    assert (
        "user shop.pay on resetpass resetkeys resetchannels -@all +hello +ping (+lpush %W~shop.slow)"
        in render.broker_acl_text(shop).splitlines()
    )
    [line] = [line for line in render.acl_text(shop).splitlines() if line.startswith("user shop.pay ")]
    own = shop.callers["pay"].identity
    assert own
    namespace = replace(own, environment="production").namespace("spiffe://shop.test/production/shop")
    for key in re.findall(r"[~&]([^ )]+)", line):
        assert re.fullmatch(rf"shop:celery-task(set)?-meta-{re.escape(namespace)}:\*", key)
    rules = render.definitions(shop)
    [permission] = [rule for rule in rules["permissions"] if rule["user"] == "shop.pay"]
    assert permission == {
        "user": "shop.pay",
        "vhost": "shop",
        "configure": "^$",
        "write": "^(shop|celery_delayed_27)$",
        "read": "^$",
    }
    keys = {rule["exchange"]: rule["write"] for rule in rules["topic_permissions"] if rule["user"] == "shop.pay"}
    assert keys == {"shop": r"^shop\.slow$", "celery_delayed_27": r"^([01]\.){28}shop\.slow$"}


def test_another_service_gets_to_know_its_own_rights_and_nothing_else(shop: topology.Topology, tmp_path: Path) -> None:
    text = render.rendered(shop)[render.CONTRACTS / "pay.toml"]
    assert len(render.rendered(shop)) == 3
    assert not re.search(r"client|tasks\.\*|default|pools", text)
    (tmp_path / "pay.toml").write_text(text)
    known = topology.Topology.load(tmp_path / "pay.toml")
    assert known == replace(
        shop,
        queues=(shop.queue("slow"),),
        pools=known.pools,
        callers={"pay": shop.callers["pay"]},
    )


def test_a_contract_that_is_missing_or_old_is_found(shop: topology.Topology, tmp_path: Path) -> None:
    assert render.main(["--project", str(tmp_path)]) == 0
    assert render.stale(tmp_path) == []
    (tmp_path / "topology.toml").write_text(SHOP.replace("tasks.refund", "tasks.return"))
    assert render.stale(tmp_path) == [render.CONTRACTS / "pay.toml"]


def test_the_accounts_of_two_services_fit_into_one_redis(shop: topology.Topology) -> None:
    """`sort -u` puts two files together: the line of `default`, which the server takes once, is the same in both."""
    for text in (render.acl_text, render.broker_acl_text):
        names = [line.split()[1] for line in {*text(shop).splitlines(), *text(REDIS).splitlines()}]
        assert len(names) == len(set(names))


def test_the_committed_files_are_what_the_topology_says() -> None:
    assert render.stale(ROOT) == []


def test_check_finds_a_changed_right_and_rendering_repairs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "topology.toml", tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    command = ["--project", str(tmp_path)]
    assert render.main([*command, "--check"]) == 0
    file = tmp_path / render.DEFINITIONS
    file.write_text(file.read_text().replace('"configure": "^$"', '"configure": ".*"', 1))
    assert render.main([*command, "--check"]) == 1
    assert str(render.DEFINITIONS) in capsys.readouterr().out
    assert render.main(command) == 0
    assert render.main([*command, "--check"]) == 0


def test_a_refused_topology_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "topology.toml").write_text("application = 1")
    assert render.main(["--project", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
