"""One stack with everything Celery can do, for the tests that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import brokers
from .running import Running


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "broker(name): about a promise that only this broker can make")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is about another broker than the project's."""
    others = [item for item in items if any(mark.args != (brokers.NAME,) for mark in item.iter_markers("broker"))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def running(temporary: Path) -> Iterator[Running]:
    """Everything Celery can do, on a stack of its own."""
    running = Running(temporary / "everything")
    try:
        running.up()
        yield running
    finally:
        running.stack.down()
