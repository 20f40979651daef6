"""RabbitMQ's rendered rights: what they grant, and what they must never grant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange, Queue
from kombu.transport import native_delayed_delivery

from ...project import render, topology
from .topologies import APPLICATION, TOPOLOGY

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
