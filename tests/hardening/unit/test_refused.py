"""Release from the quarantine: an operator's countersignature and the gate's second look, or it stays where it is."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ...project import audit, claims, codec, control, envelope, errors, quarantine, refused, replay
from ...service import Party
from .desk import FORBIDDEN, NOW, PROBE, Desk, delivered, issued, named_as, one_desk

__all__ = ["one_desk"]

LATE = 100  # seconds


@pytest.fixture
def desk(one_desk: Desk) -> Iterator[Desk]:
    yield one_desk
    for queue in (None, one_desk.service.rules.quarantine):
        for message in one_desk.service.deliveries(queue):
            message.ack()
    one_desk.seen.clear()


@pytest.fixture(scope="module")
def operator(one_desk: Desk) -> Party:
    return one_desk.service.party("operator")


def expired(desk: Desk, **changes: Any) -> bytes:
    """Return a genuine message that was meant to be short-lived."""
    now = int(time.time())
    fields = {**desk.claims(), "iat": now - 2 * LATE, "exp": now - LATE, "jti": claims.new_id()}
    return desk.sign({**fields, **changes})


class Found(refused.Refused):
    """A record as the operator sees it, of a quarantine that says how often it was removed."""

    removed = 0

    def __init__(self, operator: Party, signed: bytes) -> None:
        super().__init__(operator.app.hardening, signed, self._note)

    def _note(self) -> None:
        self.removed += 1


def quarantined(desk: Desk, body: bytes, operator: Party, **properties: Any) -> Found:
    """Let the gate refuse a message."""
    properties = {"content_type": envelope.CONTENT_TYPE, **properties}
    assert desk.service.gate.receive(delivered(body, **properties)) is None
    (message,) = desk.service.deliveries(desk.service.rules.quarantine)
    message.ack()
    return Found(operator, message.body)


def later(desk: Desk, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Let so many seconds go by after the expiry of what is sent now."""
    settings = desk.service.worker.app.hardening.settings
    now = time.time() + settings.message_max_age + seconds
    monkeypatch.setattr(time, "time", lambda: now)


def test_an_expired_message_that_was_released_runs_once(desk: Desk, operator: Party) -> None:
    found = quarantined(desk, expired(desk), operator)
    assert (found.shown["code"], found.problem) == ("message.expired", None)
    refused.release(operator.app, found)
    assert found.removed == 1
    (message,) = desk.service.deliveries()
    for copy in (message.body, message.body, found.envelope):
        desk.service.receive(delivered(copy, content_type=envelope.CONTENT_TYPE))
    assert len(desk.seen) == 1
    assert [record["code"] for record in desk.service.quarantined()] == ["message.replayed", "message.expired"]
    message.ack()


def test_what_was_released_is_its_origins_and_its_owners(desk: Desk, operator: Party) -> None:
    refused.release(operator.app, quarantined(desk, expired(desk), operator))
    assert desk.service.work() == 1
    client = str(desk.service.client.identity)
    assert (desk.seen[0]["origin"], desk.seen[0]["owner"]) == (client, client)


def test_its_caller_gets_the_result_after_all(desk: Desk, operator: Party) -> None:
    fields = desk.claims(desk.capture(5))
    body = expired(desk, task=fields["task"], args=fields["args"])
    found = quarantined(desk, body, operator)
    app, task_id = desk.service.client.app, fields["task"]["id"]
    with pytest.raises(errors.Expired):
        app.AsyncResult(task_id).get(timeout=5)
    refused.release(operator.app, found)
    assert desk.service.work() == 1
    assert app.AsyncResult(task_id).get(timeout=5) == 5


def test_of_a_message_that_ran_before_it_expired_a_copy_does_not_run_when_released(
    desk: Desk, operator: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = desk.fresh(desk.capture())
    desk.service.receive(delivered(body, content_type=envelope.CONTENT_TYPE))
    assert len(desk.seen) == 1
    later(desk, monkeypatch, LATE)
    refused.release(operator.app, quarantined(desk, body, operator))
    assert desk.service.work() == 0
    assert [record["code"] for record in desk.service.quarantined()] == ["message.replayed"]


def test_what_expired_too_long_ago_is_not_released_and_would_not_run(
    desk: Desk, operator: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = desk.fresh(desk.capture())
    later(desk, monkeypatch, replay.late(desk.service.worker.app.hardening.settings) + LATE)
    found = quarantined(desk, body, operator)
    with pytest.raises(errors.Expired):
        refused.release(operator.app, found)
    assert found.removed == 0
    body = quarantine.countersign(operator.app.hardening, found.envelope)
    assert desk.refusal(body)["code"] == "message.expired"


def _release(desk: Desk, body: bytes, signer: envelope.Signer | None = None, **changes: Any) -> bytes:
    """Countersign by hand, with any key and any claims."""
    signer = signer or desk.service.party("operator").signer
    fields = json.loads(_payload(quarantine.countersign(desk.service.party("operator").app.hardening, body)))
    fields |= {"iss": str(signer.identity), **changes}
    return body + b"~" + signer.sign(changes.pop("kind", envelope.Type.RELEASE), codec.encode(fields))


def _payload(body: bytes) -> bytes:
    payload = body.partition(b"~")[2].split(b".")[1]
    return base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4))


@pytest.mark.parametrize("role", ["client", "worker", "beat", "monitor"])
def test_only_an_operator_releases(desk: Desk, role: str) -> None:
    body = expired(desk)
    party = desk.service.party(role)
    with pytest.raises(PermissionError):
        quarantine.countersign(party.app.hardening, body)
    assert desk.refusal(_release(desk, body, party.signer))["code"] == "control.denied"


def test_an_operator_without_the_right_releases_nothing(desk: Desk, operator: Party) -> None:
    """Who has left has no stanza any more; its certificate may still be good."""
    found = quarantined(desk, expired(desk), operator)
    nobody = issued(desk, named_as(desk, "operator/nobody"))
    assert desk.refusal(_release(desk, found.envelope, nobody))["code"] == "control.denied"
    policy = operator.app.hardening.policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy._rule(operator.identity), "controls", {"ping"})
        with pytest.raises(errors.ControlDenied):
            refused.release(operator.app, found)
    assert found.removed == 0
    refused.release(operator.app, found)
    assert desk.service.work() == 1


FORGERIES: dict[str, tuple[str, Any]] = {
    "of another message": ("message.signature", lambda desk, body: _release(desk, body, of="0" * 64)),
    "altered": ("message.signature", lambda desk, body: _release(desk, body)[:-4] + b"AAAA"),
    "no envelope": ("message.unsigned", lambda desk, body: body + b"~"),
    "two of them": ("message.unsigned", lambda desk, body: _release(desk, body) + b"~" + _release(desk, body)),
    "a command": (
        "message.type",
        lambda desk, body: (
            body
            + b"~"
            + control.sign(
                desk.service.party("operator").app.hardening,
                control.Command,
                **{"method": "ping", "arguments": {}, "ticket": None},
                **dict.fromkeys(("destination", "pattern", "matcher")),
            )
        ),
    ),
    "somebody else's name": (
        "message.shape",
        lambda desk, body: _release(desk, body, desk.service.client.signer, iss=named_as(desk, "operator")),
    ),
    "another environment's operator": (
        "message.audience",
        lambda desk, body: _release(desk, body, desk.service.party("operator", environment="staging").signer),
    ),
    "another application's operator": (
        "message.audience",
        lambda desk, body: _release(
            desk, body, issued(desk, named_as(desk, "operator").replace("/operator", "x/operator"))
        ),
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_countersignature_is_refused_and_nobody_is_told(desk: Desk, kind: str) -> None:
    """Also of a message that would pass without: whoever has seen one must not end its caller's wait."""
    code, forge = FORGERIES[kind]
    captured = desk.capture()
    for body in (expired(desk), desk.fresh(captured)):
        assert desk.refusal(forge(desk, body))["code"] == code
    app = desk.service.client.app
    assert app.AsyncResult(desk.claims(captured)["task"]["id"]).state == "PENDING"


def test_a_countersignature_is_for_a_day(desk: Desk, operator: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    body = _release(desk, desk.fresh(desk.capture()), exp=NOW + 10 * 86_400)
    later(desk, monkeypatch, LATE)
    assert desk.refusal(body)["code"] == "message.expired"


def test_the_gate_looks_again(desk: Desk, operator: Party) -> None:
    """A release lets a message be late, and no more."""
    fields = desk.claims()
    fields["task"] |= {"name": FORBIDDEN}
    body = desk.sign(fields)
    found = quarantined(desk, body, operator)
    assert found.shown["code"] == "policy.denied"
    refused.release(operator.app, found)
    assert desk.service.work() == 0
    again = desk.service.quarantined()
    assert [record["code"] for record in again] == ["policy.denied"]
    assert base64.b64decode(again[0]["body"]).partition(b"~")[0] == body


def test_a_release_that_was_refused_again_can_be_released_again(desk: Desk, operator: Party) -> None:
    body = quarantine.countersign(operator.app.hardening, expired(desk, task={**desk.claims()["task"], "name": "nope"}))
    found = quarantined(desk, body, operator)
    assert found.shown["code"] == "task.unknown"
    assert found.envelope == body.partition(b"~")[0]


def test_the_largest_message_can_be_released(desk: Desk, operator: Party) -> None:
    limit = desk.service.worker.app.hardening.settings.message_max_bytes
    fields = desk.claims() | {"kwargs": {"a": ""}}
    room = (limit - len(desk.sign(fields))) * 3 // 4 - 4
    task = {**fields["task"], "name": "nope"}
    body = desk.sign(fields | {"kwargs": {"a": "x" * (room - 8)}, "task": task})
    found = quarantined(desk, body, operator)
    refused.release(operator.app, found)
    (message,) = desk.service.deliveries()
    assert len(message.body) > limit - 100
    desk.service.receive(message)
    (record,) = desk.service.quarantined()
    assert record["code"] == "task.unknown"
    assert base64.b64decode(record["body"]).startswith(body)


def test_these_reasons_can_be_cured() -> None:
    leaves = errors.MessageRefused.__subclasses__()
    assert {leaf.code for leaf in leaves if leaf.curable} == {
        "message.delay",
        "message.expired",
        "message.future",
        "message.queue",
        "policy.denied",
        "policy.rate",
        "signer.revocation",
        "signer.untrusted",
        "task.unknown",
    }
    assert {leaf.code for leaf in leaves} == refused._REASONS.keys()


def test_a_copy_is_not_released(desk: Desk, operator: Party) -> None:
    body = desk.fresh(desk.capture())
    assert desk.service.receive(delivered(body, content_type=envelope.CONTENT_TYPE))
    found = quarantined(desk, body, operator)
    assert (found.shown["code"], found.problem) == ("message.replayed", None)
    with pytest.raises(errors.Replayed):
        refused.release(operator.app, found)
    assert list(desk.service.deliveries()) == []


def test_a_queue_of_others_is_not_released_into(desk: Desk, operator: Party) -> None:
    found = quarantined(desk, desk.sign({**desk.claims(), "queue": "elsewhere"}), operator)
    assert found.shown["code"] == "message.queue"
    with pytest.raises(errors.WrongQueue):
        refused.release(operator.app, found)
    assert found.removed == 0


HOSTILE = b"\x1b[2J\x07\xff\n<script>swordfish"


@pytest.mark.parametrize(
    ("body", "properties"),
    [
        (HOSTILE, {"content_type": "text/plain"}),
        (HOSTILE, {}),
        (b"a.b.c", {}),
        (b"", {}),
        (b"x" * 2_000_000, {}),
        (HOSTILE, {"application_headers": {"compression": "swordfish", "task": "\x1b[2J"}}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_has_no_cure_stays_and_is_not_shown(
    desk: Desk, operator: Party, body: bytes, properties: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = quarantined(desk, body, operator, **properties)
    for action in ("list", "inspect"):
        assert refused._do(operator.app, action, found)
    assert not refused._do(operator.app, "release", found)
    printed = "".join(capsys.readouterr())
    assert printed.isascii()
    assert printed.replace("\n", "").isprintable()
    assert "swordfish" not in printed
    assert found.shown["code"] in printed
    assert found.removed == 0
    assert list(desk.service.deliveries()) == []


def test_a_task_name_is_shown_escaped(desk: Desk, operator: Party, capsys: pytest.CaptureFixture[str]) -> None:
    fields = desk.claims()
    fields["task"] |= {"name": "t\u00e4sk'\\\u4f60"}
    found = quarantined(desk, desk.sign(fields), operator)
    assert refused._do(operator.app, "list", found)
    assert refused._do(operator.app, "inspect", found)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "t\\xe4sk" in printed
    assert str(desk.service.client.identity) in printed


@pytest.mark.parametrize(
    "record",
    [b"[]", b"{}", b'{"code": "message.expired"}', b'{"code": "\x1b[2J", "iat": 1e99}', b"\xff", b"[" * 90_000],
    ids=repr,
)
def test_a_worker_that_was_taken_over_cannot_mislead_by_its_record(
    desk: Desk, operator: Party, record: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = desk.service.worker.signer.sign(envelope.Type.QUARANTINE, record)
    found = Found(operator, signed)
    assert refused._do(operator.app, "list", found)
    assert refused._do(operator.app, "inspect", found)
    assert not refused._do(operator.app, "release", found)
    assert "".join(capsys.readouterr()).replace("\n", "").isprintable()


def test_a_record_that_no_worker_signed_is_not_believed(desk: Desk, operator: Party) -> None:
    fields = {"code": "message.expired", "detail": "", "size": 1, "sha256": "", "iat": 1, "body": ""}
    for signer in (desk.service.client.signer, operator.signer):
        signed = signer.sign(envelope.Type.QUARANTINE, codec.encode(fields))
        found = Found(operator, signed)
        assert found.shown["code"] == "-"
        assert isinstance(found.problem, errors.ControlDenied)


def test_what_is_dropped_is_gone_and_leaves_a_trace(
    desk: Desk, operator: Party, caplog: pytest.LogCaptureFixture
) -> None:
    found = quarantined(desk, HOSTILE, operator)
    with caplog.at_level(logging.INFO):
        assert refused._do(operator.app, "drop", found)
    assert found.removed == 1
    event = json.loads(caplog.messages[-1])
    assert (event["event"], event["code"], event["id"]) == (audit.Event.DROPPED, "message.unsigned", found.shown["id"])


def test_a_release_leaves_a_trace_at_the_worker(desk: Desk, operator: Party, caplog: pytest.LogCaptureFixture) -> None:
    refused.release(operator.app, quarantined(desk, expired(desk), operator))
    with caplog.at_level(logging.INFO):
        desk.service.work()
    (event,) = [json.loads(line) for line in caplog.messages if audit.Event.RELEASED in line]
    assert (event["signer"], event["task"]) == (str(operator.identity), PROBE)
