"""The replay guard: of all copies of a message one runs, what was not run runs, and nothing is lost in between."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated
from celery.worker import state

from ...project import codec, envelope, errors, hardening, replay
from ...service import Service
from . import documents
from .desk import delivered
from .hardened import _settings
from .workers import Store, Worker

REPLAYED = "message.replayed"
AGAIN = {"redelivered": True}
#: Redis cannot say whether it has delivered a message before.
UNKNOWN: dict[str, Any] = {}


@pytest.fixture
def store(service: Service) -> Store:
    store = Store()
    vars(service.worker.app.hardening)["replay_store"] = store
    return store


@pytest.fixture
def one(service: Service, store: Store) -> Worker:
    return Worker(service)


@pytest.fixture
def two(service: Service, store: Store) -> Worker:
    return Worker(service)


@pytest.fixture
def body(service: Service) -> bytes:
    """A genuine message, captured."""
    service.client.app.send_task(documents.checksum.name, ("x",), task_id="victim", ignore_result=False)
    (message,) = service.deliveries()
    message.ack()
    return bytes(message.body)


def refused(service: Service) -> list[str]:
    return [record["code"] for record in service.quarantined()]


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_of_what_another_worker_runs_is_refused(service: Service, one: Worker, two: Worker, body: bytes) -> None:
    assert one.gets(body) == []
    assert two.gets(body) == ["acknowledged"]
    assert one.gets(body) == ["acknowledged"]
    assert (len(one.taken), len(two.taken)) == (1, 0)
    assert refused(service) == [REPLAYED, REPLAYED]


@pytest.mark.parametrize("delivery_info", [None, AGAIN, UNKNOWN])
def test_a_copy_of_what_ran_is_refused(
    service: Service, one: Worker, two: Worker, body: bytes, delivery_info: Any
) -> None:
    fate = one.gets(body)
    one.request().execute()
    assert fate == ["acknowledged"]
    one.dies()
    assert two.gets(body, delivery_info) == ["acknowledged"]
    assert two.taken == []
    assert refused(service) == [REPLAYED]


def test_the_caller_hears_nothing_of_copies(
    service: Service, one: Worker, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    one.gets(body)
    one.gets(body)
    assert service.client.app.AsyncResult("victim").state == "PENDING"
    one.request().execute()
    one.gets(body)
    assert len(service.client.app.AsyncResult("victim").get(timeout=1)) == 64
    (event, _) = (record.audit for record in caplog.records if record.audit["event"] == "message.refused")
    assert (event["code"], event["id"], event["signer"]) == (REPLAYED, "victim", str(service.client.identity))


def test_the_same_id_of_two_signers_is_two_messages(service: Service, one: Worker, body: bytes) -> None:
    verifier = service.worker.app.hardening.verifier
    fields = codec.decode(verifier.verify(envelope.Type.TASK, body).payload)
    other = service.party("operator")
    fields |= dict.fromkeys(("iss", "origin", "owner"), str(other.identity))
    one.gets(body)
    claims = SimpleNamespace(iss=fields["iss"], jti=fields["jti"], exp=fields["exp"])
    assert one.gate.guard.claim(delivered(body), claims) is not None


def test_what_several_shall_run_is_claimed_by_each(one: Worker, two: Worker) -> None:
    claims = SimpleNamespace(iss="spiffe://a", jti="1", exp=int(time.time()) + 60)
    for worker, scope in ((one, "first"), (two, "second")):
        assert worker.gate.guard.claim(delivered(b""), claims, scope) is not None
        with pytest.raises(errors.Replayed):
            worker.gate.guard.claim(delivered(b"", delivery_info={"redelivered": False}), claims, scope)


# --- what comes again because it has not run --------------------------------------------------------------------------


@pytest.mark.parametrize("delivery_info", [AGAIN, UNKNOWN])
def test_what_a_killed_worker_held_runs_when_its_lease_has_ended(
    service: Service, one: Worker, two: Worker, body: bytes, delivery_info: Any
) -> None:
    one.gets(body)
    assert two.gets(body, delivery_info) == []
    two.look()
    assert two.taken == []
    one.dies()
    two.look()
    assert len(two.taken) == 1
    assert refused(service) == []


@pytest.mark.parametrize("delivery_info", [AGAIN, UNKNOWN])
def test_what_was_kept_aside_is_refused_when_it_has_run_elsewhere(
    service: Service, one: Worker, two: Worker, body: bytes, delivery_info: Any
) -> None:
    one.gets(body)
    fate = two.gets(body, delivery_info)
    assert two.gets(body, delivery_info) == ["acknowledged"]  # one copy is enough
    one.request().execute()
    assert fate == []
    two.look()
    assert (fate, two.taken) == (["acknowledged"], [])
    assert refused(service) == [REPLAYED, REPLAYED]


def test_of_two_redelivered_copies_one_runs(service: Service, one: Worker, two: Worker, body: bytes) -> None:
    killed = Worker(service)
    killed.gets(body)
    one.gets(body, AGAIN)
    two.gets(body, AGAIN)
    killed.dies()
    for worker in (one, two, one, two):
        worker.look()
    assert (len(one.taken), len(two.taken)) == (1, 0)
    one.dies()
    two.look()
    assert len(two.taken) == 1


def test_what_is_kept_aside_does_not_keep_others_waiting(one: Worker, two: Worker, body: bytes) -> None:
    one.gets(body)
    two.gets(body, UNKNOWN)
    assert two.qos.value == 1
    two.look()
    assert two.qos.value == 1
    one.dies()
    two.look()
    assert two.qos.value == 0


def test_a_message_that_is_put_back_may_be_claimed_again(
    service: Service, one: Worker, two: Worker, body: bytes
) -> None:
    fate = one.gets(body)
    one.request().reject(requeue=True)
    assert fate == ["requeued"]
    two.gets(body, AGAIN)
    assert len(two.taken) == 1
    assert refused(service) == []


def test_a_message_that_goes_to_the_dead_letters_may_not(one: Worker, two: Worker, body: bytes) -> None:
    fate = one.gets(body)
    one.request().reject(requeue=False)
    assert fate == ["rejected"]
    one.dies()
    assert two.gets(body) == ["acknowledged"]
    assert two.taken == []


def test_a_message_on_which_celery_failed_may_not(service: Service, one: Worker, two: Worker, body: bytes) -> None:
    one.gets(body)
    one.gate.give_up(delivered(body), one.taken[0], KeyError())
    one.dies()
    assert two.gets(body) == ["acknowledged"]
    assert refused(service) == ["message.failed", REPLAYED]


def test_a_task_cancelled_with_its_connection_may_run_again(one: Worker, two: Worker, body: bytes) -> None:
    fate = one.gets(body)
    request = one.request()
    request._already_cancelled = True
    two.gets(body, AGAIN)
    try:
        raise Terminated(15)
    except Terminated:
        request.on_failure(ExceptionInfo())
    two.look()
    assert (fate, len(two.taken)) == ([], 1)


def test_a_new_connection_frees_what_did_not_start_and_keeps_what_runs(
    service: Service, one: Worker, two: Worker, body: bytes
) -> None:
    service.client.app.send_task(documents.checksum.name, ("y",))
    (waiting,) = service.deliveries()
    waiting.ack()
    one.gets(body)
    one.gets(waiting.body)
    runs, _ = one.taken
    one.gate.guard.connected(one.qos, {runs.claim})
    two.gets(body, AGAIN)
    two.gets(waiting.body, AGAIN)
    assert [admitted.claims.args for admitted in two.taken] == [["y"]]
    runs.ack_log_error(None, ())
    two.look()
    assert len(two.taken) == 1


def test_what_was_kept_aside_goes_with_the_connection_it_came_on(one: Worker, two: Worker, body: bytes) -> None:
    one.gets(body)
    two.gets(body, AGAIN)
    two.gate.guard.connected(two.qos, set())
    one.dies()
    two.look()
    assert two.taken == []
    two.gets(body, AGAIN)  # as the broker does
    assert len(two.taken) == 1


# --- before it starts -------------------------------------------------------------------------------------------------


def test_a_task_starts_without_asking_while_the_lease_holds(one: Worker, store: Store, body: bytes) -> None:
    one.gets(body)
    store.away = True
    assert not one.request().revoked()


def test_a_task_that_waited_longer_than_the_lease_starts_only_if_nobody_has_it(
    service: Service, one: Worker, two: Worker, body: bytes
) -> None:
    fate = one.gets(body)
    one.dies()  # it stood still
    one.gate.guard.renewed -= replay.LEASE
    two.gets(body, AGAIN)
    request = one.request()
    state.task_reserved(request)
    assert request.revoked()
    assert request not in state.reserved_requests
    assert fate == []
    two.request().execute()
    one.look()
    assert fate == ["acknowledged"]
    assert refused(service) == [REPLAYED]


def test_a_task_that_waited_longer_than_the_lease_starts_if_nobody_took_it(
    one: Worker, two: Worker, body: bytes
) -> None:
    one.gets(body)
    one.dies()
    one.gate.guard.renewed -= replay.LEASE
    assert not one.request().revoked()
    assert two.gets(body) == ["acknowledged"]


def test_a_lease_that_lapsed_is_noticed_although_it_was_renewed(one: Worker, two: Worker, body: bytes) -> None:
    one.gets(body)
    one.dies()
    two.gets(body, AGAIN)
    one.look()
    assert one.request().revoked()


def test_a_store_that_forgot_is_told_again_what_runs(one: Worker, two: Worker, store: Store, body: bytes) -> None:
    one.gets(body)
    store._values.clear()
    one.look()
    assert two.gets(body) == ["acknowledged"]
    assert not one.request().revoked()


# --- the store is away ------------------------------------------------------------------------------------------------


def test_without_the_store_messages_wait_and_the_broker_sends_no_more(
    service: Service, one: Worker, store: Store, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = True
    fate = one.gets(body)
    assert one.gets(body) == ["acknowledged"]
    one.look()
    assert (fate, one.taken, one.qos.value) == ([], [], 0)
    store.away = False
    one.look()
    assert (fate, len(one.taken)) == ([], 1)
    assert refused(service) == [REPLAYED]
    events = [record.audit["event"] for record in caplog.records]
    assert [event for event in events if event.startswith("replay")] == ["replay.store-away", "replay.store-back"]


def test_what_waited_for_the_store_too_long_has_expired(
    service: Service, one: Worker, store: Store, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.away = True
    fate = one.gets(body)
    store.away = False
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
    one.look()
    assert (fate, one.taken) == (["acknowledged"], [])
    assert refused(service) == ["message.expired"]


def test_without_the_store_messages_run_where_that_is_accepted(tmp_path: Any) -> None:
    service = Service(tmp_path, replay_on_outage="accept")
    store = vars(service.worker.app.hardening)["replay_store"] = Store()
    one, two = Worker(service), Worker(service)
    service.client.app.send_task(documents.checksum.name, ("x",))
    (message,) = service.deliveries()
    message.ack()
    two.gets(message.body)
    one.gets(message.body, AGAIN)
    store.away = True
    one.look()
    assert one.taken == []  # what another one is known to run stays aside
    two.taken.pop().reject_log_error(None, (), requeue=True)
    store.away = False
    one.look()
    store.away = True
    one.request().execute()
    assert one.gets(message.body) == []  # nobody can say
    store.away = False
    assert two.gets(message.body) == ["acknowledged"]  # it was said afterwards
    assert (len(one.taken), len(two.taken)) == (2, 0)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_message_is_remembered_for_as_long_as_any_gate_would_take_it(
    service: Service, one: Worker, store: Store, body: bytes
) -> None:
    settings = service.worker.app.hardening.settings
    least = settings.message_max_age + replay.late(settings) + 2 * settings.clock_skew
    one.gets(body)
    assert least < store.lasts() < least + 90
    one.request().execute()
    assert least < store.lasts() < least + 90


@pytest.mark.parametrize("name", ["replay_store", "replay_store_password_file"])
def test_a_worker_needs_a_store_and_a_caller_does_not(service: Service, name: str) -> None:
    application = service.worker.app.hardening.topology.application
    for role in ("client", "worker"):
        settings = _settings(service.pki, application, role).model_copy(update={name: None})
        app = type(service.worker.app)(role, set_as_current=False)
        if role == "client":
            hardening.harden(app, settings)
            continue
        with pytest.raises(errors.ConfigurationRefused, match="SECURE_CELERY_REPLAY_STORE: it or its password"):
            hardening.harden(app, settings)
