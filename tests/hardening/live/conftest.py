"""One stack with everything Celery can do, for the tests that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .running import Running


@pytest.fixture(scope="session")
def running(temporary: Path) -> Iterator[Running]:
    """Everything Celery can do, on a stack of its own."""
    running = Running(temporary / "everything")
    try:
        running.up()
        yield running
    finally:
        running.stack.down()
