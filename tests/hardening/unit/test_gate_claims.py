"""The gate: what a genuine signer may say, how long it holds, and how much of it is read."""

from __future__ import annotations

import pickle
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ...project import codec, envelope, errors, gate, quarantine
from . import certificates
from .desk import (
    FORBIDDEN,
    NOW,
    PROTOCOL_2,
    TASK,
    UNLIMITED,
    Desk,
    changed,
    delivered,
    issued,
    named_as,
)

# --- what a genuine signer may not do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("iss", "spiffe://x.test/development/x/worker", "message.shape"),
        ("aud", "spiffe://x.test/development/x", "message.audience"),
        ("iat", NOW + 600, "message.future"),
        ("iat", 1, "signer.validity"),
        ("iat", 2**62, "signer.validity"),
        ("iat", -1, "signer.validity"),
        ("exp", NOW - 600, "message.expired"),
        ("exp", NOW + 10**9, "message.shape"),
        ("exp", 2**62, "message.shape"),
        ("owner", "spiffe://x.test/development/x/client", "message.shape"),
        ("origin", "spiffe://x.test/development/x/client", "policy.denied"),
        ("origin", "not a SPIFFE ID", "signer.identity"),
        ("queue", "x.default", "message.queue"),
        ("queue", "default", "message.queue"),
        ("task.name", "nope", "task.unknown"),
        ("task.name", FORBIDDEN, "policy.denied"),
        ("task.name", "celery.backend_cleanup", "policy.denied"),
        ("task.name", "celery.chord_unlock", "policy.denied"),
        ("task.eta", "2999-01-01T00:00:00", "message.delay"),
        ("task.eta", "never", "message.shape"),
        ("task.retries", -1, "message.shape"),
        ("task.timelimit", [1, 2, 3], "message.shape"),
        ("args", {}, "message.shape"),
        ("args", "abc", "message.shape"),
        ("kwargs", [], "message.shape"),
        ("embed", [], "message.shape"),
        ("embed.chain", {}, "message.shape"),
        ("task", None, "message.shape"),
        ("jti", "", "message.shape"),
    ],
)
def test_signed_claims_are_judged(desk: Desk, path: str, value: object, code: str) -> None:
    assert desk.refusal(desk.sign(changed(desk.claims(), path, value)))["code"] == code


@pytest.mark.parametrize("value", [1, [1, 2], [[], {}, {}], "x", None, {}, True])
def test_a_signed_body_of_another_shape_is_refused(desk: Desk, value: object) -> None:
    """On stock Celery a signed scalar ends the worker (F5)."""
    assert desk.refusal(desk.sign(value))["code"] == "message.shape"


@pytest.mark.parametrize(
    "payload",
    [pickle.dumps(PROTOCOL_2), b"[[], {}, {}]", b"\xff", b"NaN", b"[" * 5000, b'{"iss": 1, "iss": 2}'],
)
def test_a_signed_body_that_is_not_strict_json_is_refused(desk: Desk, payload: bytes) -> None:
    assert desk.refusal(desk.service.client.signer.sign(TASK, payload))["code"] == "message.shape"


@pytest.mark.parametrize("kind", [envelope.Type.RESULT, envelope.Type.QUARANTINE])
def test_a_genuine_envelope_of_another_type_is_no_task(desk: Desk, kind: envelope.Type) -> None:
    body = desk.service.worker.signer.sign(kind, codec.encode(desk.claims()))
    assert desk.refusal(body)["code"] == "message.type"


@pytest.mark.parametrize(
    ("role", "application", "environment"),
    [("client", None, "production"), ("client", "other", "development"), ("worker", None, "production")],
)
def test_another_environments_or_applications_signer_is_refused(
    desk: Desk, role: str, application: str | None, environment: str
) -> None:
    """A certificate of the same CA; in its claims it may say what it likes."""
    domain = desk.service.client.identity.trust_domain
    certificate = issued(
        desk, f"spiffe://{domain}/{environment}/{application or desk.service.rules.application}/{role}"
    )
    fields = desk.claims()
    fields |= {"iss": str(certificate.identity), "owner": str(certificate.identity)}
    for aud, code in ((certificate.identity.audience, "message.audience"), (fields["aud"], "policy.denied")):
        for origin in (str(certificate.identity), str(desk.service.client.identity)):
            body = certificate.sign(TASK, codec.encode({**fields, "aud": aud, "origin": origin}))
            assert desk.refusal(body)["code"] == code


@pytest.mark.parametrize("window", [(-200, -100), (3600, 7200)], ids=["expired", "not yet valid"])
def test_a_certificate_that_was_not_valid_at_issue_is_refused(desk: Desk, window: tuple[int, int]) -> None:
    signer = issued(desk, named_as(desk, "client"), *window)
    assert desk.refusal(signer.sign(TASK, codec.encode(desk.claims())))["code"] == "signer.validity"


@pytest.mark.parametrize("role", ["worker", "operator"])
def test_a_client_cannot_say_that_it_is_another(desk: Desk, role: str) -> None:
    other = dict.fromkeys(("iss", "owner", "origin"), named_as(desk, role))
    assert desk.refusal(desk.sign(desk.claims() | other))["code"] == "message.shape"


def test_a_self_made_certificate_is_refused(desk: Desk) -> None:
    pair = certificates.signing(str(desk.service.client.identity), certificates.authority())
    assert desk.refusal(pair.signer.sign(TASK, codec.encode(desk.claims())))["code"] == "signer.untrusted"


@pytest.mark.parametrize("role", ["monitor", "operator", "beat"])
def test_each_role_sends_what_the_topology_says(desk: Desk, role: str) -> None:
    identity = named_as(desk, role)
    fields = desk.claims() | {"iss": identity, "origin": identity, "owner": identity}
    body = issued(desk, identity).sign(TASK, codec.encode(fields))
    if role == "monitor":
        assert desk.refusal(body)["code"] == "policy.denied"
    else:
        assert desk.run(body)["origin"] == identity


def test_only_a_worker_sends_for_another(desk: Desk) -> None:
    fields = desk.claims() | {"iss": str(desk.service.worker.identity)}
    request = desk.run(desk.sign(fields, desk.service.worker))
    assert request["origin"] == str(desk.service.client.identity)
    for claim, code in (("origin", "policy.denied"), ("owner", "message.shape")):
        assert desk.refusal(desk.sign(desk.claims() | {claim: named_as(desk, "operator")}))["code"] == code


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_message_is_stale_after_its_lifetime_and_the_clock_skew(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    body = desk.capture().body
    limits = desk.service.worker.app.hardening.settings
    fields = desk.claims(delivered(body))
    assert fields["exp"] == fields["iat"] + limits.message_max_age
    for late, passes in ((limits.clock_skew - 2, True), (limits.clock_skew + 2, False)):
        with monkeypatch.context() as patch:
            patch.setattr(gate, "time", _Clock(fields["exp"] + late))
            if passes:
                desk.service.gate.admit(delivered(body, content_type=envelope.CONTENT_TYPE))
            else:
                with pytest.raises(errors.Expired):
                    desk.service.gate.admit(delivered(body, content_type=envelope.CONTENT_TYPE))


def test_a_message_from_the_future_is_refused_beyond_the_clock_skew(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = desk.capture().body
    limits = desk.service.worker.app.hardening.settings
    issued = desk.claims(delivered(body))["iat"]
    monkeypatch.setattr(gate, "time", _Clock(issued - limits.clock_skew))
    desk.service.gate.admit(delivered(body, content_type=envelope.CONTENT_TYPE))
    monkeypatch.setattr(gate, "time", _Clock(issued - limits.clock_skew - 1))
    with pytest.raises(errors.FromTheFuture):
        desk.service.gate.admit(delivered(body, content_type=envelope.CONTENT_TYPE))


class _Clock:
    def __init__(self, moment: float) -> None:
        self._moment = moment

    def time(self) -> float:
        return self._moment


def test_a_countdown_within_the_limit_lengthens_the_lifetime_by_itself(desk: Desk) -> None:
    fields = desk.claims(desk.capture(countdown=3600))
    limits = desk.service.worker.app.hardening.settings
    assert fields["exp"] == pytest.approx(fields["iat"] + 3600 + limits.message_max_age, abs=2)
    admitted = desk.service.gate.admit(delivered(desk.sign(fields), content_type=envelope.CONTENT_TYPE))
    assert datetime.fromisoformat(admitted.headers["eta"]).timestamp() == pytest.approx(time.time() + 3600, abs=5)
    beyond = (datetime.now(UTC) + timedelta(seconds=limits.message_max_delay + 60)).isoformat()
    assert desk.refusal(desk.sign(changed(fields, "task.eta", beyond)))["code"] == "message.delay"


def test_a_delay_that_was_not_left_to_the_broker_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker it would wait in the place of others, and a few of them would keep everybody waiting."""
    hardening = desk.service.worker.app.hardening
    monkeypatch.setattr(hardening.broker, "early", 2)
    fields = desk.claims()

    def delayed(seconds: float) -> bytes:
        return desk.sign(changed(fields, "task.eta", (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()))

    assert desk.refusal(delayed(hardening.settings.clock_skew + 10))["code"] == "message.delay"
    desk.service.gate.admit(delivered(delayed(hardening.settings.clock_skew), content_type=envelope.CONTENT_TYPE))


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claimed", "given_"),
    [
        ([None, None], [30, 20]),
        ([10**9, 10**9], [30, 20]),
        ([10, 5], [10, 5]),
        ([10, None], [10, 10]),
        ([1e308, 1e-5], [30, 1e-5]),
    ],
)
def test_time_limits_can_be_lowered_and_never_raised(desk: Desk, claimed: list[Any], given_: list[Any]) -> None:
    fields = changed(desk.claims(), "task.timelimit", claimed)
    assert desk.run(desk.sign(fields))["timelimit"] == given_


def test_a_task_without_limits_of_its_own_has_the_applications(desk: Desk) -> None:
    conf = desk.service.worker.app.conf
    fields = desk.claims() | {"args": []}
    fields["task"] |= {"name": UNLIMITED, "timelimit": [10**9, 10**9]}
    admitted = desk.service.gate.admit(delivered(desk.sign(fields), content_type=envelope.CONTENT_TYPE))
    assert admitted.headers["timelimit"] == [conf.task_time_limit, conf.task_soft_time_limit] == [300, 270]


def test_one_byte_over_the_limit_is_too_large(desk: Desk) -> None:
    limit = desk.service.worker.app.hardening.settings.message_max_bytes
    fields = desk.claims() | {"kwargs": {"a": ""}}
    room = (limit - len(desk.sign(fields))) * 3 // 4
    assert desk.refusal(desk.sign(fields | {"kwargs": {"a": "x" * (room + 4)}}))["code"] == "message.too-large"
    assert (
        desk.refusal(desk.sign(fields | {"kwargs": {"a": "x" * (room - 4)}, "aud": "x"}))["code"] == "message.audience"
    )


@pytest.mark.parametrize("length", [1024 * 1024 + quarantine.COUNTERSIGNATURE_MAX + 1, 20 * 1024 * 1024])
@pytest.mark.parametrize("content_type", [envelope.CONTENT_TYPE, "application/json"])
def test_a_huge_body_is_refused_before_anything_else_is_looked_at(desk: Desk, length: int, content_type: str) -> None:
    record = desk.refusal(b"A" * length, content_type=content_type)
    assert (record["code"], record["size"]) == ("message.too-large", length)


def test_a_compressed_message_is_refused_unopened(desk: Desk) -> None:
    body = desk.capture().body
    for method in ("gzip", "nonsense"):
        message = delivered(body, content_type=envelope.CONTENT_TYPE, application_headers={"compression": method})
        assert not desk.service.receive(message)
        (record,) = desk.service.quarantined()
        assert record["code"] == "message.compressed"


def test_an_unparseable_message_is_refused_with_its_bytes(desk: Desk) -> None:
    message = delivered(b"x")
    message.refusal, message.unparsed = errors.Unparseable(), b"\xff\x00"
    assert not desk.service.receive(message)
    (record,) = desk.service.quarantined()
    assert (record["code"], record["unparsed"]) == ("message.unparseable", "/wA=")
