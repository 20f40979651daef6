"""Remote control and events: what each check refuses, and that nothing delivered ends a worker or breaks a monitor."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state
from celery.worker.control import Panel
from kombu import Exchange
from kombu.exceptions import EncodeError

from ...project import audit, claims, codec, control, envelope, errors, identity, intake, intake_redis
from ...service import Party, Service
from .desk import Desk, delivered, issued

Role, Type = identity.Role, envelope.Type
READ = {
    *("ping", "clock", "stats", "active", "reserved", "scheduled", "revoked", "registered", "active_queues"),
    *("heartbeat", "query_task"),
}
CHANGE = {
    *("revoke", "terminate", "revoke_by_stamped_headers", "rate_limit", "time_limit", "pool_grow", "pool_shrink"),
    *("autoscale", "pool_restart", "add_consumer", "cancel_consumer", "shutdown"),
}
NODE = "worker@test"


class Room:
    """A worker's node, and everyone who may knock."""

    def __init__(self, service: Service) -> None:
        self.service, self.desk = service, Desk(service)
        self.parties: dict[str, Party] = {"client": service.client, "worker": service.worker}
        channel = service.worker.app.connection_for_write().default_channel
        for what, kind in (("control", "fanout"), ("replies", "topic"), ("events", "topic")):
            Exchange(service.rules.celery(what), kind)(channel).declare()
        self.node = self.new_node()

    def new_node(self) -> Any:
        state = SimpleNamespace(app=self.service.worker.app)
        return self.service.worker.app.control.mailbox.Node(NODE, state=state, handlers=Panel.data)

    def party(self, role: str) -> Party:
        if role not in self.parties:
            self.parties[role] = self.service.party(role)
        return self.parties[role]

    def fields(self, role: str = "operator", method: str = "ping", **changes: Any) -> dict[str, Any]:
        return {
            **self.registered(role),
            **{"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None},
            "ticket": "ticket",
            **changes,
        }

    def registered(self, role: str) -> dict[str, Any]:
        """Return the claims that every message has."""
        own, now = self.party(role).identity, self.node._started
        times = {"iat": now, "exp": now + control.Claims.lifetime}
        return {**times, "iss": str(own), "aud": own.audience, "jti": claims.new_id()}

    def message(self, fields: dict[str, Any], role: str = "operator", kind: Type = Type.CONTROL) -> Any:
        return arrives(self.party(role).signer.sign(kind, codec.encode(fields)))

    def admitted(self, role: str = "operator", **changes: Any) -> Any:
        return self.node._admitted(self.message(self.fields(role, **changes), role))


def arrives(body: Any, **properties: Any) -> Any:
    return delivered(body, **{"content_type": envelope.CONTENT_TYPE, **properties})


@pytest.fixture(scope="module")
def one_room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(Service(tmp_path_factory.mktemp("control")))


@pytest.fixture
def room(one_room: Room) -> Room:
    one_room.node = one_room.new_node()
    return one_room


def refused(code: type[errors.MessageRefused]) -> Any:
    return pytest.raises(code)


# --- who may give which command ---------------------------------------------------------------------------------------


def test_the_table_says_what_each_role_may() -> None:
    assert {role: set(commands) for role, commands in control.COMMANDS.items()} == {
        Role.MONITOR: READ,
        Role.OPERATOR: READ | CHANGE,
    }


@pytest.mark.parametrize("role", [*Role])
def test_a_worker_does_for_each_role_what_the_table_says_and_nothing_else(room: Room, role: Role) -> None:
    queue = room.service.rules.queues[0].broker_name
    done = set()
    for method in {*Panel.data, "no_such_command"}:
        try:
            room.admitted(role, method=method, arguments={"queue": queue})
        except errors.ControlDenied:
            continue
        done.add(method)
    assert done == set(control.COMMANDS.get(role, ()))


@pytest.mark.parametrize("role", [*Role])
def test_who_may_not_is_refused_before_anything_is_sent(room: Room, role: Role) -> None:
    app = room.party(role).app
    for method in {*Panel.data, "no_such_command"} - set(control.COMMANDS.get(role, ())):
        with app.connection_for_write() as connection, pytest.raises(PermissionError, match="may not give"):
            app.control.mailbox(connection)._broadcast(method)


@pytest.mark.parametrize("role", [*Role])
def test_a_key_signs_only_what_its_role_makes(room: Room, role: Role) -> None:
    hardening = room.party(role).app.hardening
    made: dict[type[control.Claims], dict[str, Any]] = {
        control.Command: {"method": "ping", "arguments": {}}
        | dict.fromkeys(("destination", "pattern", "matcher", "ticket")),
        control.Reply: {"ticket": "x", "node": NODE, "reply": 1},
        control.Report: {"node": NODE, "events": []},
    }
    signed = set()
    for kind, fields in made.items():
        try:
            control.sign(hardening, kind, **fields)
        except PermissionError:
            continue
        signed.add(kind)
    assert signed == {
        Role.WORKER: {control.Reply, control.Report},
        Role.OPERATOR: {control.Command},
        Role.MONITOR: {control.Command},
    }.get(role, set())


def test_only_listed_arguments_reach_a_command(room: Room) -> None:
    given = {"taskinfoitems": ["app"], "modules": ["os"], "reload": True, "ids": ["x"], "state": 1, "task_id": "y"}
    kept = {"query_task": {"ids": ["x"]}, "revoke": {"task_id": "y"}}
    for method in ("registered", "pool_restart", "active", "ping", *kept):
        assert room.admitted(method=method, arguments=given)["arguments"] == kept.get(method, {})


@pytest.mark.parametrize("method", ["add_consumer", "cancel_consumer"])
@pytest.mark.parametrize("queue", ["other", "my-service.dead", None, ["x"], {}])
def test_a_worker_reads_no_queue_but_its_pools(room: Room, method: str, queue: Any) -> None:
    with pytest.raises((errors.ControlDenied, TypeError)):
        room.admitted(method=method, arguments={"queue": queue, "exchange": "x"})
    with refused(errors.ControlDenied):
        room.admitted(method=method)
    own = room.service.rules.queues[0].broker_name
    assert room.admitted(method=method, arguments={"queue": own, "exchange": "x"})["arguments"] == {"queue": own}


def test_a_reply_goes_to_who_asked(room: Room) -> None:
    for role in ("operator", "monitor"):
        assert room.admitted(role)["reply_to"]["routing_key"] == role
        assert room.admitted(role, ticket=None)["reply_to"] is None


# --- what is signed ---------------------------------------------------------------------------------------------------

HOUR = 3600
AGE = control.Claims.lifetime + 30 + 10  # seconds: more than lifetime and skew, and less than the signers' certificates


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aud": "spiffe://x.test/development/x"}, errors.WrongAudience),
        ({"iss": "spiffe://x.test/development/x/operator"}, errors.BadShape),
        ({"iat": HOUR}, errors.FromTheFuture),
        ({"iat": -HOUR}, errors.NotValidAtIssue),
        ({"iat": -AGE, "exp": -AGE}, errors.Expired),
        ({"iat": -AGE, "exp": HOUR}, errors.Expired),
        ({"exp": -HOUR}, errors.Expired),
        ({"reply_to": {"exchange": "", "routing_key": "victim"}}, errors.BadShape),
        ({"method": 1}, errors.BadShape),
        ({"method": "ping\n"}, errors.BadShape),
        ({"arguments": []}, errors.BadShape),
        ({"destination": NODE}, errors.BadShape),
        ({"pattern": "(a+)+$", "matcher": "pcre"}, errors.BadShape),
        ({"iat": "now"}, errors.BadShape),
    ],
)
def test_a_claim_that_is_wrong_is_refused(room: Room, changes: dict[str, Any], code: Any) -> None:
    fields = room.fields()
    moved = {name: fields[name] + changes[name] for name in ("iat", "exp") if isinstance(changes.get(name), int)}
    with refused(code):
        room.node._admitted(room.message({**fields, **changes, **moved}))


@pytest.mark.parametrize("missing", ["iss", "aud", "iat", "exp", "jti", "method", "arguments", "destination", "ticket"])
def test_no_claim_may_be_missing(room: Room, missing: str) -> None:
    fields = room.fields()
    del fields[missing]
    with refused(errors.BadShape):
        room.node._admitted(room.message(fields))


@pytest.mark.parametrize("kind", [kind for kind in Type if kind is not Type.CONTROL])
def test_another_kind_of_envelope_is_no_command(room: Room, kind: Type) -> None:
    with refused(errors.WrongType):
        room.node._admitted(room.message(room.fields(), kind=kind))


@pytest.mark.parametrize("place", ["/development/other", "/production/{}"])
def test_an_operator_of_another_application_or_environment_is_none_here(room: Room, place: str) -> None:
    own = room.party("operator").identity
    uri = f"spiffe://{own.trust_domain}{place.format(own.application)}/operator"
    body = issued(room.desk, uri).sign(Type.CONTROL, codec.encode(room.fields(iss=uri)))
    with refused(errors.WrongAudience):
        room.node._admitted(arrives(body))


@pytest.mark.parametrize("validity", [(-100, -50), (3600, 7200)])
def test_a_certificate_that_is_not_valid_signs_nothing(room: Room, validity: tuple[int, int]) -> None:
    fields = room.fields()
    signer = issued(room.desk, fields["iss"], *validity)
    with refused(errors.NotValidAtIssue):
        room.node._admitted(arrives(signer.sign(Type.CONTROL, codec.encode(fields))))


@pytest.mark.parametrize(
    ("body", "properties", "code"),
    [
        (json.dumps({"method": "shutdown"}), {"content_type": "application/json"}, errors.Unsigned),
        (json.dumps({"method": "shutdown"}), {}, errors.Unsigned),
        (b"", {}, errors.Unsigned),
        (None, {}, errors.Unsigned),
        (b"a.b.c", {}, errors.Malformed),
        ("x" * 2_000_000, {}, errors.TooLarge),
        ("x", {"application_headers": {"compression": "application/x-gzip"}}, errors.Compressed),
    ],
)
def test_what_is_no_envelope_is_refused(
    room: Room, body: Any, properties: dict[str, Any], code: type[errors.MessageRefused]
) -> None:
    for kind in (control.Command, control.Reply, control.Report):
        with refused(code):
            message = arrives(body, **copy.deepcopy(properties))
            control.verify(room.service.worker.app.hardening, kind, envelope.enveloped(message))


def test_an_envelope_is_one_by_its_content_type_too(room: Room) -> None:
    body = room.message(room.fields()).body
    for content_type in ("application/json", "application/x-python-serialize", None):
        with refused(errors.Unsigned):
            room.node._admitted(arrives(body, content_type=content_type))


# --- once -------------------------------------------------------------------------------------------------------------


def test_a_command_counts_once_and_for_each_worker(room: Room) -> None:
    message = room.message(room.fields(method="shutdown"))
    assert room.node._admitted(message)
    for _ in range(3):
        with refused(errors.ControlReplayed):
            room.node._admitted(message)
    assert room.new_node()._admitted(message)


def test_what_was_said_before_a_worker_started_was_not_said_to_it(room: Room) -> None:
    room.node._started += 1
    with refused(errors.ControlReplayed):
        room.admitted(iat=room.node._started - 1)
    assert room.admitted(iat=room.node._started)


def test_a_signer_who_says_too_much_is_refused_and_keeps_nobody_else_from_being_heard(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REMEMBERED", 3)
    for _ in range(3):
        room.admitted("monitor")
    with refused(errors.ControlReplayed):
        room.admitted("monitor")
    assert room.admitted("operator")


def test_what_has_expired_is_forgotten(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REMEMBERED", 1)
    first = room.fields()
    room.node._admitted(room.message(first))
    skew = room.service.worker.app.hardening.settings.clock_skew
    room.node._remembered[first["iss"]] = {first["jti"]: room.node._started - skew - 1}
    assert room.admitted()
    assert first["jti"] not in room.node._remembered[first["iss"]]


# --- a worker's end ---------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(room: Room, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[Any], None], list[Any]]:
    """Give what a node does with a message, and the bodies it hands on."""
    taken: dict[str, Any] = {}
    bodies: list[Any] = []

    def consumer(*_: Any, on_message: Any, **__: Any) -> Any:
        taken["on_message"] = on_message
        return SimpleNamespace(consume=lambda: None)

    monkeypatch.setattr(control, "Consumer", consumer)
    room.node.listen(callback=lambda body, _: bodies.append(body))
    return taken["on_message"], bodies


def test_only_what_may_be_done_is_handed_on(
    room: Room, heard: tuple[Callable[[Any], None], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    receive, bodies = heard
    for body in (b"", b"{}", "x.y.z", None):
        receive(arrives(body))
    receive(room.message(room.fields("client"), "client"))
    assert bodies == []
    receive(room.message(room.fields()))
    assert [body["method"] for body in bodies] == ["ping"]
    assert {record.audit["event"] for record in caplog.records} == {"control.refused"}  # type: ignore[attr-defined]


def test_a_defect_refuses_too(
    room: Room, heard: tuple[Callable[[Any], None], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, bodies = heard
    monkeypatch.setattr(control, "verify", lambda *_: 1 / 0)
    receive(room.message(room.fields()))
    assert bodies == []


def test_an_end_that_was_ordered_is_not_swallowed(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    body = room.admitted(method="shutdown", ticket=None)
    with pytest.raises(SystemExit):
        room.node.handle_message(body)


@pytest.mark.parametrize(("method", "traces"), [("ping", 0), ("rate_limit", 1)])
def test_a_change_leaves_a_trace(room: Room, method: str, traces: int, caplog: pytest.LogCaptureFixture) -> None:
    body = room.admitted(method=method, ticket=None, arguments={"task_name": "x", "rate_limit": "1/s"})
    with caplog.at_level(logging.INFO, logger=audit.logger.name):
        room.node.handle_message(body)
    found = [record.audit for record in caplog.records if record.name == audit.logger.name]  # type: ignore[attr-defined]
    assert found == [{"event": "control.accepted", "method": method, "signer": body["iss"]}] * traces


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("worker@host", "worker@host"),
        ("worker.1@host", "worker.1@host"),
        ("celery@host", "worker.celery@host"),
        ("worker2@host", "worker.worker2@host"),
        ("batch@host", "worker.batch@host"),
        ("x@worker", "worker.x@worker"),
        ("x@worker.y", "worker.x@worker.y"),
    ],
)
def test_a_node_is_called_after_its_pool(room: Room, hostname: str, name: str) -> None:
    own = room.service.worker.identity
    assert control.node_name(own, hostname) == name
    assert control.node_name(own, name) == name


def test_addresses_of_the_broker_are_not_among_the_statistics(room: Room) -> None:
    told = {"pid": 1, "broker": {"hostname": "secret"}}
    controller = SimpleNamespace(stats=lambda: dict(told))
    state = SimpleNamespace(consumer=SimpleNamespace(controller=controller))
    assert Panel.data["stats"](state) == told
    assert room.node.handlers["stats"](state) == {"pid": 1, "broker": {}}


class Waiting:
    """What remote control sees of a request."""

    def __init__(self, id: str, fun: Any = None) -> None:
        self.id, self.ended, self._eta_timer_entry = id, [], self
        self.fun, self.cancelled, self.looked_at = fun, 0, 0

    def cancel(self) -> None:
        self.cancelled += 1

    def __call__(self) -> None:
        self.looked_at += 1

    def terminate(self, pool: Any, signal: Any) -> None:
        self.ended.append(signal)


@pytest.mark.parametrize("method", ["revoke", "terminate"])
def test_revoking_ends_what_waits_now_and_terminates_what_runs(room: Room, method: str) -> None:
    consumer = SimpleNamespace(apply_eta_task=object(), pool=None)
    later, mine, limited, other = (Waiting(id, consumer.apply_eta_task) for id in ("x", "x", "x", "y"))
    limited.fun = object()
    running = Waiting("x")
    worker_state.scheduled_requests.update((later, mine, limited, other))
    worker_state.active_requests.add(running)
    try:
        room.node.handlers[method](SimpleNamespace(consumer=consumer), task_id=["x"], signal="KILL")
        assert "x" in worker_state.revoked
        assert "y" not in worker_state.revoked
    finally:
        worker_state.reset_state()
    # Two callers' tasks of one id are two requests, and both end.
    assert [(each.cancelled, each.looked_at) for each in (later, mine)] == [(1, 1), (1, 1)]
    assert (limited.looked_at, other.looked_at) == (0, 0)
    assert running.ended == (["KILL"] if method == "terminate" else [])
    assert other.ended == []


# --- replies ----------------------------------------------------------------------------------------------------------


def answer(room: Room, value: Any) -> Any:
    """Let the worker answer; return what who asked gets."""
    mailbox = room.service.worker.app.control.mailbox
    sent: list[tuple[Any, ...]] = []
    node = room.new_node()
    node.mailbox = SimpleNamespace(**{**vars(mailbox), "_send": lambda *args: sent.append(args)})
    node.mailbox._publish_reply = type(mailbox)._publish_reply.__get__(node.mailbox)
    node.handlers = {"ping": lambda _: value}
    node.channel = None
    node.handle_message(node._admitted(room.message(room.fields())))
    ((body, exchange, key, _),) = sent
    assert (exchange.name, key) == (room.service.rules.celery("replies"), "operator")
    reply, signer = control.verify(room.party("operator").app.hardening, control.Reply, body)
    assert (reply.ticket, reply.node, signer.role) == ("ticket", NODE, Role.WORKER)
    return reply.reply


@pytest.mark.parametrize("value", [{"ok": "pong"}, [], None, "x"])
def test_a_reply_is_signed_by_the_worker_for_its_node_and_for_the_ticket(room: Room, value: Any) -> None:
    assert answer(room, value) == value


@pytest.mark.parametrize("value", [object(), "x" * 2_000_000])
def test_what_cannot_be_sent_is_an_error_and_no_crash(room: Room, value: Any) -> None:
    assert answer(room, value) == {"error": "it cannot be sent"}


def asked(room: Room, *answers: Callable[[str], tuple[Any, dict[str, Any]]], limit: int | None = None) -> Any:
    """Ask as the operator over the in-memory broker, where each answer waits once the command is out."""
    app = room.party("operator").app
    with app.connection_for_write() as connection:
        mailbox = app.control.mailbox(connection)

        exchange = room.service.rules.celery("replies")

        def send(command: bytes, *_: Any) -> None:
            ticket = codec.decode(room.party("monitor").app.hardening.verifier.verify(Type.CONTROL, command).payload)
            with connection.Producer() as producer:
                for make in answers:
                    body, properties = make(ticket["ticket"])
                    options = {"content_type": envelope.CONTENT_TYPE, "content_encoding": "utf-8", **properties}
                    producer.publish(body, exchange=exchange, routing_key="operator", **options)

        mailbox._send = send
        return mailbox._broadcast("ping", reply=True, timeout=0.2, limit=limit)


def genuine(room: Room, node: str = NODE, role: str = "worker", **changes: Any) -> Any:
    def make(ticket: str) -> tuple[Any, dict[str, Any]]:
        fields = {**room.registered(role), "ticket": ticket, "node": node, "reply": "pong", **changes}
        return room.party(role).signer.sign(Type.REPLY, codec.encode(fields)), {}

    return make


def test_replies_of_workers_are_returned_once_for_each_node(room: Room) -> None:
    both = asked(room, genuine(room), genuine(room), genuine(room, "worker.2@test"))
    assert both == [{NODE: "pong"}, {"worker.2@test": "pong"}]
    assert asked(room) == []


FOREIGN: dict[str, Callable[[Room], Any]] = {
    "unsigned": lambda _: lambda ticket: (json.dumps({"worker@forged": ticket}), {"content_type": "application/json"}),
    "pickled": lambda _: lambda ticket: (b"\x80", {"content_type": "application/x-python-serialize"}),
    "garbage": lambda _: lambda ticket: ("\xff", {}),
    "by a client": lambda room: genuine(room, "client@forged", "client"),
    "by a monitor": lambda room: genuine(room, "monitor@forged", "monitor"),
    "for another pool's node": lambda room: genuine(room, "batch@forged"),
    "for a name that looks like the pool's": lambda room: genuine(room, "worker2@forged"),
    "to another question": lambda room: genuine(room, "worker.9@forged", ticket="other"),
    "an hour old": lambda room: genuine(room, "worker.9@forged", iat=room.node._started - HOUR),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_reply_is_not_returned_and_hides_no_genuine_one(room: Room, name: str) -> None:
    foreign = FOREIGN[name](room)
    assert asked(room, foreign, foreign, genuine(room), limit=1) == [{NODE: "pong"}]
    assert asked(room, foreign) == []


# --- events -----------------------------------------------------------------------------------------------------------


class Producer:
    """A producer that keeps what it is given, or fails."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, dict[str, Any]]] = []
        self.fails = False

    def publish(self, body: Any, **options: Any) -> None:
        if self.fails:
            raise ConnectionError
        self.sent.append((body, options))


def dispatcher(room: Room, role: str = "worker", **options: Any) -> Any:
    app = room.party(role).app
    return app.events.Dispatcher(app.connection_for_write(), hostname="celery@test", enabled=False, **options)


def received(room: Room, *messages: Any, handler: Any = None) -> list[Any]:
    """Give messages to a monitor's receiver; return the events that its handler got."""
    seen: list[Any] = []
    app = room.party("monitor").app
    receiver = app.events.Receiver(app.connection_for_read(), handlers={"*": handler or seen.append})
    for message in messages:
        receiver._receive_signed(message)
    return seen


def report(room: Room, *events: Any, role: str = "worker", node: str = NODE) -> Any:
    return room.message({**room.registered(role), "node": node, "events": [*events]}, role, Type.EVENT)


HEARTBEAT = {"type": "worker-heartbeat", "hostname": "worker@forged", "freq": 2, "clock": 1}


def test_an_event_arrives_signed_with_its_workers_name_and_without_what_callers_wrote(room: Room) -> None:
    producer, hidden = Producer(), dict.fromkeys(("args", "kwargs", "result", "exception", "traceback"), "swordfish")
    events = [{"type": "task-succeeded", "uuid": "x", "hostname": "y", **hidden}, {"type": "task-started", "uuid": "x"}]
    dispatcher(room)._publish(events, producer, "task.multi")
    ((body, options),) = producer.sent
    assert (options["exchange"], options["routing_key"]) == (room.service.rules.celery("events"), "task.multi")
    assert options["confirm_timeout"] == 0
    assert "serializer" not in options
    first, second = received(room, arrives(body))
    assert (first["type"], first["uuid"], first["hostname"]) == ("task-succeeded", "x", "worker.celery@test")
    assert second["type"] == "task-started"
    assert "swordfish" not in str(first)
    assert events[0]["args"] == "swordfish"  # the caller's own is left alone


@pytest.mark.parametrize("role", ["client", "beat", "monitor", "operator"])
def test_only_workers_report(room: Room, role: str) -> None:
    with pytest.raises(PermissionError):
        dispatcher(room, role)._publish(HEARTBEAT, Producer(), "worker.heartbeat")
    assert received(room, report(room, HEARTBEAT, role=role, node=f"{role}@test")) == []


def test_events_that_cannot_be_sent_wait_and_do_not_pile_up(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WAITING", 3)
    producer, made = Producer(), dispatcher(room)
    producer.fails = True
    for number in range(5):
        made._publish({**HEARTBEAT, "n": number}, producer, "worker.heartbeat")
    assert [event["n"] for event, _ in made._outbound_buffer] == [2, 3, 4]
    with pytest.raises(ConnectionError):
        dispatcher(room, buffer_while_offline=False)._publish(HEARTBEAT, producer, "worker.heartbeat")
    with pytest.raises(EncodeError):
        made._publish({**HEARTBEAT, "x": object()}, producer, "worker.heartbeat")


def test_a_genuine_event_is_shown_under_its_signers_name(room: Room) -> None:
    (event,) = received(room, report(room, HEARTBEAT))
    assert (event["type"], event["hostname"]) == ("worker-heartbeat", NODE)


def test_a_forged_event_is_not_shown(room: Room) -> None:
    unsigned = arrives(json.dumps(HEARTBEAT), content_type="application/json")
    body = room.registered("worker")
    for forged in (
        unsigned,
        arrives(b"\xff"),
        report(room, HEARTBEAT, node="batch@test"),
        report(room, HEARTBEAT, node="worker2@test"),
        room.message({**body, "node": NODE, "events": [HEARTBEAT]}, "worker", Type.REPLY),
        room.message({**body, "node": NODE, "events": [HEARTBEAT], "iat": body["iat"] - HOUR}, "worker", Type.EVENT),
    ):
        assert received(room, forged) == []


@pytest.mark.parametrize("odd", [{}, {"type": 1}, {"type": "task-x"}, {**HEARTBEAT, "clock": "x"}, {"type": []}])
def test_a_worker_that_was_taken_over_cannot_end_a_monitor(room: Room, odd: dict[str, Any]) -> None:
    state = room.party("monitor").app.events.State()
    received(room, report(room, odd), report(room, HEARTBEAT), handler=state.event)
    assert set(state.workers) <= {NODE}
    received(room, report(room, HEARTBEAT), handler=lambda _: 1 / 0)


# --- transports -------------------------------------------------------------------------------------------------------


def test_what_nobody_waits_for_is_published_without_waiting_for_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    channel: Any = object.__new__(intake.AmqpTransport.Connection.Channel)
    sent: list[Any] = []
    monkeypatch.setattr(channel, "_basic_publish", lambda *args, **kwargs: sent.append(kwargs), raising=False)
    channel.basic_publish_confirm("message", exchange="x", confirm_timeout=0)
    assert sent == [{"exchange": "x", "confirm_timeout": 0}]


@pytest.fixture
def channel() -> Any:
    return object.__new__(intake_redis._Channel)


@pytest.mark.parametrize("item", [b"garbage", b"[1]", b"\xff", b'{"__type__":"uuid","__value__":1}', b"[" * 50_000])
def test_whatever_comes_on_a_channel_becomes_a_message_that_is_refused(channel: Any, item: bytes) -> None:
    handled = channel._handle_message(None, [b"pmessage", b"pattern", b"/.x", item])
    decoder = SimpleNamespace(decode_body=lambda *_: b"")
    message = intake_redis.RedisMessage(json.loads(handled["data"]), channel=decoder)
    assert isinstance(message.refusal, errors.Unparseable)
    assert message.unparsed == item


def test_what_comes_on_a_channel_after_its_consumer_has_gone_is_dropped(channel: Any) -> None:
    channel._fanout_to_queue = {}
    assert not channel._deliver_fanout_message({}, "gone")
