"""The health check: what hangs is found, and what waits for a broker is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ...project import heartbeat

AGO = heartbeat.TOO_LONG + 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "heartbeat"
    file.touch()
    return file


def healthy(file: Path) -> bool:
    """Run the check as an engine does: a program of its own, which imports nothing of ours."""
    command = [sys.executable, "-I", heartbeat.__file__]
    return subprocess.run(command, env={"SECURE_CELERY_HEARTBEAT_FILE": str(file)}, check=False).returncode == 0


def test_a_sign_of_life_is_good_until_it_is_old(file: Path) -> None:
    assert healthy(file)
    os.utime(file, (0, time.time() - AGO))
    assert not healthy(file)
    heartbeat.beat(file)
    assert healthy(file)


def test_a_clock_that_was_put_back_hides_nothing(file: Path) -> None:
    os.utime(file, (0, time.time() + AGO))
    assert not healthy(file)


def test_whoever_waits_for_a_broker_is_well(file: Path) -> None:
    heartbeat.pause(file)
    assert healthy(file)


def test_a_file_that_is_gone_is_bad_and_ends_no_worker(file: Path) -> None:
    file.unlink()
    heartbeat.beat(file)
    heartbeat.pause(file)
    assert not healthy(file)
