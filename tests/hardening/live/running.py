"""The application of everything Celery can do, running: servers, the pool ``worker``, and callers in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from celery import Celery

from stack import Stack
from stack.worker import Worker

from ...project import Settings
from . import brokers
from .everything import application, within

ROOT = Path(__file__).parents[3]
TASKS = f"{__package__}.everything"
#: Seconds in which anything that is going to happen has happened, also on a busy machine.
SOON = 30


class Running:
    """One stack. The pool ``worker`` serves the queue `default`; tests start ``batch``, for `slow`, as they need it."""

    def __init__(self, folder: Path, *, managed: bool = False) -> None:
        folder.mkdir(mode=0o711)
        self.effects = folder / "effects"
        self.effects.mkdir()
        self.effects.chmod(0o777)  # the workers are another user's
        topology = folder / "topology.toml"
        rules = Path(__file__).with_name("everything.toml").read_text(encoding="utf-8")
        topology.write_text(rules.replace('"rabbitmq"', f'"{brokers.NAME}"', 1), encoding="utf-8")
        self.stack = Stack(ROOT, folder / "stack", f"{TASKS}:app", topology=topology, managed=managed)
        self.broker = brokers.of(self.stack)
        self.worker: Worker
        self._callers: list[Celery] = []

    def __enter__(self) -> Running:
        """Start the servers and the pool ``worker``."""
        try:
            self.stack.up(worker=False)
            self.worker = self.start("worker")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything; first the results that were waited for in vain, which would look for their server."""
        gc.collect()
        for app in self._callers:
            consumer = app.backend.result_consumer
            consumer.stop()
            consumer._pubsub = None
        self.stack.down()

    @cached_property
    def client(self) -> Celery:
        """The caller that may send everything."""
        return self.caller("client")

    def caller(self, name: str) -> Celery:
        """Make an application that calls in this name."""
        environment = self.stack.environment(name)
        app = application(
            Settings(**{key.removeprefix("SECURE_CELERY_").lower(): value for key, value in environment.items()})
        )
        self._callers.append(app)
        return app

    def task(self, name: str, caller: Celery | None = None) -> Any:
        """Return a task, to be called in the client's name or another one's."""
        return (caller or self.client).tasks[f"{TASKS}.{name}"]

    def start(self, pool: str, *options: str, **environment: str) -> Worker:
        """Start a worker of a pool."""
        environment = {**self.stack.environment(pool), "EFFECTS": str(self.effects), **environment}
        return self.stack.start_worker(env=environment, name=pool, options=options)

    @contextmanager
    def batch(self, *options: str, **environment: str) -> Iterator[Worker]:
        """Run a worker of the pool ``batch`` for a while."""
        worker = self.start("batch", *options, **environment)
        try:
            yield worker
        finally:
            worker.stop()

    def alive(self) -> None:
        """Start the pool ``worker`` again if a test ended it."""
        if not self.worker.alive():
            self.worker.stop()
            self.worker = self.start("worker")

    def effect_names(self) -> set[str]:
        """Return what happened at least once."""
        return {path.name.partition(":")[0] for path in self.effects.iterdir()}

    def count(self, key: str) -> int:
        """Return how often an effect happened."""
        return sum(path.name.partition(":")[0] == key for path in self.effects.iterdir())

    def happens(self, key: str, times: int = 1) -> bool:
        """Wait for an effect."""
        return bool(within(SOON, lambda: self.count(key) >= times))

    def go(self, key: str) -> None:
        """Let a task that waits go on."""
        (self.effects / f"{key}.go").touch()

    def length(self, queue: str) -> int:
        """Return how many messages a queue holds."""
        return self.broker.length(queue)

    def waiting(self, queue: str) -> int:
        """Return how many messages of a queue are not delivered yet."""
        return self.broker.waiting(queue)
