"""What topology.toml may say, and that every slip is refused with the place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...project import errors, topology

GOOD = """
application = "shop"
[queues.default]
[queues.slow]
delivery_limit = 2
max_length_bytes = 1000000
[pools.worker]
queues = ["default"]
sends = ["shop.*"]
sends_to = ["default", "slow"]
[pools.heavy]
queues = ["slow"]
[callers.client]
queues = ["default"]
sends = ["shop.tasks.*"]
[callers.monitor]
"""


def load(folder: Path, text: str) -> topology.Topology:
    file = folder / "topology.toml"
    file.write_text(text, encoding="utf-8")
    return topology.Topology.load(file)


def test_everything_the_file_says_is_there(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    assert [queue.broker_name for queue in shop.queues] == ["shop.default", "shop.slow"]
    assert shop.queue("slow").delivery_limit == 2
    assert (shop.vhost, shop.exchange, shop.dead, shop.quarantine) == ("shop", "shop", "shop.dead", "shop.quarantine")
    assert list(shop.accounts) == ["worker", "heavy", "client", "monitor"]
    assert shop.account("client") == "shop.client"
    assert shop.callers["client"].sends == ("shop.tasks.*",)


def test_a_pool_publishes_to_its_own_queues_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).pools["worker"].publishes_to == ("default", "slow")
    without = load(tmp_path, GOOD.replace('sends_to = ["default", "slow"]', ""))
    assert without.pools["worker"].publishes_to == ("default",)


def test_who_sends_nothing_publishes_nowhere(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    assert shop.pools["heavy"].publishes_to == ()
    assert shop.callers["monitor"].publishes_to == ()


def test_the_topology_cannot_be_changed(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    with pytest.raises(TypeError):
        shop.callers["intruder"] = shop.callers["client"]  # type: ignore[index]  # that is the point
    with pytest.raises(AttributeError):
        shop.callers["client"].sends = ("*",)  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('application = "shop"', "", "application"),
        ('application = "shop"', 'application = "Shop"', "application"),
        ('application = "shop"', 'application = "sh.op"', "application"),
        ('application = "shop"', 'application = "shop-"', "application"),
        ('application = "shop"', f'application = "{"s" * 41}"', "application"),
        ('application = "shop"', "application = 7", "application"),
        ('application = "shop"', 'application = "shop"\nallow_all = true', "top level"),
        ("[queues.default]\n[queues.slow]\ndelivery_limit = 2\nmax_length_bytes = 1000000", "", "queues"),
        ('application = "shop"', 'application = "shop"\nbroker = "kafka"', "broker"),
        ('application = "shop"', 'application = "shop"\nbroker = ["redis"]', "broker"),
        ("[queues.default]", "[queues.default]\nexclusive = true", "queues.default"),
        ("[queues.default]", "[queues.default]\n[queues.dead]", "queues.dead"),
        ("[queues.default]", "[queues.default]\n[queues.quarantine]", "queues.quarantine"),
        ("[queues.default]", "[queues.default]\n[queues.nobodys]", "queues.nobodys"),
        ("[queues.default]", '[queues."a.b"]\n[queues.default]', "queues.'a.b'"),
        ("[queues.default]", '[queues."#"]\n[queues.default]', "queues.'#'"),
        ("delivery_limit = 2", "delivery_limit = 0", "queues.slow.delivery_limit"),
        ("delivery_limit = 2", "delivery_limit = true", "queues.slow.delivery_limit"),
        ("delivery_limit = 2", 'delivery_limit = "2"', "queues.slow.delivery_limit"),
        ('[pools.heavy]\nqueues = ["slow"]', "[pools.heavy]\nqueues = []", "pools.heavy.queues"),
        ('[pools.heavy]\nqueues = ["slow"]', '[pools.heavy]\nqueues = ["sloow"]', "pools.heavy.queues"),
        ('[pools.heavy]\nqueues = ["slow"]', '[pools.heavy]\nqueues = "slow"', "pools.heavy.queues"),
        ('sends_to = ["default", "slow"]', 'sends_to = ["elsewhere"]', "pools.worker.sends_to"),
        ('sends_to = ["default", "slow"]', 'sends-to = ["default"]', "pools.worker"),
        ("[pools.heavy]", "[pools.client]", "client"),
        ("[pools.heavy]", "[pools.operator]", "operator"),
        ("[callers.client]", "[callers.heavy]", "heavy"),
        ("[callers.client]", "[callers.Client]", "callers.'Client'"),
        ("[callers.client]", f"[callers.{'c' * 24}]", "callers."),
        ('sends = ["shop.tasks.*"]', 'sends = ["*"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', 'sends = ["[a-z]*"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', 'sends = ["shop.a", "shop.a"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', "sends = [1]", "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', "sends = []", "callers.client"),
        ('sends = ["shop.tasks.*"]', 'send = ["shop.tasks.*"]', "callers.client"),
        ("[callers.monitor]", 'monitor = "none"', "callers.client"),
        ("[callers.monitor]", "[callers.monitor", "TOML"),
    ],
)
def test_a_slip_is_refused_with_its_place(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert old in GOOD
    with pytest.raises(errors.ConfigurationRefused) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert caught.value.code == "config.topology"
    assert str(tmp_path / "topology.toml") in str(caught.value)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="No such file"):
        topology.Topology.load(tmp_path / "topology.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.ConfigurationRefused, match="not valid TOML"):
        topology.Topology.load(tmp_path / "topology.toml")
