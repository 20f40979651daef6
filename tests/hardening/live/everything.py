"""An application that uses everything Celery has. Workers name it ``tests.hardening.live.everything:app``.

Effects are files, so that a test counts what really happened and not what a result says: each run of :func:`note` makes
one of its own, and several runs for one key make several.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from celery import Celery, Task, current_app, group, shared_task
from pydantic import BaseModel

from ...project import Settings, hardening, intake_redis, replay

intake_redis.VISIBILITY_TIMEOUT = 6  # seconds until Redis gives away what a killed worker held
replay.LEASE = 6  # seconds until what a killed worker held may run elsewhere


def application(settings: hardening.Settings) -> Celery:
    """Make a hardened application of these tasks."""
    application = Celery("everything", set_as_current=False)
    application.conf.update(task_track_started=True, worker_lost_wait=1)  # seconds until a process counts as lost
    application.conf.beat_schedule = json.loads(os.environ.get("SCHEDULE", "{}"))
    if seconds := os.environ.get("RESULT_EXPIRES"):
        application.conf.result_expires = int(seconds)
    hardening.harden(application, settings)
    return application


def __getattr__(name: str) -> Any:  # a client makes its own: only a worker's environment names a worker's files
    if name == "app":
        return application(Settings())
    raise AttributeError(name)


def within(seconds: float, condition: Callable[[], Any]) -> Any:
    """Poll until the condition holds and return what it returned; give up with what it returned last."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def note(key: str) -> None:
    """Leave an effect: one file for each run."""
    folder = Path(os.environ["EFFECTS"])
    (folder / f"{key}:{uuid4().hex}").touch()


def wait_for(key: str) -> None:
    """Wait until the test lets us go on."""
    if not within(30, (Path(os.environ["EFFECTS"]) / key).exists):
        raise TimeoutError(key)


@shared_task(ignore_result=False)
def add(x: int, y: int) -> int:
    return x + y


@shared_task(ignore_result=False)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(ignore_result=False)
def flat(numbers: list[list[int]]) -> list[int]:
    return [number for part in numbers for number in part]


@shared_task(ignore_result=False)
def fail(message: str) -> None:
    raise ValueError(message)


@shared_task
def effect(key: str) -> None:
    note(key)


@shared_task(bind=True)
def origin(self: Task, key: str) -> None:
    """Note the role of whoever asked."""
    note(f"{key}={self.request.origin.rpartition('/')[2]}")


@shared_task(ignore_result=False)
def counted(key: str) -> str:
    note(key)
    return key


@shared_task
def received(value: int, key: str) -> None:
    """A callback: what came, and under which key to note it."""
    note(f"{key}={value}")


@shared_task
def failed(task_id: str, key: str) -> None:
    """An error callback, of the kind that is sent as a task."""
    note(f"{key}={task_id}")


@shared_task(ignore_result=False)
def held(key: str) -> str:
    note(f"{key}.started")
    wait_for(f"{key}.go")
    note(f"{key}.ended")
    return key


@shared_task(bind=True, ignore_result=False, autoretry_for=(ConnectionError,), max_retries=3, default_retry_delay=0)
def flaky(self: Task, key: str, failures: int) -> int:
    note(key)
    if self.request.retries < failures:
        raise ConnectionError("not yet")
    return int(self.request.retries)


@shared_task(bind=True, ignore_result=False, max_retries=1)
def again(self: Task, key: str, countdown: float) -> str:
    note(key)
    if self.request.retries == 0:
        raise self.retry(countdown=countdown)
    return str(self.request.origin)


@shared_task(bind=True, ignore_result=False, max_retries=1, default_retry_delay=0)
def never(self: Task) -> None:
    raise self.retry(exc=ValueError("still not"))


@shared_task(bind=True, ignore_result=False)
def seen(self: Task) -> dict[str, Any]:
    """What the request says."""
    request = self.request
    return {
        "headers": request.headers,
        "stamps": request.stamps,
        "priority": request.delivery_info["priority"],
        "queue": request.delivery_info["routing_key"],
        "host": request.hostname,
        "origin": request.origin,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "thread": threading.current_thread().name,
        "pid": os.getpid(),
        "parent": os.getppid(),
    }


@shared_task(bind=True, ignore_result=False)
def becomes(self: Task, x: int, y: int) -> None:
    raise self.replace(self.app.tasks[add.name].s(x, y))


@shared_task(bind=True, ignore_result=False)
def becomes_group(self: Task, numbers: list[int]) -> None:
    task = self.app.tasks[add.name]
    raise self.replace(group(task.s(number, 1) for number in numbers))


@shared_task(bind=True, ignore_result=False)
def calls(self: Task, task: str, args: list[int], queue: str | None = None) -> str:
    """Call another task and return its id."""
    return str(self.app.tasks[task].apply_async(args, queue=queue).id)


@shared_task(bind=True, acks_late=True, reject_on_worker_lost=True)
def die(self: Task, key: str) -> None:
    note(key)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(acks_late=True, reject_on_worker_lost=True)
def leave(key: str) -> None:
    note(key)
    sys.exit(1)


@shared_task(ignore_result=False)
def unserializable() -> Any:
    return object()


@shared_task(ignore_result=False)
def echo(value: Any) -> Any:
    return value


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Parcel:
    price: Decimal
    colour: Colour
    sent: datetime


class Order(BaseModel):
    id: UUID
    due: date
    parcels: list[Parcel]


@shared_task(ignore_result=False)
def typed(
    order: Order, parcel: Parcel, colour: Colour, moment: datetime, day: date, price: Decimal, number: UUID
) -> list[Any]:
    """Return each argument as it is, and of which type it was."""
    values = [order, parcel, colour, moment, day, price, number]
    return [[type(value).__name__, value] for value in values]


@shared_task(ignore_result=False)
def eats(what: str, key: str) -> None:
    """Take all there is of something, without an end."""
    note(key)
    eaten: list[Any] = []
    while what == "processor":
        pass
    if what == "processor, and no signal gets in":
        deque(itertools.repeat(0), maxlen=0)
    while what == "memory":
        eaten.append(bytearray(1 << 26))
    try:
        while what == "files":
            eaten.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        current_app.backend.client.connection_pool.disconnect()  # whoever stores the failure needs a file of its own
        raise
