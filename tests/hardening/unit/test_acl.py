"""Redis' rendered rights, as the result backend and as the broker: what they grant, and what they must never grant."""

from __future__ import annotations

import re
from pathlib import Path

from ...project import render, topology
from .topologies import APPLICATION, REDIS, TOPOLOGY


def acl() -> dict[str, list[str]]:
    lines = [line.split() for line in render.acl_text(TOPOLOGY).splitlines()]
    assert all(line[0] == "user" for line in lines)
    return {line[1]: line[2:] for line in lines}


def test_nobody_can_log_in_with_the_committed_acl() -> None:
    for rules in acl().values():
        assert "resetpass" in rules
        assert not any(rule == "nopass" or rule[0] in "#><!" for rule in rules)


def test_the_default_user_is_off() -> None:
    assert acl()["default"] == ["off", "resetpass", "resetkeys", "resetchannels", "-@all"]


def test_no_account_has_a_dangerous_command() -> None:
    dangerous = set(
        "acl client config debug dump failover flushall flushdb info keys latency migrate module monitor move "
        "psubscribe randomkey rename replicaof restore save scan select shutdown slaveof slowlog sort swapdb".split()
    )
    for user, rules in acl().items():
        granted = {rule.lstrip("(").removeprefix("+") for rule in rules if rule.lstrip("(").startswith("+")}
        assert not granted & dangerous, user
        assert not any("@" in command for command in granted), user
        assert rules.index("-@all") < min((rules.index(rule) for rule in rules if "+" in rule), default=len(rules))


def test_every_key_and_channel_has_the_applications_prefix() -> None:
    for rules in acl().values():
        for rule in rules:
            if "~" in rule or rule.startswith("&"):
                assert re.fullmatch(
                    rf"(%R~|%W~|~|&){APPLICATION}:(celery-task(set)?-meta-|replay:)\S+", rule.strip("()")
                )


def test_only_workers_reach_what_says_which_messages_have_run() -> None:
    reach = {name for name, rules in acl().items() if any(":replay:" in rule for rule in rules)}
    assert reach == {TOPOLOGY.account(pool) for pool in TOPOLOGY.pools}


def test_only_workers_write_results() -> None:
    for role in TOPOLOGY.callers:
        rules = acl()[TOPOLOGY.account(role)]
        root = rules[: next((index for index, rule in enumerate(rules) if rule.startswith("(")), None)]
        assert not {"+set", "+setex", "+del", "+publish", "+eval"} & set(root)
        assert not any(rule.startswith(("~", "%W", "%RW")) for rule in root)


def test_nobody_can_log_in_with_the_committed_broker_acl() -> None:
    default, *accounts = render.broker_acl_text(REDIS).splitlines()
    assert default.startswith("user default off resetpass resetkeys ")
    for line in accounts:
        assert " resetpass resetkeys resetchannels -@all" in line
        assert not re.search(r"nopass|[#>!]|allkeys|allcommands|allchannels|\+@|&\*|~\*", line)


def test_channels_of_the_broker_are_named_in_full_for_those_who_need_them() -> None:
    control, replies, events = (f"/.{TOPOLOGY.celery(what)}" for what in ("control", "replies", "events"))
    hears = {role: (f"{replies}/{role}", f"{events}/*") for role in ("operator", "monitor")} | {"worker": (control,)}
    tells = dict.fromkeys(("operator", "monitor"), (control,))
    tells["worker"] = (f"{replies}/operator", f"{replies}/monitor", f"{events}/*")
    for line in render.broker_acl_text(REDIS).splitlines():
        role = line.split()[1].rpartition(".")[2]
        found = dict(re.findall(r"\((\+p[a-z +]+) ((?:&\S+ ?)+)\)", line))
        expected = {"+psubscribe +punsubscribe": hears.get(role), "+publish": tells.get(role)}
        assert found == {what: " ".join(f"&{name}" for name in names) for what, names in expected.items() if names}
        assert line.count("&") == sum(names.count("&") for names in found.values())


def test_every_key_of_the_broker_is_named_in_full() -> None:
    names = "default|dead|quarantine"
    _, accounts = render.broker_acl_text(REDIS).split("\n", 1)
    for key in re.findall(r"~([^ )]+)", accounts):
        assert re.fullmatch(rf"{APPLICATION}(\.({names})|:worker:unacked(_index)?)", key)


def test_a_pool_gives_back_to_its_own_queues_and_holds_under_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_text(
        """
application = "shop"
broker = "redis"
[queues.default]
[queues.slow]
[pools.worker]
queues = ["default"]
sends = ["shop.*"]
sends_to = ["default", "slow"]
[pools.heavy]
queues = ["slow"]
"""
    )
    lines = render.broker_acl_text(topology.Topology.load(tmp_path / "topology.toml")).splitlines()
    worker, heavy = (line for line in lines if line.startswith(("user shop.worker ", "user shop.heavy ")))
    assert "(+brpop +rpop +lpush +rpush ~shop.default)" in worker
    assert "(+lpush %W~shop.default %W~shop.slow)" in worker
    assert "shop.default" not in heavy
    assert "shop:worker" not in heavy
    assert "shop:heavy" not in worker
