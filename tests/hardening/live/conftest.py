"""One stack with everything Celery can do, for the tests that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest
from celery import Celery

from stack import Stack

from ...service import ROOT
from . import brokers
from .running import Running

#: Its plugin would import it at the very end, where the finalizer of a result that nobody waited for may import too:
#: Python 3.11.2 then fails with "AST constructor recursion depth mismatch".
__all__ = ["hypothesis"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "broker(name): about a promise that only this broker can make")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is about another broker than the project's."""
    others = [item for item in items if any(mark.args != (brokers.NAME,) for mark in item.iter_markers("broker"))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def servers(temporary: Path) -> Iterator[Stack]:
    """Broker and backend alone, for tests that put messages into queues that no worker may see."""
    stack = Stack(ROOT, temporary / "servers")
    stack.up(worker=False)
    yield stack
    stack.down()


@pytest.fixture
def application(servers: Stack) -> str:
    return str(servers.topology.application)


@pytest.fixture(scope="session")
def running(temporary: Path) -> Iterator[Running]:
    """Everything Celery can do, on a stack of its own."""
    with Running(temporary / "everything") as running:
        yield running


@pytest.fixture(scope="module")
def operator(running: Running) -> Celery:
    return running.caller("operator")


@pytest.fixture(scope="module")
def monitor(running: Running) -> Celery:
    return running.caller("monitor")


@pytest.fixture
def key() -> str:
    """A name for the effects of one test."""
    return uuid4().hex
