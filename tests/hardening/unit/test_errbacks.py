"""Errbacks are messages: nothing of them runs where the failure is settled (AUT-3)."""

from __future__ import annotations

import pytest

from ...project import errors
from ...service import Service
from . import documents


def test_an_errback_is_sent_and_gets_the_failed_tasks_id(service: Service) -> None:
    tasks = service.client.app.tasks
    errback = tasks[documents.checksum.name].s().set(task_id="the-errback")
    failing = tasks[documents.checksum.name].apply_async((5,), link_error=errback)
    (message,) = service.deliveries()
    assert service.receive(message)
    (sent,) = service.deliveries()
    admitted = service.gate.admit(sent)
    assert (admitted.headers["id"], admitted.body[0]) == ("the-errback", [failing.id])
    assert admitted.headers["origin"] == str(service.client.identity)


def test_an_errback_that_cannot_be_sent_keeps_neither_the_failure_nor_the_others_back(service: Service) -> None:
    tasks = service.client.app.tasks
    useless, useful = tasks[documents.record_receipt.name].s(), tasks[documents.checksum.name].s()
    failing = tasks[documents.checksum.name].apply_async((5,), link_error=[useless, useful])
    assert service.work() == 2
    with pytest.raises(errors.InvalidArguments):
        failing.get(timeout=1)
