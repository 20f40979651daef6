"""A role's second keys, and the effects that tell whose messages ran: what tests of changing keys and rules share."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from celery import Celery

from stack import Stack
from stack.pki import Pair

from ...project import Settings, settings
from .everything import application, within
from .running import SOON, Running


def add(app: Celery, running: Running, **options: Any) -> int:
    """Let the worker add 1 and 2, and verify the result."""
    sum_: int = running.task("add", app).apply_async((1, 2), **options).get(timeout=SOON)
    return sum_


def settings_of(stack: Stack, role: str = "client") -> dict[str, Any]:
    return {key.removeprefix("SECURE_CELERY_").lower(): value for key, value in stack.environment(role).items()}


def holder(running: Running, role: str, name: str, folder: Path | None = None) -> tuple[Celery, Pair]:
    """Give a role a second key, and an application that uses it; a thief's hears of no revocation."""
    pair = running.stack.issue(role, name)
    own: dict[str, Any] = settings_of(running.stack, role)
    own |= {"security_key": str(pair.key), "security_certificate": str(pair.certificate)}
    if folder:
        own["security_cert_store"] = str(shutil.copytree(own["security_cert_store"], folder / "store"))
    return application(Settings(**own)), pair


def send(running: Running, app: Celery, names: list[str], **options: Any) -> None:
    for name in names:
        running.task("effect", app).apply_async((name,), **options)


def ran(running: Running, names: list[str]) -> list[int]:
    """How often each ran."""
    counts = dict.fromkeys(names, 0)
    for file in running.effects.iterdir():
        name = file.name.partition(":")[0]
        if name in counts:
            counts[name] += 1
    return list(counts.values())


def all_ran(running: Running, names: list[str]) -> bool:
    return bool(within(SOON, lambda: all(ran(running, names))))


def refused(running: Running) -> int:
    return running.waiting("quarantine")


def settled(running: Running, queue: str = "default") -> bool:
    """Wait until every message of a queue was dealt with."""
    return bool(within(SOON, lambda: running.length(queue) == 0))


def until_refused(running: Running, app: Celery, key: str) -> list[str]:
    """Send messages until one is refused; return their names. How many it keeps the broker says now and then."""
    names: list[str] = []
    refusals = said(running, "message.refused")

    def is_refused() -> bool:
        names.append(f"{key}.probe.{len(names)}")
        send(running, app, names[-1:])
        within(SOON, lambda: ran(running, names[-1:]) == [1] or said(running, "message.refused") > refusals)
        return said(running, "message.refused") > refusals

    began = time.monotonic()
    assert within(SOON, is_refused)
    print(f"refused after {time.monotonic() - began:.2f} s, {len(names)} messages")
    return names


def said(running: Running, event: str) -> int:
    """How often the worker's processes said something."""
    return running.worker.log.read_text(encoding="utf-8", errors="replace").count(f'"event": "{event}"')


def everyone_looks() -> None:
    """Wait until each process, also one that had nothing to do, looks at its files before it signs again."""
    time.sleep(settings.Credentials.LOOK)


def serial(pair: Pair) -> str:
    return f"{pair.serial:x}"
