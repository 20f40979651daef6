"""What each part of the layer costs where it runs: in a live publisher, a live worker and its pool child.

Each call is timed by the CPU clock of its thread, so waiting for a server is not counted. In a loop by themselves, with
code and data in the processor's caches, the same parts take about half of that: the wrong number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from celery import signals

#: Calls that are left out: the first ones read files and check certificates.
_FIRST = 100
_CHILD = "pool child: strict arguments, and the task"
#: What is timed: module, class if there is one, function, and what is shown for it.
_PARTS: tuple[tuple[str, str | None, str, str], ...] = (
    ("producer", "TaskProducer", "_sign", "publisher: claims and signature"),
    ("envelope", "Signer", "sign", "publisher: of these, making the signature"),
    ("gate", "Gate", "admit", "worker: the gate"),
    ("keys", None, "_verify_jose", "worker: of this, checking the signature"),
    ("gate", "Gate", "_still_trusts", "worker: second look, before the task starts"),
    ("replay", "Guard", "claim", "worker: replay guard, claim"),
    ("replay", "RedisStore", "done", "worker: replay guard, done"),
)
_taken: dict[str, list[int]] = {part: [] for *_, part in (*_PARTS, (_CHILD,))}


def _timed(taken: list[int], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        since = time.thread_time_ns()
        try:
            return function(*args, **kwargs)
        finally:
            taken.append(time.thread_time_ns() - since)

    return timed


def watch(package: str, folder: Path) -> None:
    """Time every part from now on. Worker and pool child write what they have found to ``folder`` when they end."""
    for module, owner, name, part in _PARTS:
        holder = import_module(f"{package}.hardening.{module}")
        holder = getattr(holder, owner) if owner else holder
        setattr(holder, name, _timed(_taken[part], getattr(holder, name)))
    strict: Any = import_module(f"{package}.hardening.strict")
    validated = strict._validated
    strict._validated = lambda name, run: _timed(_taken[_CHILD], validated(name, run))

    def write(**_: Any) -> None:
        (folder / f"{os.getpid()}.parts").write_text(json.dumps(means()), encoding="utf-8")

    signals.worker_shutdown.connect(write, weak=False)
    signals.worker_process_shutdown.connect(write, weak=False)


def means() -> dict[str, float]:
    """Return the mean CPU time of each part that this process has called often enough, in microseconds."""
    clock: list[int] = []  # what the clock itself takes
    empty = _timed(clock, lambda: None)
    for _ in range(10 * _FIRST):
        empty()
    return {part: _mean(taken) - _mean(clock) for part, taken in _taken.items() if len(taken) > _FIRST}


def collect(folder: Path, publisher: dict[str, float]) -> dict[str, float]:
    """Return what publisher, worker and pool child have found, in the order of a message's way."""
    found = dict(publisher)
    for path in folder.glob("*.parts"):
        found |= json.loads(path.read_text())
    return {part: found[part] for part in _taken}


def _mean(nanoseconds: list[int]) -> float:
    return sum(nanoseconds[_FIRST:]) / len(nanoseconds[_FIRST:]) / 1000
