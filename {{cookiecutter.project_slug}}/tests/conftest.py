"""Fixtures for everyone who writes a task."""

from __future__ import annotations

from pathlib import Path

import pytest

from .service import Service


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A client and a worker in this process: ``service.send(task, ...)``, then ``service.work()``."""
    return Service(tmp_path)
