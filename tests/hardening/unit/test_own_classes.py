"""harden() keeps an application's own classes and tasks, and makes them as strict as its own."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task
from celery.app.amqp import AMQP

from ...project import Settings, errors, hardening, producer
from ...service import Service
from . import documents
from .hardened import _app, _refused, client, own, pki, stock_decoders, worker

__all__ = ["client", "own", "pki", "stock_decoders", "worker"]


class OwnTask(Task):
    """Stands for Django's: ``delay_on_commit``, a hook, an attribute."""

    label = "own"

    def delay_on_commit(self, *args: Any) -> Any:
        return self.delay(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return [self.label, super().__call__(*args, **kwargs)]


class OwnAMQP(AMQP):
    """An application's own."""

    own = True


def test_the_applications_task_class_stays_in_the_chain(worker: Settings) -> None:
    app = _app(worker, task_cls=OwnTask)

    @app.task(shared=False)
    def double(number: int) -> int:
        return number * 2

    app.hardening.check(app)
    task = app.tasks[double.name]
    assert isinstance(task, OwnTask)
    assert hasattr(task, "delay_on_commit")
    assert task(4) == ["own", 8]
    with pytest.raises(errors.InvalidArguments):
        task("4")


def test_the_applications_amqp_class_stays_in_the_chain(worker: Settings) -> None:
    for given in (OwnAMQP, f"{__name__}:OwnAMQP"):
        app = _app(worker, amqp=given)
        assert isinstance(app.amqp, OwnAMQP)
        assert isinstance(app.amqp, producer.SigningAMQP)


def test_a_subclass_that_brings_its_own_result_backend_is_found(worker: Settings) -> None:
    class App(Celery):
        backend_cls = "redis://plain"

    app = App("sub", set_as_current=False)
    hardening.harden(app, worker)
    assert _refused(app).setting == "result_backend"


def test_a_subclass_of_celery_is_hardened(worker: Settings) -> None:
    class App(Celery):
        task_cls = OwnTask

    app = App("sub", set_as_current=False)
    hardening.harden(app, worker)
    app.hardening.check(app)
    assert isinstance(app.amqp, producer.SigningAMQP)


def test_shared_tasks_and_tasks_made_before_and_after_are_all_strict(worker: Settings) -> None:
    app = Celery("harden", set_as_current=False)

    @app.task(shared=False)
    def before(number: int) -> int:
        return number

    hardening.harden(app, worker)

    @app.task(shared=False)
    def after(number: int) -> int:
        return number

    app.finalize()

    @app.task(shared=False)
    def late(number: int) -> int:
        return number

    app.hardening.check(app)
    assert documents.checksum.name in app.tasks
    for name in (before.name, after.name, late.name):
        assert app.tasks[name].run(1) == 1
        with pytest.raises(errors.InvalidArguments):
            app.tasks[name].run("1")
    with pytest.raises(errors.InvalidArguments):
        app.tasks[documents.checksum.name].run(1)


def _loose(value):  # type: ignore[no-untyped-def]  # that is the point
    return value


def test_a_task_without_annotations_stops_the_worker(worker: Settings) -> None:
    app = _app(worker)

    app.task(shared=False, name="loose")(_loose)
    refusal = _refused(app)
    assert (refusal.setting, refusal.code) == ("task loose", "task.unannotated")
    loose_app = Celery("loose", set_as_current=False)
    hardening.harden(loose_app, worker, strict_arguments=False)
    loose_app.task(shared=False, name="loose")(_loose)
    loose_app.hardening.check(loose_app)


def test_a_shared_task_is_sent_signed_through_the_hardened_application(service: Service) -> None:
    result = service.client.app.tasks[documents.checksum.name].delay("x")
    assert service.work() == 1
    assert len(result.get(timeout=1)) == 64
