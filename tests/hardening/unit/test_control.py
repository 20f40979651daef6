"""Commands: who may give which one, what must be signed, and that each counts once."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from celery.worker.control import Panel

from ...project import codec, control, envelope, errors
from .desk import issued
from .room import HOUR, NODE, Role, Room, Type, arrives, refused

READ = {
    *("ping", "clock", "stats", "active", "reserved", "scheduled", "revoked", "registered", "active_queues"),
    *("heartbeat", "query_task"),
}
CHANGE = {
    *("revoke", "terminate", "revoke_by_stamped_headers", "rate_limit", "time_limit", "pool_grow", "pool_shrink"),
    *("autoscale", "pool_restart", "add_consumer", "cancel_consumer", "shutdown"),
}


# --- who may give which command ---------------------------------------------------------------------------------------


def test_the_table_says_what_each_role_may() -> None:
    assert {role: set(commands) for role, commands in control.COMMANDS.items()} == {
        Role.MONITOR: READ,
        Role.OPERATOR: READ | CHANGE | {"release"},
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
    assert done == set(control.COMMANDS.get(role, ())) - {"release"}  # which is a right, and no command


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
