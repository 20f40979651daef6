"""topology.toml is changed while a worker runs, and messages are counted: over a real gate and a real request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from ...project import audit, codec, consumer, envelope, errors, files, refused
from ...service import ROOT, Service
from . import documents
from .desk import Channel, delivered

TASK = documents.checksum.name
CLIENT = "[callers.client]"


class Shop:
    """A service whose topology can be changed, and what was said of that."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> None:
        self.file = folder / "topology.toml"
        self.text = (ROOT / "topology.toml").read_text(encoding="utf-8")
        self.file.write_text(self.text)
        self.service = Service(folder, self.file, **settings)
        self.parties = {"client": self.service.client}
        self._log = caplog

    def change(self, old: str, new: str) -> int:
        """Replace something in the file as it was at the start; return the number of the line."""
        assert old in self.text
        self.file.write_text(self.text.replace(old, new, 1))
        return self.text[: self.text.index(old)].count("\n") + 1

    def rate(self, rate: str, stanza: str = CLIENT) -> None:
        self.change(stanza, f'{stanza}\nrate = "{rate}"')

    def send(self, role: str = "client", **options: Any) -> Any:
        if role not in self.parties:
            self.parties[role] = self.service.party(role)
        return self.parties[role].app.tasks[TASK].apply_async(("x",), ignore_result=False, **options)

    def sent(self) -> bytes:
        """Send a task and take it from the queue."""
        self.send()
        (message,) = self.service.deliveries()
        message.ack()
        body = message.body
        return body if isinstance(body, bytes) else body.encode()

    def codes(self) -> list[str]:
        return [record["code"] for record in self.service.quarantined()]

    def events(self) -> list[dict[str, Any]]:
        """Return what was said of the policy since it was asked last."""
        found = [record.audit for record in self._log.records if hasattr(record, "audit")]
        self._log.clear()
        return [event for event in found if event["event"].startswith("policy.")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file at each use."""
    monkeypatch.setattr(files.Watched, "LOOK", 0.0)


@pytest.fixture
def shop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Shop:
    caplog.set_level(logging.INFO, logger=audit.logger.name)
    return Shop(tmp_path, caplog)


# --- the file changes -------------------------------------------------------------------------------------------------


def test_a_right_that_was_taken_away_is_gone_and_one_that_came_back_is_there(shop: Shop) -> None:
    shop.send()
    assert shop.service.work() == 1
    own = next(line for line in shop.text.partition(CLIENT)[2].splitlines() if line.startswith("sends"))
    shop.change(f'{CLIENT}\nqueues = ["default"]\n{own}', f'{CLIENT}\nqueues = ["default"]\nsends = ["other.task"]')
    result = shop.send()
    assert shop.service.work() == 0
    assert shop.codes() == ["policy.denied"]
    with pytest.raises(errors.NotAllowed):
        result.get(timeout=1)
    shop.file.write_text(shop.text)
    shop.send()
    assert shop.service.work() == 1
    assert [event["event"] for event in shop.events()] == 2 * ["policy.loaded"]


def test_a_caller_that_was_added_may_send_and_a_removed_one_may_not(shop: Shop) -> None:
    shop.send("client/web")
    assert shop.service.work() == 0
    stanza = shop.text.partition(CLIENT)[2].partition("\n[")[0]
    shop.file.write_text(f"{shop.text}\n[callers.web]{stanza}\n")
    shop.send("client/web")
    assert shop.service.work() == 1
    shop.file.write_text(shop.text)
    shop.send("client/web")
    assert shop.service.work() == 0
    assert shop.codes() == 2 * ["policy.denied"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (CLIENT, f"{CLIENT}\nallow_all = true", "has the unknown key 'allow_all'"),
        ('sends = ["', 'sends = ["*", "', "is not a task name, or starts with a wildcard"),
        (CLIENT, "[callers.client", "is not valid TOML"),
        ('application = "', 'application = "other-', "neither a part nor a caller"),
    ],
)
def test_a_wrong_file_leaves_in_force_what_was_and_is_told_once_with_its_line(
    shop: Shop, old: str, new: str, reason: str
) -> None:
    shop.send("client/web")
    assert (shop.service.work(), shop.codes()) == (0, ["policy.denied"])
    line = shop.change(old, new) + new.count("\n")
    for _ in range(3):
        shop.send()
        assert shop.service.work() == 1
    (event,) = shop.events()
    assert event["event"] == "policy.refused"
    assert reason in event["topology"]
    assert f"line {line}" in event["topology"] or "neither" in reason
    shop.file.unlink()
    shop.send("client/web")
    assert (shop.service.work(), shop.codes()) == (0, ["policy.denied"])
    assert "does not exist" in shop.events()[0]["topology"]
    shop.file.write_text(shop.text)
    shop.send()
    assert shop.service.work() == 1
    assert [event["event"] for event in shop.events()] == ["policy.loaded"]


def test_a_file_that_everybody_can_write_leaves_in_force_what_was(shop: Shop) -> None:
    shop.change(CLIENT, f'{CLIENT}\nrate = "1/h"')
    shop.file.chmod(0o666)
    for _ in range(2):
        shop.send()
    assert shop.service.work() == 2
    assert "every user of this host can replace" in shop.events()[0]["topology"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[queues.default]", "[queues.default]\ndelivery_limit = 9"),
        ('[pools.worker]\nqueues = ["default"]', '[queues.more]\n[pools.worker]\nqueues = ["default", "more"]'),
    ],
)
def test_what_waits_for_a_restart_is_said(shop: Shop, old: str, new: str) -> None:
    shop.change(old, new)
    shop.send()
    assert shop.service.work() == 1
    (event,) = shop.events()
    assert event["event"] == "policy.loaded"
    assert "until a restart" in event["topology"]
    assert shop.service.worker.app.hardening.consumed == {shop.service.rules.queues[0].broker_name}


def test_what_takes_force_at_once_is_said_without_that(shop: Shop) -> None:
    shop.rate("5/m")
    shop.send()
    assert shop.service.work() == 1
    assert shop.events() == [{"event": "policy.loaded"}]


def test_the_file_is_looked_at_once_in_a_while(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.Watched, "LOOK", 1000.0)
    assert shop.service.worker.app.hardening.policy  # one more look
    shop.rate("1/h")
    for _ in range(2):
        shop.send()
    assert shop.service.work() == 2
    later = time.monotonic() + 1001.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    for _ in range(2):
        shop.send()
    assert shop.service.work() == 1
    assert shop.codes() == ["policy.rate"]


def test_one_message_is_judged_by_one_policy(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, taken = shop.service.worker.app.hardening.rules, []
    policy = type(rules).policy
    monkeypatch.setattr(type(rules), "policy", property(lambda own: taken.append(1) or policy.fget(own)))
    signature = shop.service.client.app.tasks[TASK].s("x")
    (signature | signature | signature).apply_async()
    (message,) = shop.service.deliveries()
    shop.service.gate.admit(message)
    message.ack()
    assert len(taken) == 1


# --- too many messages ------------------------------------------------------------------------------------------------


def test_a_flood_is_refused_and_its_callers_are_told(shop: Shop) -> None:
    shop.rate("3/h")
    results = [shop.send() for _ in range(10)]
    shop.send("operator")
    assert shop.service.work() == 4
    assert shop.codes() == 7 * ["policy.rate"]
    for result in results[:3]:
        assert result.get(timeout=1)
    for result in results[3:]:
        with pytest.raises(errors.RateExceeded):
            result.get(timeout=1)


def test_a_changed_file_gives_no_new_messages(shop: Shop) -> None:
    shop.rate("2/h")
    for _ in range(3):
        shop.send()
    assert shop.service.work() == 2
    shop.file.write_text(shop.file.read_text() + "\n# changed\n")
    shop.send()
    assert shop.service.work() == 0
    assert shop.codes() == 2 * ["policy.rate"]


def test_copies_of_anothers_message_use_up_nothing(shop: Shop) -> None:
    shop.rate("2/h")
    body = shop.sent()
    for _ in range(10):
        shop.service.publish(body)
    assert shop.service.work() == 1
    assert shop.codes() == 9 * ["message.replayed"]
    shop.send()
    assert shop.service.work() == 1


def test_what_was_refused_for_its_signers_rate_has_not_run(shop: Shop) -> None:
    """It may be released, or sent by who has it, when there is room."""
    shop.rate("1/h")
    shop.send()
    assert shop.service.work() == 1
    body = shop.sent()
    shop.service.publish(body)
    assert (shop.service.work(), shop.codes()) == (0, ["policy.rate"])
    shop.file.write_text(shop.text)
    shop.service.publish(body)
    assert shop.service.work() == 1
    shop.service.publish(body)
    assert (shop.service.work(), shop.codes()) == (0, ["message.replayed"])


def test_what_comes_again_with_a_new_connection_is_counted_once(shop: Shop) -> None:
    shop.rate("1/h")
    body = shop.sent()
    guard = shop.service.gate.guard
    for _ in range(3):
        assert shop.service.gate.receive(delivered(body, content_type=envelope.CONTENT_TYPE)) is not None
        guard.connected(None, set())
    assert shop.service.receive(delivered(body, content_type=envelope.CONTENT_TYPE))
    shop.send()
    assert (shop.service.work(), shop.codes()) == (0, ["policy.rate"])


def test_what_is_given_back_is_no_more_than_there_was(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.rate("2/h")
    gate, clock = shop.service.gate, time.monotonic
    for _ in range(2):
        assert gate.receive(delivered(shop.sent(), content_type=envelope.CONTENT_TYPE)) is not None
    monkeypatch.setattr("kombu.utils.limits.monotonic", lambda: clock() + 7200)  # there is room for two again
    gate.guard.connected(None, set())
    for _ in range(3):
        shop.send()
    assert (shop.service.work(), shop.codes()) == (2, ["policy.rate"])


def test_what_another_worker_has_admitted_is_not_counted_again(shop: Shop) -> None:
    shop.rate("1/h")
    shop.send()
    assert shop.service.work() == 1
    message = delivered(shop.sent(), content_type=envelope.CONTENT_TYPE, delivery_info={"redelivered": True})
    assert shop.service.receive(message)
    assert shop.codes() == []


def test_what_a_message_starts_is_counted_too(shop: Shop) -> None:
    shop.rate("2/h")
    task = shop.service.client.app.tasks[TASK]
    (task.si("x") | task.si("x") | task.si("x")).apply_async()
    assert sum(shop.service.work() for _ in range(3)) == 2
    assert shop.codes() == ["policy.rate"]


# --- when a task is about to start ------------------------------------------------------------------------------------


def waiting(shop: Shop) -> tuple[Any, Channel]:
    """Return a request that waits in the worker, and what becomes of its message."""
    channel, app = Channel(), shop.service.worker.app
    admitted = shop.service.gate.receive(delivered(shop.sent(), channel, content_type=envelope.CONTENT_TYPE))
    assert admitted is not None
    request = consumer.HardenedRequest(
        admitted,
        app=app,
        task=app.tasks[TASK],
        on_ack=admitted.ack_log_error,
        on_reject=admitted.reject_log_error,
        hostname="test",
    )
    return request, channel


def starts(request: Any) -> bool:
    try:
        request.execute()
    except TaskRevokedError:
        return False
    return not request._already_revoked


def test_what_waited_and_is_still_allowed_starts(shop: Shop) -> None:
    request, channel = waiting(shop)
    assert starts(request)
    assert channel.fate == ["acknowledged"]


def _denied(shop: Shop, _: pytest.MonkeyPatch) -> None:
    shop.change(CLIENT, "[callers.other]")


def _expired(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = time.time, shop.service.client.app.hardening.settings.message_max_age + 3600
    monkeypatch.setattr(time, "time", lambda: clock() + ahead)


@pytest.mark.parametrize(("meanwhile", "leaf"), [(_denied, errors.NotAllowed), (_expired, errors.Expired)])
def test_what_waited_too_long_or_for_a_right_that_is_gone_does_not_start(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[..., None], leaf: type[errors.MessageRefused]
) -> None:
    request, channel = waiting(shop)
    with monkeypatch.context() as patch:
        meanwhile(shop, patch)
        assert not starts(request)
    assert channel.fate == ["acknowledged"]
    (record,) = shop.service.quarantined()
    assert record["code"] == leaf.code
    with pytest.raises(leaf):
        shop.service.client.app.AsyncResult(request.id).get(timeout=1)


def test_what_did_not_start_runs_when_it_is_released(shop: Shop) -> None:
    request, _ = waiting(shop)
    shop.change(CLIENT, "[callers.other]")
    assert not starts(request)
    shop.file.write_text(shop.text)
    operator = shop.service.party("operator").app
    (message,) = shop.service.deliveries(shop.service.rules.quarantine)
    refused.release(operator, refused.Refused(operator.hardening, message.body, message.ack))
    assert (shop.service.work(), shop.codes()) == (1, [])


def test_a_signed_message_says_nothing_of_limits(shop: Shop) -> None:
    """A limit is the reader's: nothing in a message could raise it."""
    verified = shop.service.worker.app.hardening.verify(envelope.Type.TASK, shop.sent())
    assert not {"rate", "limit", "limits"} & codec.decode(verified.payload).keys()
