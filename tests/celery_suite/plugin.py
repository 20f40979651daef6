"""The pytest plugin that gives Celery's tests their application, and notes how each of them ended.

Loaded with ``-p``, before the tests' own ``conftest.py``: what that one imports is then what it shall be, and nothing
in Celery's files is changed. ``CELERY_SUITE`` names the configuration (see ``lane.py``).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import celery.contrib.pytest as fixtures
import pytest
import redis
from celery import Celery
from celery.contrib.testing.manager import Manager
from celery.worker import state
from my_service.hardening import Settings, harden
from t.integration import tasks

CONFIGURATION: dict[str, Any] = json.loads(Path(os.environ["CELERY_SUITE"]).read_text(encoding="utf-8"))
#: Seconds that one test may take, and wait for one thing, whatever it says itself: the machine may be busy.
LIMIT, PATIENCE = 180, 150
#: The same for one that shall not pass, and how long it may wait in vain for one thing.
LIMIT_OF_LISTED, IN_VAIN = 30, 5
#: Seconds to wait for a worker that is busy with what an earlier test left, and without work until it counts as idle.
BUSY, IDLE = 30, 0.15
#: Seconds in which what happened has been noted.
NOTED = 5
_WORSE = ("passed", "skipped", "failed")

_create_app = fixtures._create_app


@contextmanager
def _application(**parameters: object) -> Iterator[Celery]:
    """Make an application as the tests want it, and harden it if it is ours."""
    with _create_app(**{**parameters, **CONFIGURATION["settings"]}) as app:
        if CONFIGURATION["hardened"]:
            harden(app, Settings(), strict_arguments=False)
            app.control.broadcast = _operator().control.broadcast
        yield app


def _operator() -> Celery:
    """Make who gives the tests' commands: who sends tasks may give none."""
    operator = Celery("operator", set_as_current=False)
    with mock.patch.dict(os.environ, CONFIGURATION["operator"]):
        harden(operator, Settings())
    return operator


def _wait_until_idle(self: Manager) -> None:
    """Wait until the worker does nothing. Celery's asks it by remote control, but it is a thread of this process."""
    began = busy = time.monotonic()
    while busy + IDLE > time.monotonic() and began + BUSY > time.monotonic():
        if state.active_requests:
            busy = time.monotonic()
        time.sleep(0.02)


class _Notebook(redis.Redis):
    def blpop(self, keys: str, timeout: float = 0) -> Any:  # type: ignore[override]  # noqa: ANN401  # narrower
        """Wait for the next note; not for long, since tests mostly wait to see that there is none."""
        return super().blpop(keys, min(timeout, NOTED))


def _notebook() -> _Notebook:
    """Connect to the result backend with all rights; in it tasks write down that they ran."""
    return _Notebook(**CONFIGURATION["notebook"])


fixtures._create_app = _application
tasks.get_redis_connection = _notebook
Manager.wait_until_idle = _wait_until_idle


@pytest.fixture(autouse=True, name="ZZZZ_set_app_current")
def _set_app_current(app: Celery, celery_session_app: Celery) -> Iterator[None]:
    """Do what the tests' fixture of this name does; that one knows no other name for its one queue than ``celery``."""
    app.set_current()
    app.set_default()
    yield
    for one in (app, celery_session_app):
        assert set(one.amqp.queues) == {CONFIGURATION["queue"]}


@pytest.hookimpl(tryfirst=True)
def pytest_plugin_registered(plugin: object) -> None:
    """Put our fixture in the place of theirs, before pytest looks for any."""
    if getattr(plugin, "__name__", "") == "t.integration.conftest":
        plugin.ZZZZ_set_app_current = _set_app_current  # type: ignore[attr-defined]  # a module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each test."""
    for item in items:
        limit = LIMIT_OF_LISTED if item.nodeid in CONFIGURATION["listed"] else LIMIT
        item.add_marker(pytest.mark.timeout(limit), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, None, None]:
    """Let a test wait longer than the minute that it says, or for seconds if it shall not pass."""
    listed = item.nodeid in CONFIGURATION["listed"]
    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(item.module, "TIMEOUT", IN_VAIN if listed else PATIENCE))
        if listed:
            for name, waits in vars(item.module).items():
                if name.startswith("await_"):
                    defaults = (*waits.__defaults__[:-1], IN_VAIN)  # the last one is the timeout
                    changed.enter_context(mock.patch.object(waits, "__defaults__", defaults))
        return (yield)


_outcomes: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a test ended: the worst of its set-up, call, subtests and teardown. What is not noted did not run."""
    note = _outcomes.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "why": ""})
    note["seconds"] += report.duration
    if _WORSE.index(report.outcome) > _WORSE.index(note["outcome"]):
        crash = getattr(report.longrepr, "reprcrash", None)
        note.update(outcome=report.outcome, why=str(crash.message if crash else report.longrepr).splitlines()[0][:200])
    if report.when == "teardown":
        with Path(CONFIGURATION["outcomes"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
