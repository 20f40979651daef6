"""Results: whoever can write to the backend can make nobody believe anything."""

from __future__ import annotations

import json
import logging
import pickle
from typing import Any

import pytest
from celery.result import AsyncResult
from kombu.exceptions import EncodeError

from ...project import codec, envelope, errors, results
from . import certificates
from .store import ECHO, META, PREFIX, RESULT, Store, _group, _issued, _part, _refused

FAIL = f"{PREFIX}.fail"
SECRET = "swordfish"


class OutOfStock(Exception):
    """A failure of the application's own."""


@pytest.fixture(scope="module")
def one_store(one_store: Store) -> Store:
    """Give the worker a task that fails, too."""

    @one_store.service.worker.app.task(name=FAIL, shared=False, ignore_result=False)
    def fail(kind: str) -> None:
        raise {"own": OutOfStock("a", 1), "built-in": ValueError("b"), "odd": OSError(object())}[kind]

    return one_store


# --- genuine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "x", [1, {"a": [None]}], {"status": "x", "task_id": "y"}, {"result": []}])
def test_a_result_comes_back_as_it_was(store: Store, value: object) -> None:
    assert store.run(ECHO, value).get(timeout=1) == value


def test_what_is_stored_is_an_envelope_of_the_worker(store: Store) -> None:
    result = store.run()
    verified = store.service.client.app.hardening.verifier.verify(RESULT, store.read(result))
    assert verified.signer.identity == store.service.worker.identity
    claims = codec.decode(verified.payload)
    assert (claims["kind"], claims["of"], claims["owner"]) == ("result", result.id, str(store.service.client.identity))


@pytest.mark.parametrize(
    ("kind", "type_", "args"), [("own", OutOfStock, ("a", 1)), ("built-in", ValueError, ("b",)), ("odd", OSError, None)]
)
def test_an_exception_comes_back_as_itself(store: Store, kind: str, type_: type[Exception], args: Any) -> None:
    result = store.run(FAIL, kind)
    with pytest.raises(type_) as caught:
        result.get(timeout=1)
    assert type(caught.value) is type_
    assert args is None or caught.value.args == args


def test_a_result_that_no_reader_would_take_fails_the_task(store: Store) -> None:
    limit = store.service.worker.app.hardening.settings.message_max_bytes
    with pytest.raises(EncodeError, match="larger than message_max_bytes"):
        store.service.worker.app.backend.encode({"status": "SUCCESS", "task_id": "1", "result": "x" * limit})


def test_a_result_without_a_json_form_fails_the_task(store: Store) -> None:
    with pytest.raises(EncodeError):
        store.service.worker.app.backend.encode({"status": "SUCCESS", "task_id": "1", "result": object()})


def test_an_exceptions_form_is_made_without_signing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_key(*_: Any) -> bytes:
        raise AssertionError

    monkeypatch.setattr(envelope.Signer, "sign", no_key)
    backend = store.service.worker.app.backend
    assert backend.prepare_exception(OutOfStock("a", 1)) == {
        "exc_type": "OutOfStock",
        "exc_message": ("a", 1),
        "exc_module": __name__,
    }


# --- forged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(json.dumps(META).encode(), id="JSON"),
        pytest.param(json.dumps(META), id="JSON text"),
        pytest.param(pickle.dumps(META), id="pickle"),
        pytest.param(b"status: SUCCESS\nresult: forged\n", id="YAML"),
        pytest.param(b"\x81\xa6status\xa7SUCCESS", id="msgpack"),
        pytest.param(b"x\x9c", id="compressed"),
        pytest.param(bytearray(b"a.b"), id="bytearray"),
        pytest.param(memoryview(b"a.b"), id="memoryview"),
    ],
)
def test_an_unsigned_value_is_refused_in_any_format(store: Store, value: Any) -> None:
    result = store.run()
    store.write(result, value)
    _refused(errors.Unsigned, result)


def test_every_flipped_character_is_refused(store: Store) -> None:
    result = store.run()
    genuine = store.read(result)
    for position in range(0, len(genuine), 97):
        store.write(result, genuine[:position] + bytes([genuine[position] ^ 1]) + genuine[position + 1 :])
        with pytest.raises(errors.MessageRefused):
            AsyncResult(result.id, app=store.service.client.app).get(timeout=1)


def test_a_genuine_task_message_is_no_result(store: Store) -> None:
    result = store.send()
    (message,) = store.service.deliveries()
    message.ack()
    store.write(result, message.body)
    _refused(errors.WrongType, result)


@pytest.mark.parametrize("role", ["client", "beat", "operator", "monitor"])
def test_a_result_that_no_worker_signed_is_refused(store: Store, role: str) -> None:
    result = store.run()
    signer = _issued(store, role)
    store.write(result, store.forge(result, signer))
    _refused(errors.ForeignResult, result)
    store.write(result, store.forge(result, signer, owner=str(signer.identity)))
    _refused(errors.ForeignResult, result)


def test_a_self_made_workers_result_is_refused(store: Store) -> None:
    result = store.run()
    pair = certificates.signing(str(store.service.worker.identity), certificates.authority())
    store.write(result, store.forge(result, pair.signer))
    _refused(errors.UntrustedSigner, result)


def test_another_environments_workers_result_is_refused(store: Store) -> None:
    result = store.run()
    production = _issued(store, "worker", environment="production")
    for aud in (str(production.identity.audience), str(store.service.client.identity.audience)):
        store.write(result, store.forge(result, production, aud=aud))
        _refused(errors.WrongAudience, result)
    own = store.service.worker.signer
    store.write(result, store.forge(result, own, aud=str(production.identity.audience)))
    _refused(errors.WrongAudience, result)


@pytest.mark.parametrize("window", [(-200, -100), (3600, 7200)], ids=["expired", "not yet valid"])
def test_a_result_signed_outside_the_certificates_validity_is_refused(store: Store, window: tuple[int, int]) -> None:
    """A stolen key must not be worth anything after its certificate has ended."""
    result = store.run()
    store.write(result, store.forge(result, _issued(store, "worker", *window)))
    _refused(errors.NotValidAtIssue, result)


@pytest.mark.parametrize("iat", [None, "now", 1.5, [], 2**70, -1])
def test_a_result_without_a_time_is_refused(store: Store, iat: object) -> None:
    result = store.run()
    store.write(result, store.forge(result, store.service.worker.signer, iat=iat))
    _refused(errors.NotValidAtIssue, result)


def test_anothers_result_under_my_id_is_refused(store: Store) -> None:
    mine, other = store.run(ECHO, "mine"), store.run(ECHO, "other")
    store.write(mine, store.read(other))
    _refused(errors.ForeignResult, mine)
    assert other.get(timeout=1) == "other"


def test_another_callers_result_is_refused_also_under_the_same_id(store: Store) -> None:
    mine = store.run(ECHO, "mine")
    theirs = store.run(ECHO, "theirs", party=store.beat, task_id=mine.id)
    assert theirs.get(timeout=1) == "theirs"
    store.write(mine, store.read(theirs))
    _refused(errors.ForeignResult, mine)


def test_the_same_id_of_two_callers_is_two_results(store: Store) -> None:
    mine = store.send(ECHO, "mine", task_id="shared")
    theirs = store.send(ECHO, "theirs", task_id="shared", party=store.beat)
    assert store.service.work() == 2
    assert (mine.get(timeout=1), theirs.get(timeout=1)) == ("mine", "theirs")


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "spiffe://x.test/development/x/worker"},
        {"kind": "group"},
        {"kind": "part"},
        {"of": "other"},
        {"kind": ["result"]},
        {"value": None},
        {"value": {"status": "SUCCESS"}},
        {"value": {"status": 1, "task_id": "x"}},
        {"extra": 1},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_a_worker_cannot_sign_claims_that_do_not_fit_their_value(store: Store, changes: dict[str, Any]) -> None:
    result = store.run()
    store.write(result, store.forge(result, store.service.worker.signer, **changes))
    _refused(errors.BadShape, result)


@pytest.mark.parametrize("payload", [b"[]", b"1", b"null", b"x", b"\xff", b"{}", b'"text"'])
def test_a_signed_value_of_any_other_shape_is_refused(store: Store, payload: bytes) -> None:
    result = store.run()
    store.write(result, store.service.worker.signer.sign(RESULT, payload))
    _refused(errors.BadShape, result)


def test_a_forged_value_does_not_keep_the_worker_from_storing_the_genuine_one(store: Store) -> None:
    other = store.run(ECHO, "other")
    for value in (json.dumps(META).encode(), store.read(other), _part(store, "1"), _group(store, "1")):
        result = store.send(ECHO, "genuine")
        store.write(result, value)
        assert store.service.work() == 1
        assert result.get(timeout=1) == "genuine"


def test_a_refused_result_is_one_event_without_its_content(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    result, other = store.run(ECHO, "v"), store.run(ECHO, SECRET)
    with caplog.at_level(logging.DEBUG):
        store.write(result, json.dumps({**META, "result": SECRET}).encode())
        _refused(errors.Unsigned, result)
        store.write(result, store.read(other))
        _refused(errors.ForeignResult, result)
    assert SECRET not in caplog.text
    codes = [record.audit["code"] for record in caplog.records if record.name == "secure_celery.audit"]
    assert codes == ["message.unsigned", "result.foreign"]


# --- waiting on a channel ---------------------------------------------------------------------------------------------


def _told(backend: results.SignedRedisBackend, result: AsyncResult, published: bytes) -> dict[str, Any]:
    """What one who waits on a channel is told of a message there; nothing if it is ignored."""
    waiting, metas = backend.result_consumer, [{}]
    waiting.on_message = metas.append
    waiting.on_state_change(waiting._decode_result(published), {"channel": backend.get_key_for_task(result.id)})
    return metas[-1]


def test_of_what_is_refused_on_a_channel_the_stored_value_says_what_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = results.SignedRedisBackend(app=store.service.client.app, url="rediss://localhost:1/0")
    stored = store.service.client.app.backend
    monkeypatch.setattr(backend, "get", stored.get)
    mine = store.run(ECHO, "mine")
    key, genuine = backend.get_key_for_task(mine.id), store.read(mine)
    assert _told(backend, mine, genuine)["result"] == "mine"
    assert _told(backend, mine, b"forged")["result"] == "mine"
    stored.set(key, store.forge(mine, _issued(store, "client")))
    refused = _told(backend, mine, b"forged")
    assert (refused["task_id"], refused["status"]) == (mine.id, "FAILURE")
    assert type(refused["result"]) is errors.ForeignResult
    stored.delete(key)
    assert _told(backend, mine, b"forged") == {}


def test_what_is_forged_on_a_channel_is_ignored_and_the_genuine_one_still_comes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = results.SignedRedisBackend(app=store.service.client.app, url="rediss://localhost:1/0")
    waiting = backend.result_consumer
    monkeypatch.setattr(backend, "get", store.service.client.app.backend.get)
    mine, theirs = store.run(ECHO, "mine"), store.run(ECHO, "theirs", party=store.beat)
    genuine = store.read(mine)
    for forged in (
        b"x",
        json.dumps({**META, "task_id": mine.id}).encode(),
        genuine[:-1],
        store.forge(mine, _issued(store, "client")),
        store.read(theirs),
        _part(store, mine.id),
        _group(store, mine.id),
    ):
        meta = waiting._decode_result(forged)
        assert (meta["status"], meta["task_id"]) == ("PENDING", None)
        waiting.on_state_change(meta, None)
    assert waiting._decode_result(genuine)["result"] == "mine"
