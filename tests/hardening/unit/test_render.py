"""The rendered rights: what they grant, what they must never grant, and that the committed files are these."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange, Queue
from kombu.transport import native_delayed_delivery

from ...project import render, topology

ROOT = Path(__file__).parents[3]
TOPOLOGY = topology.Topology.load(ROOT / "topology.toml")
APPLICATION = TOPOLOGY.application
DELAYED = "0." * 27 + "1."


class Recorder:
    """A connection and its channel, which keep what is declared on them."""

    def __init__(self) -> None:
        self.exchanges: list[Any] = []
        self.queues: list[Any] = []
        self.bindings: list[Any] = []

    def channel(self) -> Recorder:
        return self

    def exchange_declare(self, *, exchange: str, type: str, durable: bool, auto_delete: bool, **_: Any) -> None:
        self.exchanges.append((exchange, type, durable, auto_delete))

    def queue_declare(
        self, *, queue: str, durable: bool, auto_delete: bool, arguments: Any, **_: Any
    ) -> tuple[str, int, int]:
        self.queues.append((queue, durable, auto_delete, json.dumps(arguments, sort_keys=True)))
        return queue, 0, 0

    def prepare_queue_arguments(self, arguments: Any, **_: Any) -> Any:
        return arguments

    def queue_bind(self, *, queue: str, exchange: str, routing_key: str, **_: Any) -> None:
        self.bindings.append((exchange, "queue", queue, routing_key))

    def exchange_bind(self, *, destination: str, source: str, routing_key: str, **_: Any) -> None:
        self.bindings.append((source, "exchange", destination, routing_key))


def recorded() -> Recorder:
    recorder = Recorder()
    native_delayed_delivery.declare_native_delayed_delivery_exchanges_and_queues(recorder, "quorum")
    for queue in TOPOLOGY.queues:
        name = queue.broker_name
        bound = Queue(name, Exchange(TOPOLOGY.exchange, type="topic"), routing_key=name)
        native_delayed_delivery.bind_queue_to_native_delayed_delivery_exchange(recorder, bound)
    return recorder


def test_delayed_delivery_is_declared_as_kombu_would() -> None:
    own = {TOPOLOGY.exchange, TOPOLOGY.dead, TOPOLOGY.quarantine, *(queue.broker_name for queue in TOPOLOGY.queues)}
    own |= {TOPOLOGY.celery("control"), TOPOLOGY.celery("replies"), TOPOLOGY.celery("events")}
    rules, kombu = render.definitions(TOPOLOGY), recorded()
    exchanges = [
        (e["name"], e["type"], e["durable"], e["auto_delete"]) for e in rules["exchanges"] if e["name"] not in own
    ]
    queues = [
        (q["name"], q["durable"], q["auto_delete"], json.dumps(q["arguments"], sort_keys=True))
        for q in rules["queues"]
        if q["name"] not in own
    ]
    bindings = [
        (b["source"], b["destination_type"], b["destination"], b["routing_key"])
        for b in rules["bindings"]
        if b["destination"] not in {TOPOLOGY.dead, TOPOLOGY.quarantine}
    ]
    assert len(kombu.exchanges) == 29
    assert sorted(exchanges) == sorted(kombu.exchanges)
    assert sorted(queues) == sorted(kombu.queues)
    assert sorted(bindings) == sorted(kombu.bindings)


def may(role: str, operation: str, resource: str, routing_key: str | None = None) -> bool:
    """Answer as RabbitMQ does: a permission, and for a topic exchange a topic permission *if there is one*."""
    rules = render.definitions(TOPOLOGY)
    user = TOPOLOGY.account(role)
    [permission] = [rule for rule in rules["permissions"] if rule["user"] == user]
    topics = [rule for rule in rules["topic_permissions"] if (rule["user"], rule["exchange"]) == (user, resource)]
    allowed = re.search(permission[operation], resource) is not None
    if routing_key is None:
        return allowed
    return allowed and all(re.search(rule["write"], routing_key) is not None for rule in topics)


@pytest.mark.parametrize("role", TOPOLOGY.accounts)
def test_no_account_may_declare_what_it_can_name(role: str) -> None:
    """RabbitMQ refuses names that start with `amq.` from everyone, and gives them itself."""
    for name in (f"{APPLICATION}.default", "mine", "amq.topic", f"{APPLICATION}.amq.gen-x", TOPOLOGY.celery("control")):
        assert not may(role, "configure", name)
    assert may(role, "configure", "amq.gen-x") == (role in {"worker", "operator", "monitor"})


def test_who_may_command_answer_report_and_listen() -> None:
    def those(operation: str, what: str) -> set[str]:
        return {role for role in TOPOLOGY.accounts if may(role, operation, TOPOLOGY.celery(what))}

    controllers, workers = {"operator", "monitor"}, set(TOPOLOGY.pools)
    assert (those("write", "control"), those("read", "control")) == (controllers, workers)
    for what in ("replies", "events"):
        assert (those("write", what), those("read", what)) == (workers, controllers)
    exchanges = [exchange["name"] for exchange in render.definitions(TOPOLOGY)["exchanges"]]
    for role in TOPOLOGY.accounts:  # or a queue of one's own could dead-letter what one has sent, with any routing key
        assert not any(may(role, "read", exchange) and may(role, "write", exchange) for exchange in exchanges)
    topics = {
        (rule["user"].rpartition(".")[2], rule["exchange"]): (rule["write"], rule["read"])
        for rule in render.definitions(TOPOLOGY)["topic_permissions"]
    }
    assert topics["worker", TOPOLOGY.celery("replies")] == ("^(operator|monitor)$", "^$")
    for role in controllers:  # nobody reads another's replies
        assert topics[role, TOPOLOGY.celery("replies")] == ("^$", f"^{role}$")
        assert topics[role, TOPOLOGY.celery("events")] == ("^$", "^#$")


@pytest.mark.parametrize("role", TOPOLOGY.accounts)
@pytest.mark.parametrize(
    "exchange", ["amq.default", "amq.topic", "celery_delayed_26", "celery_delayed_delivery", "celeryev"]
)
def test_no_account_may_write_to_another_exchange(role: str, exchange: str) -> None:
    assert not may(role, "write", exchange)


@pytest.mark.parametrize("role", TOPOLOGY.accounts)
@pytest.mark.parametrize(("exchange", "prefix"), [(APPLICATION, ""), ("celery_delayed_27", DELAYED)])
def test_a_sender_reaches_its_queues_and_no_other_key(role: str, exchange: str, prefix: str) -> None:
    own = {TOPOLOGY.queue(name).broker_name for name in TOPOLOGY.accounts[role].publishes_to}
    for queue in TOPOLOGY.queues:
        key = f"{prefix}{queue.broker_name}"
        assert may(role, "write", exchange, key) == (queue.broker_name in own)
        for other in (f"x{key}", f"{key}x", f"1.{key}", key.replace(f"{APPLICATION}.", f"{APPLICATION}x"), "#", ""):
            assert not may(role, "write", exchange, other)
    assert not may(role, "write", exchange, f"{prefix}{TOPOLOGY.dead}")


def test_only_workers_write_to_the_quarantine_and_nobody_with_a_delay() -> None:
    writers = [role for role in TOPOLOGY.accounts if may(role, "write", TOPOLOGY.quarantine, TOPOLOGY.quarantine)]
    assert writers == list(TOPOLOGY.pools)
    for role in TOPOLOGY.accounts:
        assert not may(role, "write", "celery_delayed_27", f"{DELAYED}{TOPOLOGY.quarantine}")
        assert not may(role, "write", TOPOLOGY.dead)


def test_what_is_sent_to_the_tasks_exchange_reaches_queues_of_tasks_alone() -> None:
    """Topic permissions do not look at CC and BCC, so what is bound to an exchange is open to all who write to it."""
    bound = {b["destination"] for b in render.definitions(TOPOLOGY)["bindings"] if b["source"] == TOPOLOGY.exchange}
    assert bound == {queue.broker_name for queue in TOPOLOGY.queues}


def test_every_exchange_that_can_be_written_has_a_topic_permission() -> None:
    # Without one RabbitMQ lets every routing key pass.
    rules = render.definitions(TOPOLOGY)
    topics = {(rule["user"], rule["exchange"]) for rule in rules["topic_permissions"]}
    for permission in rules["permissions"]:
        for exchange in rules["exchanges"]:
            if exchange["type"] == "topic" and re.search(permission["write"], exchange["name"]):
                assert (permission["user"], exchange["name"]) in topics


def test_pools_read_their_queues_the_operator_what_went_wrong_and_nobody_else_anything() -> None:
    queues = [queue["name"] for queue in render.definitions(TOPOLOGY)["queues"]]
    expected = {role: [f"{APPLICATION}.{name}" for name in pool.queues] for role, pool in TOPOLOGY.pools.items()}
    expected |= {role: [] for role in TOPOLOGY.callers}
    expected["operator"] = [TOPOLOGY.dead, TOPOLOGY.quarantine]
    assert {role: [queue for queue in queues if may(role, "read", queue)] for role in TOPOLOGY.accounts} == expected


def test_looking_at_what_is_kept_does_not_wear_it_out() -> None:
    """RabbitMQ 4 drops what was put back twenty times, where no limit is set; -1 would be refused by version 3."""
    queues = {queue["name"]: queue["arguments"] for queue in render.definitions(TOPOLOGY)["queues"]}
    for name in (TOPOLOGY.dead, TOPOLOGY.quarantine):
        assert queues[name]["x-delivery-limit"] >= 100_000


def test_every_queue_is_bounded() -> None:
    rules = render.definitions(TOPOLOGY)
    [policy] = rules["policies"]
    for queue in rules["queues"]:
        assert "x-max-length-bytes" in queue["arguments"] or re.search(policy["pattern"], queue["name"])


def test_a_pool_reaches_only_its_own_queues(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_text(
        'application = "shop"\n[queues.a]\n[queues.b]\n[pools.worker]\nqueues = ["a"]\nsends = ["shop.*"]\n'
        '[pools.heavy]\nqueues = ["b"]\n'
    )
    rules = render.definitions(topology.Topology.load(tmp_path / "topology.toml"))
    assert {rule["user"]: (rule["write"], rule["read"]) for rule in rules["permissions"]} == {
        f"shop.{name}": (
            rf"^({exchanges}shop\.quarantine|shop\.celery\.replies|shop\.celery\.events|amq\.gen-.+)$",
            rf"^(shop\.{queue}|shop\.celery\.control|amq\.gen-.+)$",
        )
        for name, exchanges, queue in (("worker", r"shop|celery_delayed_27|", "a"), ("heavy", "", "b"))
    }
    rights = {(rule["user"], rule["exchange"]): rule["write"] for rule in rules["topic_permissions"]}
    for pool in ("shop.worker", "shop.heavy"):
        assert rights.pop((pool, "shop.celery.replies")) == "^$"  # nobody asks
        assert rights.pop((pool, "shop.celery.events"))
    assert rights == {
        ("shop.worker", "shop"): r"^shop\.a$",
        ("shop.worker", "celery_delayed_27"): r"^([01]\.){28}shop\.a$",
        ("shop.worker", "shop.quarantine"): r"^shop\.quarantine$",
        ("shop.heavy", "shop.quarantine"): r"^shop\.quarantine$",
    }


def test_no_account_has_a_password_at_the_broker() -> None:
    users = render.definitions(TOPOLOGY)["users"]
    assert [user["name"] for user in users] == [TOPOLOGY.account(role) for role in TOPOLOGY.accounts]
    assert {(user["password_hash"], user["tags"]) for user in users} == {("", "")}


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


REDIS = replace(TOPOLOGY, broker="redis")


def test_the_chosen_broker_is_rendered_and_no_other() -> None:
    assert render.rendered(TOPOLOGY).keys() == {render.DEFINITIONS, render.ACL}
    assert render.rendered(REDIS).keys() == {render.BROKER_ACL, render.ACL}


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
