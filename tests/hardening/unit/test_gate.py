"""The gate: nothing reaches Celery but what a genuine signer may send, and of that only what was signed."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from amqp import basic_message
from celery import Task
from celery.result import AsyncResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...project import claims, codec, documents, envelope, errors, gate, intake
from ...service import Party, Service
from . import certificates

TASK = envelope.Type.TASK
PREFIX = documents.checksum.name.rpartition(".documents.")[0]
PROBE, UNLIMITED = f"{PREFIX}.probe", f"{PREFIX}.unlimited"
FORBIDDEN = f"{PREFIX.rpartition('.')[0]}.admin.delete"
SECRET = "swordfish"


class Channel:
    """What a message needs of its channel: it notes what became of it."""

    no_ack_consumers = None

    def __init__(self) -> None:
        self.fate: list[str] = []

    def basic_ack(self, *_: Any, **__: Any) -> None:
        self.fate.append("acknowledged")

    def basic_reject(self, *_: Any, requeue: bool, **__: Any) -> None:
        self.fate.append("requeued" if requeue else "rejected")


def delivered(
    body: Any, channel: Channel | None = None, delivery_info: dict[str, Any] | None = None, **properties: Any
) -> Any:
    """Return a message as py-amqp delivers it, with any properties at all."""
    message = basic_message.Message(body, **properties)
    message.delivery_info = {"delivery_tag": 1, **(delivery_info or {})}
    return intake.AmqpMessage(message, channel=channel or Channel())


class Desk:
    """A service with a task that notes each of its requests, and genuine claims to change."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seen: list[dict[str, Any]] = []
        app = service.worker.app

        @app.task(name=PROBE, bind=True, shared=False, max_retries=1, time_limit=30, soft_time_limit=20)
        def probe(task: Task, number: int = 0, again: bool = False) -> int:
            self.seen.append(dict(vars(task.request)))
            if again and not task.request.retries:
                raise task.retry(countdown=0)
            return number

        @app.task(name=UNLIMITED, shared=False)
        def unlimited() -> None: ...

        @app.task(name=FORBIDDEN, shared=False)
        def delete(number: int = 0, again: bool = False) -> None:
            self.seen.append({"task": FORBIDDEN})

    def capture(self, *args: Any, **options: Any) -> Any:
        """Send the probe as a client does; return the message that came out, taken from its queue."""
        self.service.client.app.send_task(PROBE, args, **{"ignore_result": False, **options})
        (message,) = self.service.deliveries()
        message.ack()
        return message

    def claims(self, message: Any = None) -> dict[str, Any]:
        """Return genuine claims, ready to be changed."""
        verifier = self.service.worker.app.hardening.verifier
        verified = verifier.verify(TASK, (message or self.capture()).body)
        fields: dict[str, Any] = codec.decode(verified.payload)
        return fields

    def sign(self, fields: Any, party: Party | None = None) -> bytes:
        """Sign any claims with a genuine key."""
        return (party or self.service.client).signer.sign(TASK, codec.encode(fields))

    def refusal(self, body: Any = None, **properties: Any) -> dict[str, Any]:
        """Publish a message and assert that all that becomes of it is one record in the quarantine."""
        self.service.publish(body, **properties)
        return self.refused()

    def refused(self) -> dict[str, Any]:
        """Assert that what lies in the queue is refused; return its record."""
        assert self.service.work() == 0
        (record,) = self.service.quarantined()
        assert self.seen == []
        return record

    def run(self, body: Any, **properties: Any) -> dict[str, Any]:
        """Publish a message that passes; return the request that its task saw."""
        self.service.publish(body, **properties)
        assert self.service.work() == 1
        assert self.service.quarantined() == []
        return self.seen.pop()


@pytest.fixture(scope="module")
def one_desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One for the module: each test takes all that it put into its queues."""
    return Desk(Service(tmp_path_factory.mktemp("gate")))


@pytest.fixture
def desk(one_desk: Desk) -> Iterator[Desk]:
    yield one_desk
    left = [*one_desk.service.deliveries(), *one_desk.service.quarantined(), *one_desk.seen]
    one_desk.seen.clear()
    assert left == []


def _changed(fields: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(fields)
    *parents, last = path.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[last] = value
    return changed


def test_a_genuine_message_runs(desk: Desk) -> None:
    message = desk.capture(7)
    request = desk.run(message.body)
    assert request["args"] == [7]
    assert request["task"] == PROBE
    assert request["id"] == message.headers["id"]
    assert request["origin"] == str(desk.service.client.identity)


# --- unsigned ---------------------------------------------------------------------------------------------------------

PROTOCOL_1 = {"task": PROBE, "id": "1", "args": [], "kwargs": {}}
PROTOCOL_2 = [[], {}, {}]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(json.dumps(PROTOCOL_2).encode(), "application/json", id="JSON"),
        pytest.param(json.dumps(PROTOCOL_1).encode(), "application/json", id="protocol 1"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/x-python-serialize", id="pickle"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/data", id="stock auth"),
        pytest.param(b"[[], {}, {}]", "application/x-yaml", id="YAML"),
        pytest.param(b"\x93\x90\x80\x80", "application/x-msgpack", id="msgpack"),
        pytest.param(b"", "application/text", id="empty text"),
        pytest.param(b"x", "text/plain", id="text"),
        pytest.param(json.dumps(PROTOCOL_2).encode(), "application/jose", id="JSON as an envelope"),
        pytest.param(pickle.dumps(PROTOCOL_2), "application/jose", id="pickle as an envelope"),
        pytest.param(b"", "application/jose", id="empty envelope"),
        pytest.param(b"[[], {}, {}]", "application/data", id="raw"),
        pytest.param(b"[[], {}, {}]", "x" * 250, id="unknown type"),
    ],
)
def test_an_unsigned_message_is_refused_whatever_it_says_it_is(desk: Desk, body: bytes, content_type: str) -> None:
    headers = {"task": PROBE, "id": "1", "lang": "py"}
    record = desk.refusal(body, content_type=content_type, headers=headers)
    assert record["code"] == "message.unsigned"
    assert record["content_type"] == content_type


def test_a_genuine_envelope_under_another_content_type_is_refused(desk: Desk) -> None:
    body = desk.capture().body
    assert desk.refusal(body, content_type="application/json")["code"] == "message.unsigned"


def test_an_unsigned_message_cannot_fail_the_task_whose_id_it_has(desk: Desk) -> None:
    """Stock Celery marks the id of an unknown task as failed, whoever sent it (F8)."""
    victim = desk.service.client.app.send_task(PROBE, (1,), ignore_result=False)
    (genuine,) = desk.service.deliveries()
    desk.refusal(b"[[], {}, {}]", content_type="application/json", headers={"task": "nope", "id": victim.id})
    assert victim.state == "PENDING"
    genuine.ack()
    desk.run(genuine.body)
    assert victim.get(timeout=1) == 1


# --- what was not signed has no effect --------------------------------------------------------------------------------

OTHER = {"a": "b"}
HEADERS: dict[str, Any] = {
    "lang": "c",
    "task": FORBIDDEN,
    "id": "victim",
    "root_id": "victim",
    "parent_id": "victim",
    "group": "victim",
    "group_index": 9,
    "eta": "2999-01-01T00:00:00",
    "expires": "2000-01-01T00:00:00",
    "retries": 999,
    "timelimit": [0.001, 0.001],
    "shadow": SECRET,
    "argsrepr": SECRET,
    "kwargsrepr": SECRET,
    "origin": "spiffe://x/y/z/operator",
    "owner": "spiffe://x/y/z/operator",
    "ignore_result": True,
    "replaced_task_nesting": 99,
    "stamped_headers": ["routing_key"],
    "stamps": {"routing_key": "victim"},
    "meth": "x",
    "utc": False,
    "callbacks": [{"task": FORBIDDEN}],
    "errbacks": [{"task": FORBIDDEN}],
    "chain": [{"task": FORBIDDEN}],
    "chord": {"task": FORBIDDEN},
    "headers": OTHER,
    "properties": OTHER,
    "delivery_info": {"routing_key": "victim", "is_eager": True},
    "reply_to": "victim",
    "correlation_id": "victim",
    "hostname": "victim",
    "is_eager": True,
    "called_directly": True,
    "loglevel": 10,
    "logfile": "/tmp/x",
    "args": [666],
    "kwargs": {"number": 666},
    "taskset": "victim",
    "_children": [],
    "x-death": [{"queue": "x", "count": 99}],
    "traceparent": SECRET,
    "": SECRET,
}
PROPERTIES: dict[str, Any] = {
    "reply_to": "victim",
    "correlation_id": "victim",
    "priority": 9,
    "delivery_mode": 1,
    "message_id": "victim",
    "type": FORBIDDEN,
    "app_id": "victim",
    "user_id": "victim",
    "timestamp": 1,
    "content_encoding": "punycode",
}
#: What a request knows of its delivery and its worker; everything else comes from the message.
_OF_THE_WORKER = {"delivery_info"}


def _request(desk: Desk, message: Any) -> dict[str, Any]:
    assert desk.service.receive(message)
    request = desk.seen.pop()
    return {name: value for name, value in request.items() if name not in _OF_THE_WORKER}


@pytest.mark.parametrize("name", HEADERS)
def test_an_unsigned_header_has_no_effect(desk: Desk, name: str) -> None:
    genuine = desk.capture(7)
    expected = _request(desk, delivered(genuine.body, content_type=envelope.CONTENT_TYPE))
    headers = {"task": PROBE, "id": genuine.headers["id"], name: HEADERS[name]}
    forged = delivered(genuine.body, content_type=envelope.CONTENT_TYPE, application_headers=headers)
    assert _request(desk, forged) == expected


@pytest.mark.parametrize("name", PROPERTIES)
def test_an_unsigned_property_has_no_effect(desk: Desk, name: str) -> None:
    genuine = desk.capture(7)
    expected = _request(desk, delivered(genuine.body, content_type=envelope.CONTENT_TYPE))
    forged = delivered(genuine.body, content_type=envelope.CONTENT_TYPE, **{name: PROPERTIES[name]})
    assert _request(desk, forged) == expected


@pytest.mark.parametrize("headers", [None, {}, {"task": None}, {"task": {}}, {"id": []}, {1: 2}, {b"\xff": b"\xff"}])
def test_a_genuine_body_needs_no_headers_at_all(desk: Desk, headers: Any) -> None:
    message = delivered(desk.capture(7).body, content_type=envelope.CONTENT_TYPE, application_headers=headers)
    assert _request(desk, message)["args"] == [7]


def test_of_the_delivery_only_the_brokers_redelivered_flag_is_believed(desk: Desk) -> None:
    body = desk.capture().body
    forged = {"exchange": "x", "routing_key": "victim", "priority": 9, "is_eager": True, "redelivered": "yes"}
    desk.service.receive(delivered(body, delivery_info=forged, content_type=envelope.CONTENT_TYPE))
    rules = desk.service.rules
    assert desk.seen.pop()["delivery_info"] == {
        "exchange": rules.exchange,
        "routing_key": rules.queues[0].broker_name,
        "priority": None,
        "redelivered": True,
    }


def test_celery_is_given_nothing_that_it_would_decode(desk: Desk) -> None:
    admitted = desk.service.gate.admit(delivered(desk.capture(7).body, content_type=envelope.CONTENT_TYPE))
    assert admitted.content_type is None
    assert admitted.content_encoding is None
    args, kwargs, embed = admitted.payload
    assert (args, kwargs) == ([7], {})
    assert embed.keys() == {"callbacks", "errbacks", "chain", "chord"}


@pytest.mark.parametrize("key", ["id", "delivery_info", "group", "task", "origin", "owner", "utc", "x"])
def test_a_signed_fifth_key_of_the_embedded_canvas_is_refused(desk: Desk, key: str) -> None:
    """Celery's tracer would spread it over the request (F21)."""
    fields = desk.claims()
    fields["embed"][key] = "victim"
    assert desk.refusal(desk.sign(fields))["code"] == "message.shape"


# --- what a genuine signer may not do ---------------------------------------------------------------------------------

NOW = int(certificates.NOW.timestamp())


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
    assert desk.refusal(desk.sign(_changed(desk.claims(), path, value)))["code"] == code


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
    certificate = _issued(
        desk, f"spiffe://{domain}/{environment}/{application or desk.service.rules.application}/{role}"
    )
    fields = desk.claims()
    fields |= {"iss": str(certificate.identity), "owner": str(certificate.identity)}
    for aud, code in ((certificate.identity.audience, "message.audience"), (fields["aud"], "policy.denied")):
        for origin in (str(certificate.identity), str(desk.service.client.identity)):
            body = certificate.sign(TASK, codec.encode({**fields, "aud": aud, "origin": origin}))
            assert desk.refusal(body)["code"] == code


def _issued(desk: Desk, uri: str, start: int = -120, end: int = 86_400) -> envelope.Signer:
    """Return a signer of the service's own CA; its validity is given in seconds from now."""
    authority = desk.service.pki.signing
    valid = tuple(certificates.NOW + timedelta(seconds=seconds) for seconds in (start, end))
    return certificates.signing(uri, certificates.Pair(authority.key, (authority.root,)), valid=valid).signer


def _as(desk: Desk, role: str) -> str:
    """Return the SPIFFE ID of another role of the same application."""
    return str(desk.service.client.identity).replace("/client", f"/{role}")


@pytest.mark.parametrize("window", [(-200, -100), (3600, 7200)], ids=["expired", "not yet valid"])
def test_a_certificate_that_was_not_valid_at_issue_is_refused(desk: Desk, window: tuple[int, int]) -> None:
    signer = _issued(desk, _as(desk, "client"), *window)
    assert desk.refusal(signer.sign(TASK, codec.encode(desk.claims())))["code"] == "signer.validity"


@pytest.mark.parametrize("role", ["worker", "operator"])
def test_a_client_cannot_say_that_it_is_another(desk: Desk, role: str) -> None:
    other = dict.fromkeys(("iss", "owner", "origin"), _as(desk, role))
    assert desk.refusal(desk.sign(desk.claims() | other))["code"] == "message.shape"


def test_a_self_made_certificate_is_refused(desk: Desk) -> None:
    pair = certificates.signing(str(desk.service.client.identity), certificates.authority())
    assert desk.refusal(pair.signer.sign(TASK, codec.encode(desk.claims())))["code"] == "signer.untrusted"


@pytest.mark.parametrize("role", ["monitor", "operator", "beat"])
def test_each_role_sends_what_the_topology_says(desk: Desk, role: str) -> None:
    identity = _as(desk, role)
    fields = desk.claims() | {"iss": identity, "origin": identity, "owner": identity}
    body = _issued(desk, identity).sign(TASK, codec.encode(fields))
    if role == "monitor":
        assert desk.refusal(body)["code"] == "policy.denied"
    else:
        assert desk.run(body)["origin"] == identity


def test_only_a_worker_sends_for_another(desk: Desk) -> None:
    fields = desk.claims() | {"iss": str(desk.service.worker.identity)}
    request = desk.run(desk.sign(fields, desk.service.worker))
    assert request["origin"] == str(desk.service.client.identity)
    for claim, code in (("origin", "policy.denied"), ("owner", "message.shape")):
        assert desk.refusal(desk.sign(desk.claims() | {claim: _as(desk, "operator")}))["code"] == code


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
    assert desk.refusal(desk.sign(_changed(fields, "task.eta", beyond)))["code"] == "message.delay"


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
    fields = _changed(desk.claims(), "task.timelimit", claimed)
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


@pytest.mark.parametrize("length", [1024 * 1024 + 1, 20 * 1024 * 1024])
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


# --- a genuine signer, through a worker -------------------------------------------------------------------------------


def test_a_retry_keeps_the_name_the_id_and_the_caller(desk: Desk) -> None:
    fields = desk.claims(desk.capture(7, True, headers={"traceparent": "00-1"}))
    desk.service.publish(desk.sign(fields))
    assert desk.service.work() == 2
    first, second = desk.seen
    desk.seen.clear()
    for name in ("id", "task", "origin", "owner", "args", "root_id", "headers", "timelimit"):
        assert second[name] == first[name], name
    assert (first["retries"], second["retries"]) == (0, 1)


def test_a_retry_cannot_be_made_to_send_another_task_with_the_workers_rights(desk: Desk) -> None:
    """A header of the caller's own is sent again by a retry, where ``task`` would name what the worker signs."""
    for headers in ({"task": FORBIDDEN}, {"id": "victim"}, {"retries": 0}):
        fields = _changed(desk.claims(desk.capture(7, True)), "task.headers", headers)
        assert desk.refusal(desk.sign(fields))["code"] == "message.shape"


def _signature(task: str, **options: Any) -> dict[str, Any]:
    return {"task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


@pytest.mark.parametrize(
    "changes",
    [
        *({"embed": {place: [_signature(FORBIDDEN)]}} for place in ("callbacks", "errbacks", "chain")),
        {"embed": {"chord": _signature(FORBIDDEN)}},
        {"embed": {"callbacks": [_signature(PROBE, link=[_signature(FORBIDDEN)])]}},
        {"embed": {"errbacks": [_signature(PROBE, chain=[_signature(FORBIDDEN)])]}},
    ],
    ids=lambda changes: json.dumps(changes["embed"])[:30],
)
def test_a_message_cannot_name_a_task_that_its_signer_may_not_send(desk: Desk, changes: dict[str, Any]) -> None:
    """Stock Celery has the worker sign and send it, with the worker's rights (F9)."""
    assert desk.refusal(desk.sign(desk.claims() | changes))["code"] == "policy.denied"


def test_a_callbacks_own_headers_cannot_rename_it_on_its_way(desk: Desk) -> None:
    """What a worker sends for a message has its origin, and is judged again for it."""
    renamed = _signature(PROBE, headers={"task": FORBIDDEN})
    desk.service.publish(desk.sign(desk.claims() | {"embed": {"callbacks": [renamed]}}))
    assert desk.service.work() == 1
    assert [record["code"] for record in desk.service.quarantined()] == ["policy.denied"]
    assert [request["task"] for request in desk.seen] == [PROBE]
    desk.seen.clear()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "leaf"),
    [
        ("exp", NOW - 600, errors.Expired),
        ("task.name", "nope", errors.UnknownTask),
        ("task.name", FORBIDDEN, errors.NotAllowed),
        ("queue", "x", errors.WrongQueue),
        ("iat", NOW + 600, errors.FromTheFuture),
    ],
)
def test_a_genuine_signers_get_ends_with_the_refusal(
    desk: Desk, path: str, value: object, leaf: type[Exception]
) -> None:
    fields = _changed(desk.claims(), path, value)
    desk.refusal(desk.sign(fields))
    with pytest.raises(leaf) as caught:
        AsyncResult(fields["task"]["id"], app=desk.service.client.app).get(timeout=1)
    assert type(caught.value) is leaf


def test_a_caller_who_wants_no_result_gets_none_for_a_refusal(desk: Desk) -> None:
    fields = _changed(desk.claims(desk.capture(ignore_result=True)), "task.name", "nope")
    desk.refusal(desk.sign(fields))
    assert AsyncResult(fields["task"]["id"], app=desk.service.client.app).state == "PENDING"


def test_a_refusal_for_another_application_stores_no_result(desk: Desk) -> None:
    fields = desk.claims() | {"aud": "spiffe://x/y/z"}
    desk.refusal(desk.sign(fields))
    assert AsyncResult(fields["task"]["id"], app=desk.service.client.app).state == "PENDING"


def test_a_signer_cannot_fail_anothers_task_by_being_refused(desk: Desk) -> None:
    victim = desk.service.client.app.send_task(PROBE, (1,), ignore_result=False)
    (genuine,) = desk.service.deliveries()
    beat = _as(desk, "beat")
    fields = desk.claims(genuine) | {"iss": beat, "owner": beat}
    fields["task"] |= {"name": FORBIDDEN}
    for origin in (beat, str(desk.service.client.identity)):
        desk.refusal(_issued(desk, beat).sign(TASK, codec.encode(fields | {"origin": origin})))
        assert victim.state == "PENDING"
    genuine.ack()
    desk.run(genuine.body)
    assert victim.get(timeout=1) == 1


def test_a_defect_of_the_gate_refuses_the_message_and_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    body = desk.capture().body

    def defect(*_: Any) -> None:
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(claims.TaskClaims, "parse", defect)
        record = desk.refusal(body)
    assert (record["code"], record["detail"]) == ("gate.failed", "RuntimeError")
    desk.run(body)


# --- what a log shows -------------------------------------------------------------------------------------------------


def _events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [record.getMessage() for record in caplog.records if record.name == "secure_celery.audit"]
    assert all("\n" not in line and "\r" not in line and line.isascii() for line in lines)
    return [json.loads(line) for line in lines]


def test_a_refusal_is_one_event_that_names_the_signer_and_shows_nothing_of_the_body(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    fields = _changed(desk.claims(), "task.name", FORBIDDEN) | {"args": [SECRET], "kwargs": {SECRET: SECRET}}
    fields["task"] |= {"shadow": SECRET, "headers": {SECRET: SECRET}}
    with caplog.at_level(logging.DEBUG):
        desk.refusal(desk.sign(fields), headers={"x": SECRET}, reply_to=SECRET)
    assert SECRET not in caplog.text
    (event,) = _events(caplog)
    assert event["event"] == "message.refused"
    assert event["code"] == "policy.denied"
    assert event["signer"] == str(desk.service.client.identity)
    assert (event["task"], event["id"]) == (FORBIDDEN, fields["task"]["id"])


def test_an_unsigned_refusal_names_nobody(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        desk.refusal(b"x", headers={"task": SECRET, "id": SECRET})
    assert SECRET not in caplog.text
    (event,) = _events(caplog)
    assert (event["signer"], event["task"], event["id"]) == (None, None, None)


@pytest.mark.parametrize("injected", ["\n{}", "\r\n", "\x1b[2J", "\u2028", "\x85"])
@pytest.mark.parametrize(
    "path", ["task.name", "task.id", "iss", "queue", "task.shadow", "embed.x", "x", "task.headers"]
)
def test_a_signer_cannot_start_a_new_log_line(
    desk: Desk, caplog: pytest.LogCaptureFixture, path: str, injected: str
) -> None:
    value: Any = {f"a{injected}": 1} if path == "task.headers" else f"a{injected}b"
    changed = _changed(desk.claims(), path + (injected if path.endswith("x") else ""), value)
    with caplog.at_level(logging.DEBUG):
        desk.refusal(desk.sign(changed))
    assert len(_events(caplog)) == 1
    assert injected not in caplog.text


def test_a_genuine_run_shows_no_argument(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    fields = _changed(desk.claims(), "task.name", documents.checksum.name) | {"args": [SECRET]}
    with caplog.at_level(logging.DEBUG):
        desk.service.publish(desk.sign(fields))
        assert desk.service.work() == 1
    assert SECRET not in caplog.text


# --- anything at all --------------------------------------------------------------------------------------------------

_KEY = st.text(max_size=9) | st.binary(max_size=3)
_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=20)
    | st.datetimes(),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=9) | st.binary(max_size=3), values, max_size=3)
    ),
    max_leaves=8,
)
_NAMES = st.sampled_from([*HEADERS, "compression", "a"]) | st.text(max_size=5) | st.binary(max_size=5)
_BODY = (
    st.none()
    | st.binary(max_size=200)
    | st.text(max_size=200)
    | st.binary(max_size=50).map(memoryview)
    | st.binary(max_size=50).map(bytearray)
    | st.just(b"e30.e30.e30")
)
_ANY = st.one_of(st.none(), st.integers(), st.text(st.characters(), max_size=20), st.just(envelope.CONTENT_TYPE))
_FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FUZZ
@given(
    body=_BODY,
    headers=st.dictionaries(_NAMES, _VALUE, max_size=5),
    properties=st.fixed_dictionaries(
        {}, optional={"content_type": _ANY, "content_encoding": _ANY, "priority": _VALUE, "reply_to": _VALUE}
    ),
    delivery_info=st.dictionaries(st.sampled_from(["exchange", "routing_key", "redelivered"]), _VALUE, max_size=3),
)
def test_no_message_without_a_key_is_admitted_raises_or_is_lost(
    desk: Desk, body: Any, headers: Any, properties: Any, delivery_info: Any
) -> None:
    channel = Channel()
    message = delivered(body, channel, delivery_info, application_headers=headers, **properties)
    assert desk.service.gate.receive(message) is None
    assert channel.fate == ["acknowledged"]
    (record,) = desk.service.quarantined()
    assert record["code"] in {"message.unsigned", "message.malformed", "message.compressed"}


@_FUZZ
@given(
    path=st.sampled_from(
        [
            *("iss", "aud", "iat", "exp", "jti", "origin", "owner", "queue", "args", "kwargs", "embed", "task", "x"),
            *(f"task.{name}" for name in claims.Task.model_fields),
            *(f"embed.{name}" for name in claims.Embed.model_fields),
        ]
    ),
    value=_VALUE.filter(lambda value: _has_json(value)),
)
def test_no_claim_that_a_genuine_signer_may_make_raises(desk: Desk, path: str, value: Any) -> None:
    fields = _changed(_GENUINE.setdefault(id(desk.service), desk.claims()), path, value)
    channel = Channel()
    admitted = desk.service.gate.receive(delivered(desk.sign(fields), channel, content_type=envelope.CONTENT_TYPE))
    if admitted is None:
        assert channel.fate == ["acknowledged"]
        (record,) = desk.service.quarantined()
        assert record["code"] != "gate.failed"
    else:
        assert channel.fate == []


_GENUINE: dict[int, dict[str, Any]] = {}


def _has_json(value: Any) -> bool:
    try:
        codec.encode(value)
    except Exception:
        return False
    return True


def test_the_genuine_message_after_all_that_still_runs(desk: Desk) -> None:
    assert desk.run(desk.capture(7).body)["args"] == [7]
