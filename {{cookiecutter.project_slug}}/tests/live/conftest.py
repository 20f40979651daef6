"""One stack for all live tests, in a temporary folder: the one of `make up` is left alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import Stack

from .running import Running

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def temporary() -> Iterator[Path]:
    """A folder that unprivileged servers may pass through, which pytest's own folders do not allow."""
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o711)
    yield folder
    for file in folder.rglob("stack.json"):  # of a test that failed half-way
        Stack(ROOT, file.parent).down()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stack(temporary: Path) -> Iterator[Stack]:
    """Broker, backend and the project's worker."""
    stack = Stack(ROOT, temporary / "stack")
    stack.up()
    yield stack
    stack.down()


@pytest.fixture(scope="session")
def running(temporary: Path) -> Iterator[Running]:
    """Everything Celery can do, on a stack of its own."""
    running = Running(temporary / "everything")
    try:
        running.up()
        yield running
    finally:
        running.stack.down()
