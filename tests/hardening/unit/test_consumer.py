"""The consumer: every message passes the gate, nothing after it raises, and no unsafe worker starts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery._state import _set_task_join_will_block
from celery.concurrency import gevent, prefork, solo, thread
from celery.concurrency.base import BasePool
from celery.exceptions import TimeLimitExceeded
from celery.worker import WorkController
from celery.worker.consumer import Connection, Control, Events, Gossip, Heart, Mingle, Tasks
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from celery.worker.request import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.asynchronous.timer import Timer

from ...project import audit, claims, codec, consumer, envelope, errors
from ...service import Service
from . import documents
from .desk import Channel, delivered

NAME = documents.checksum.name


@pytest.fixture(autouse=True)
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root; what they test is that a worker may not."""
    monkeypatch.setattr(os, "getresuid", lambda: (1000, 1000, 1000), raising=False)


def _worker(service: Service, **options: Any) -> WorkController:
    worker = service.worker.app.WorkController(pool="solo", hostname="worker@test", **options)
    _set_task_join_will_block(False)  # what its pool has set for the whole process
    return worker


class Bench:
    """A real worker's consumer, up to the point where it would hand a request to its pool."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.consumer = _worker(service).consumer
        self.requests: list[Request] = []
        self.consumer.timer = Timer()
        self.consumer.qos = SimpleNamespace(increment_eventually=lambda: None)
        self.consumer.on_task_request = self.requests.append
        self.consumer.update_strategies()
        self.handle = self.consumer.create_task_handler()
        service.client.app.send_task(NAME, ("x",), ignore_result=False)
        (message,) = service.deliveries()
        message.ack()
        verifier = service.worker.app.hardening.verifier
        self.claims = codec.decode(verifier.verify(envelope.Type.TASK, message.body).payload)

    def sign(self, **changes: Any) -> bytes:
        """Return genuine claims, changed, under a genuine client's signature; ``task__id`` is the task's ``id``."""
        fields = {**copy.deepcopy(self.claims), "jti": claims.new_id()}
        for name, value in changes.items():
            parent, _, child = name.rpartition("__")
            (fields[parent] if parent else fields)[child] = value
        return self.service.client.signer.sign(envelope.Type.TASK, codec.encode(fields))

    def receive(self, body: Any, content_type: str = envelope.CONTENT_TYPE) -> list[str]:
        """Give one message to the worker; return what became of it."""
        channel = Channel()
        self.handle(delivered(body, channel, content_type=content_type))
        return channel.fate


@pytest.fixture(scope="module")
def one_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getresuid", lambda: (1000, 1000, 1000), raising=False)
        return Bench(Service(tmp_path_factory.mktemp("consumer")))


@pytest.fixture
def bench(one_bench: Bench) -> Iterator[Bench]:
    yield one_bench
    one_bench.requests.clear()
    one_bench.service.quarantined()


def test_a_genuine_message_becomes_a_request_of_ours(bench: Bench) -> None:
    assert bench.receive(bench.sign()) == []
    (request,) = bench.requests
    assert isinstance(request, consumer.HardenedRequest)
    assert (request.name, request.args, request.argsrepr) == (NAME, ["x"], "(hidden)")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"[[],{},{}]", "application/json"), (b"", "application/text"), (None, ""), (b"x", envelope.CONTENT_TYPE)],
)
def test_a_refused_message_never_reaches_celery(bench: Bench, body: Any, content_type: str) -> None:
    assert bench.receive(body, content_type) == ["acknowledged"]
    assert bench.requests == []
    assert [record["code"] for record in bench.service.quarantined()] == ["message.unsigned"]
    bench.receive(bench.sign())
    assert len(bench.requests) == 1


_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.datetimes().map(lambda moment: moment.isoformat())
    | st.sampled_from(["0001-01-01", "9999-12-31T23:59:59.999999Z", "2000-01-01T00:00:00+23:59", NAME])
    | st.uuids(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
_SIGNATURE = st.fixed_dictionaries(
    {"task": st.sampled_from([NAME, "celery.map", "celery.chain", "celery.chord", "nope"])},
    optional={
        "args": _VALUE,
        "kwargs": _VALUE,
        "options": st.dictionaries(st.sampled_from(["task_id", "queue", "link", "chord", "headers", "eta"]), _VALUE),
        "subtask_type": st.none() | st.sampled_from(["chain", "group", "chord", "xmap"]),
        "immutable": st.booleans(),
    },
)
_PATH = st.sampled_from(
    [
        *("args", "kwargs", "exp", "origin", "owner"),
        *(f"task__{name}" for name in claims.Task.model_fields),
        *(f"embed__{name}" for name in claims.Embed.model_fields),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_PATH, _VALUE | _SIGNATURE | st.lists(_SIGNATURE, max_size=2), min_size=1, max_size=3))
def test_nothing_that_a_genuine_signer_may_sign_raises_in_the_consumer(bench: Bench, changes: Any) -> None:
    """What raises out of a message's callback ends the worker, and the message comes again."""
    bench.receive(bench.sign(**changes))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    embed=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(claims.Embed.model_fields, _SIGNATURE | st.lists(_SIGNATURE))
    ),
    group=st.none() | st.just("group"),
)
def test_no_canvas_of_an_expired_task_raises_in_the_consumer(bench: Bench, embed: Any, group: Any) -> None:
    """Its chord and its result are dealt with at once, in the main process."""
    past = "2000-01-01T00:00:00+00:00"
    bench.receive(bench.sign(task__expires=past, task__group=group, embed=embed))


def test_what_celery_fails_on_is_quarantined_and_its_caller_told(bench: Bench) -> None:
    past = "2000-01-01T00:00:00+00:00"
    chord = {"task": NAME, "args": 5, "kwargs": {}, "options": {"task_id": []}}
    fate = bench.receive(bench.sign(task__expires=past, task__group="group", embed__chord=chord, task__id="odd"))
    assert fate == ["acknowledged"]
    failing = bench.sign(task__id="failing")
    bench.consumer.on_task_request = _raise(KeyError("swordfish"))
    bench.consumer.update_strategies()
    try:
        assert bench.receive(failing) == ["acknowledged"]
        (record,) = [each for each in bench.service.quarantined() if each["code"] == "message.failed"]
        assert record["detail"] == "KeyError"
        with pytest.raises(errors.NotHandled):
            bench.service.client.app.AsyncResult("failing").get(timeout=1)
        bench.consumer.connection_errors = (ConnectionResetError,)  # as AMQP's are
        bench.consumer.on_task_request = _raise(ConnectionResetError())
        bench.consumer.update_strategies()
        with pytest.raises(ConnectionResetError):  # that is Celery's to deal with: it connects again
            bench.receive(bench.sign(task__id="again"))
    finally:
        bench.consumer.on_task_request = bench.requests.append
        bench.consumer.update_strategies()


def _raise(error: Exception) -> Any:
    def fail(_: Request) -> None:
        raise error

    return fail


_MOMENT = st.datetimes().map(lambda moment: moment.isoformat()) | st.from_regex(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])[T ][01][0-9]:[0-5][0-9](Z|[+-]1[0-4]:[0-5][0-9])?", fullmatch=True
)


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(eta=st.none() | _MOMENT, expires=st.none() | _MOMENT)
def test_no_signed_time_raises_in_the_consumer(bench: Bench, zone: str, eta: Any, expires: Any) -> None:
    bench.consumer.app.conf.timezone = zone
    try:
        bench.receive(bench.sign(task__eta=eta, task__expires=expires, exp=bench.claims["exp"]))
    finally:
        bench.consumer.app.conf.timezone = None


# --- what Celery does in the main process -----------------------------------------------------------------------------

_ERRBACK = {"task": NAME, "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}


def test_a_time_limit_with_an_errback_of_two_arguments_does_not_raise(bench: Bench) -> None:
    """Stock Celery runs such an errback in the main process (F23)."""
    bench.receive(bench.sign(embed__errbacks=[_ERRBACK], task__timelimit=[0.001, None]))
    (request,) = bench.requests
    request.on_timeout(soft=False, timeout=0.001)
    bench.service.work()
    result = bench.service.client.app.AsyncResult(request.id)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=1)


def test_a_task_that_found_no_memory_has_failed_and_its_worker_has_not(bench: Bench) -> None:
    """Stock Celery raises it again in the main process, which ends the worker, and the next that gets the message."""
    bench.receive(bench.sign())
    (request,) = bench.requests
    try:
        raise MemoryError
    except MemoryError:
        request.on_failure(ExceptionInfo(), return_ok=True)
    assert request.acknowledged


def test_an_expired_task_is_dropped_and_its_id_is_revoked_for_nobody(bench: Bench) -> None:
    past = "2000-01-01T00:00:00+00:00"
    assert bench.receive(bench.sign(task__expires=past, task__id="shared-id")) == ["acknowledged"]
    assert bench.requests == []
    bench.receive(bench.sign(task__id="shared-id"))
    assert len(bench.requests) == 1


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [False, True])
def test_workers_do_not_tell_each_other_what_to_do_whatever_the_command_line_says(
    service: Service, monkeypatch: pytest.MonkeyPatch, events: bool
) -> None:
    for step in (Gossip, Mingle):  # as with AMQP
        monkeypatch.setattr(step, "compatible_transport", lambda *_: True)
    options = {"without_gossip": False, "without_mingle": False, "without_heartbeat": False}
    made = _worker(service, task_events=events, **options).consumer
    enabled = {type(step) for step in made.steps if getattr(step, "enabled", True)}
    assert not enabled & {Gossip, Mingle}
    assert (Heart in enabled, Events in enabled) == (events, events)
    assert DelayedDelivery not in {type(step) for step in made.steps}
    assert not any("delayed" in step for step in consumer.HardenedConsumer.Blueprint.default_steps)
    assert {Connection, Tasks, Control} <= enabled


def test_a_request_is_described_without_its_arguments(bench: Bench) -> None:
    bench.receive(bench.sign(args=["swordfish"]))
    for safe in (True, False):
        assert "swordfish" not in str(bench.requests[0].info(safe=safe))


def test_the_application_names_our_consumer(bench: Bench) -> None:
    assert type(bench.consumer) is consumer.HardenedConsumer
    assert bench.service.worker.app.conf.worker_consumer is consumer.HardenedConsumer


# --- before it starts -------------------------------------------------------------------------------------------------


def _check(app: Any, pool: type = prefork.TaskPool) -> None:
    consumer.Preflight(SimpleNamespace(app=app, pool_cls=pool))


def _refused(service: Service, app: Any = None) -> errors.ConfigurationRefused:
    with pytest.raises(errors.ConfigurationRefused) as caught:
        _check(app or service.worker.app)
    return caught.value


@pytest.mark.parametrize("ids", [(0, 0, 0), (1000, 1000, 0), (0, 1000, 1000)], ids=["root", "saved", "real"])
def test_root_may_not_start_a_worker_nor_who_can_become_root(
    service: Service, monkeypatch: pytest.MonkeyPatch, ids: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(os, "getresuid", lambda: ids)
    assert _refused(service).code == "worker.root"
    with pytest.raises(errors.ConfigurationRefused):
        _worker(service)


@pytest.mark.parametrize("role", ["client", "operator", "monitor", "beat"])
def test_only_a_pools_certificate_starts_a_worker(service: Service, role: str) -> None:
    refusal = _refused(service, service.party(role).app)
    assert refusal.code == "worker.identity"
    assert role in str(refusal)


def test_a_worker_of_a_pool_that_the_topology_has_not_may_not_start(service: Service) -> None:
    assert _refused(service, service.party("worker/other").app).code == "worker.identity"


def test_root_may_not_where_the_system_tells_only_two_users(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getresuid")
    for real, effective in ((0, 1000), (1000, 0)):
        monkeypatch.setattr(os, "getuid", lambda real=real: real)
        monkeypatch.setattr(os, "geteuid", lambda effective=effective: effective)
        assert _refused(service).code == "worker.root"


def test_a_worker_whose_configuration_was_changed_may_not_start(service: Service) -> None:
    service.worker.app.conf.accept_content = ["pickle"]
    assert _refused(service).setting == "accept_content"


@pytest.mark.parametrize("pool", [gevent.TaskPool, BasePool])
def test_a_worker_of_an_unknown_kind_of_pool_may_not_start(service: Service, pool: type) -> None:
    with pytest.raises(errors.ConfigurationRefused, match=r"choose prefork, threads or solo \[worker\.pool\]"):
        _check(service.worker.app, pool)


@pytest.mark.parametrize("pool", [prefork.TaskPool, thread.TaskPool, solo.TaskPool])
def test_a_worker_of_a_known_kind_of_pool_may_start(service: Service, pool: type) -> None:
    _check(service.worker.app, pool)


def test_a_worker_that_may_start_says_so(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=audit.logger.name):
        _check(service.worker.app)
    assert [record.audit for record in caplog.records] == [
        {"event": "hardening.started", "signer": str(service.worker.identity)}
    ]


def test_a_worker_consumes_its_pools_queues_alone(service: Service) -> None:
    app = service.worker.app
    _check(app)
    assert set(app.amqp.queues.consume_from) == app.hardening.consumed
