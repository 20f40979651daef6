"""Fixtures for everyone who writes a task: the service in this process, and a stack of real servers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import Stack

from .service import ROOT, Service


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A client and a worker in this process: ``service.send(task, ...)``, then ``service.work()``."""
    return Service(tmp_path)


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
    """Broker, backend and the project's worker, in a folder of their own: the stack of ``make up`` is left alone."""
    stack = Stack(ROOT, temporary / "stack")
    stack.up()
    yield stack
    stack.down()
