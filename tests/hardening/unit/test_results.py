"""Results: whoever can write to the backend can make nobody believe anything."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, states
from celery.result import AsyncResult, GroupResult
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.exceptions import EncodeError

from ...project import codec, envelope, errors, ownership, results
from ...service import Party, Service
from . import certificates, documents

RESULT = envelope.Type.RESULT
PREFIX = documents.checksum.name.rpartition(".documents.")[0]
ECHO, FAIL = f"{PREFIX}.echo", f"{PREFIX}.fail"
SECRET = "swordfish"


class OutOfStock(Exception):
    """A failure of the application's own."""


class Store:
    """A service, and the hands of someone who can write to its result backend."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.beat = service.party("beat")

        @service.worker.app.task(name=ECHO, shared=False, ignore_result=False)
        def echo(value: Any) -> Any:
            return value

        @service.worker.app.task(name=FAIL, shared=False, ignore_result=False)
        def fail(kind: str) -> None:
            raise {"own": OutOfStock("a", 1), "built-in": ValueError("b"), "odd": OSError(object())}[kind]

    def send(self, name: str = ECHO, *args: Any, party: Party | None = None, **options: Any) -> AsyncResult:
        """Send a task as a caller does."""
        app = (party or self.service.client).app
        return app.send_task(name, args or ("v",), **{"ignore_result": False, **options})

    def run(self, name: str = ECHO, *args: Any, party: Party | None = None, **options: Any) -> AsyncResult:
        """Send a task and let the worker run it."""
        result = self.send(name, *args, party=party, **options)
        assert self.service.work() == 1
        return result

    def read(self, result: AsyncResult) -> bytes:
        """Read a stored value as it is."""
        backend = result.app.backend
        value: bytes = backend.get(backend.get_key_for_task(result.id))
        return value

    def write(self, result: AsyncResult, value: Any) -> None:
        """Write any value where this result is stored."""
        backend = result.app.backend
        backend.set(backend.get_key_for_task(result.id), value)

    def forge(self, result: AsyncResult, signer: envelope.Signer, **changes: Any) -> bytes:
        """Return a value for this result, signed by anyone."""
        value = {"status": "SUCCESS", "result": "forged", "task_id": result.id, "traceback": None, "children": []}
        claims = {
            "iss": str(signer.identity),
            "aud": str(self.service.client.identity.audience),
            "iat": int(time.time()),
            "owner": str(self.service.client.identity),
            "kind": "result",
            "of": result.id,
            "value": value,
        }
        return signer.sign(RESULT, codec.encode(claims | changes))


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(Service(tmp_path_factory.mktemp("results")))


@pytest.fixture
def store(one_store: Store) -> Iterator[Store]:
    yield one_store
    left = [*one_store.service.deliveries(), *one_store.service.quarantined()]
    assert left == []


def _issued(store: Store, role: str, start: int = -120, end: int = 86_400, environment: str = "development") -> Any:
    authority = store.service.pki.signing
    own = store.service.client.identity
    uri = f"spiffe://{own.trust_domain}/{environment}/{own.application}/{role}"
    valid = tuple(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds) for seconds in (start, end))
    return certificates.signing(uri, certificates.Pair(authority.key, (authority.root,)), valid=valid).signer


def _refused(leaf: type[errors.MessageRefused], result: AsyncResult) -> None:
    with pytest.raises(errors.MessageRefused) as caught:
        result.get(timeout=1)
    assert type(caught.value) is leaf


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


# --- forged -----------------------------------------------------------------------------------------------------------

META = {"status": "SUCCESS", "result": "forged", "traceback": None, "children": []}


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


# --- chord parts and groups -------------------------------------------------------------------------------------------


def _signed(store: Store, data: Any) -> bytes:
    """Return a genuine value for the client, of any kind that the worker may sign."""
    request = type("Request", (), {"owner": str(store.service.client.identity), "origin": ""})
    with ownership.acting_for(request):
        value: bytes = store.service.worker.app.backend.encode(data)
    return value


def _part(store: Store, task_id: str) -> bytes:
    return _signed(store, [1, task_id, states.SUCCESS, "part"])


def _group(store: Store, group_id: str) -> bytes:
    return _signed(store, {"result": [[group_id, None], []]})


def test_a_genuine_value_of_another_kind_is_no_result(store: Store) -> None:
    result = store.run()
    for value in (_part(store, result.id), _group(store, result.id)):
        store.write(result, value)
        _refused(errors.ForeignResult, result)


def _write_group(store: Store, group_id: str, value: bytes) -> None:
    backend = store.service.client.app.backend
    backend.set(backend.get_key_for_group(group_id), value)


def _saved(store: Store, app: Celery | None = None) -> GroupResult:
    app = app or store.service.client.app
    group = GroupResult("group-1", [AsyncResult("a", app=app), AsyncResult("b", app=app)], app=app)
    group.save(backend=app.backend)
    return group


def _restore(store: Store, group_id: str, app: Celery | None = None) -> Any:
    app = app or store.service.client.app
    app.backend._cache.pop(group_id, None)
    return GroupResult.restore(group_id, backend=app.backend, app=app)


def test_a_group_comes_back_to_who_saved_it(store: Store) -> None:
    group = _saved(store)
    assert _restore(store, "group-1") == group
    assert _restore(store, "never saved") is None
    assert _restore(store, "group-1", store.beat.app) is None


def test_another_group_under_this_id_is_refused(store: Store) -> None:
    backend = store.service.client.app.backend
    _saved(store)
    _write_group(store, "group-2", backend.get(backend.get_key_for_group("group-1")))
    with pytest.raises(errors.ForeignResult):
        _restore(store, "group-2")


def test_a_group_that_another_caller_saved_is_refused(store: Store) -> None:
    _saved(store, store.beat.app)
    beat = store.beat.app.backend
    _write_group(store, "group-1", beat.get(beat.get_key_for_group("group-1")))
    with pytest.raises(errors.ForeignResult):
        _restore(store, "group-1")


def test_what_is_no_group_is_refused_in_its_place(store: Store) -> None:
    result = store.run()
    for value in (store.read(result), _part(store, "group-1")):
        _write_group(store, "group-1", value)
        with pytest.raises(errors.ForeignResult):
            _restore(store, "group-1")
    _write_group(store, "group-1", b'{"result": [["group-1", null], []]}')
    with pytest.raises(errors.Unsigned):
        _restore(store, "group-1")


def test_a_group_of_results_is_joined_and_each_is_verified(store: Store) -> None:
    app = store.service.client.app
    each = [store.run(ECHO, number) for number in range(3)]
    assert GroupResult("g", each, app=app).join_native(timeout=1) == [0, 1, 2]
    fresh = [AsyncResult(result.id, app=app) for result in each]
    for result in fresh:
        app.backend._cache.pop(result.id, None)
    store.write(each[1], store.read(each[2]))
    with pytest.raises(errors.ForeignResult):
        GroupResult("g", fresh, app=app).join_native(timeout=1)


# --- who signs what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["client", "beat", "operator", "monitor"])
def test_only_a_worker_signs_results(store: Store, role: str) -> None:
    backend = store.service.party(role).app.backend
    for data in ({"status": "SUCCESS", "task_id": "1"}, [1, "1", "SUCCESS", None]):
        with pytest.raises(PermissionError):
            backend.encode(data)
    with pytest.raises(PermissionError):
        backend.store_result("1", "forged", states.SUCCESS)
    backend.encode({"result": [["group", None], []]})


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("SUCCESS"),
    lambda v: (
        st.lists(v, max_size=5)
        | st.dictionaries(st.sampled_from(["status", "task_id", "result", "iss", "task", "args", "a"]), v, max_size=5)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ANYTHING)
def test_the_encoder_signs_results_parts_and_groups_alone(store: Store, data: Any) -> None:
    """A worker must not be made to sign what could pass for something else (F26)."""
    match data:
        case {"status": str(), "task_id": str()} | [_, str(), str(), _] | {"result": [[str(), _], [*_]]}:
            pass
        case _:
            with pytest.raises(PermissionError):
                store.service.worker.app.backend.encode(data)
            return
    if isinstance(data, dict) and "status" not in data and len(data) > 1:
        return
    value = store.service.worker.app.backend.encode(data)
    for other in (envelope.Type.TASK, envelope.Type.QUARANTINE):
        with pytest.raises(errors.WrongType):
            store.service.client.app.hardening.verifier.verify(other, value)


def test_what_a_worker_signs_as_a_result_is_no_task(store: Store) -> None:
    claims = {"task": {"name": ECHO, "id": "1"}, "args": [], "kwargs": {}, "embed": {}}
    value = _signed(store, {"status": "SUCCESS", "task_id": "1", "result": claims, **claims})
    store.service.publish(value)
    assert store.service.work() == 0
    assert [record["code"] for record in store.service.quarantined()] == ["message.type"]


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


def test_a_pools_child_hands_its_parent_an_exception_and_no_stored_form(store: Store) -> None:
    """Celery asks for ``pickle`` where it reports its own failures; it needs an exception there."""
    handed = store.service.worker.app.backend.prepare_exception(ValueError("x"), "pickle")
    assert isinstance(handed, ValueError)


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
