"""Signs of life of a real worker and beat: they come, they pause while the broker is away, and have to be possible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stack import StackFailed
from stack.worker import Worker

from ...project import heartbeat
from . import brokers
from .everything import within
from .running import SOON, Running

SETTING = "SECURE_CELERY_HEARTBEAT_FILE"
LONG_AGO = (1.0, 1.0)


def beats(file: Path) -> bool:
    """Say whether a sign of life comes, and not only the one from before."""
    os.utime(file, LONG_AGO)
    return within(SOON, lambda: not heartbeat.check(file) and file.stat().st_mtime > 0)


@pytest.fixture
def file(running: Running) -> Path:
    file = running.effects / "heartbeat"
    file.unlink(missing_ok=True)
    return file


@contextmanager
def beat(running: Running, **environment: str) -> Iterator[Worker]:
    started = running.stack.start_beat(env={**running.stack.environment("beat"), "SCHEDULE": "{}", **environment})
    try:
        yield started
    finally:
        started.stop()


def test_a_worker_gives_signs_of_life_but_not_while_its_broker_is_away(running: Running, file: Path) -> None:
    with running.batch(**{SETTING: str(file)}):
        assert beats(file)
        with running.stack.without(brokers.of(running.stack).server):
            assert within(SOON, lambda: file.stat().st_mtime == 0)
            assert not heartbeat.check(file)  # and all is well
        assert within(SOON, lambda: file.stat().st_mtime > 0)
    assert file.stat().st_mtime == 0  # it said that it ends, so that a long last task is not mistaken for a hang


def test_beat_gives_signs_of_life(running: Running, file: Path) -> None:
    with beat(running, **{SETTING: str(file)}):
        assert beats(file)


@pytest.mark.parametrize("start", [Running.batch, beat])
def test_a_file_that_cannot_be_written_ends_the_start(running: Running, file: Path, start: object) -> None:
    assert callable(start)
    with pytest.raises(StackFailed, match=rf"{SETTING}: .*cannot be written.*\[config\.file\]"):
        start(running, **{SETTING: str(file / "none")}).__enter__()
