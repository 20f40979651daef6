"""A task that takes too much is stopped by itself: its worker stays the same, and serves the next one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from .running import SOON, Running


@pytest.fixture(autouse=True)
def undisturbed(running: Running) -> Iterator[None]:
    """See that the worker serves in the end, with both its processes, and never ended."""
    running.alive()
    pid = running.worker.pid
    yield
    for _ in range(4):
        assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.worker.pid == pid
    assert running.worker.alive()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("memory", MemoryError),
        ("files", OSError),
        ("processor", SoftTimeLimitExceeded),
        ("processor, and no signal gets in", TimeLimitExceeded),
    ],
)
def test_a_task_that_takes_all_there_is_is_stopped(running: Running, what: str, error: type[Exception]) -> None:
    key = uuid4().hex
    limits = {"soft_time_limit": 2, "time_limit": 4} if "processor" in what else {}
    with pytest.raises(error):
        running.task("eats").apply_async((what, key), **limits).get(timeout=SOON)
    assert running.task("add").delay(1, 2).get(timeout=SOON) == 3
    assert running.count(key) == 1


def test_a_process_of_the_pool_has_its_limits(running: Running) -> None:
    pid = running.task("seen").delay().get(timeout=SOON)["pid"]
    lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"][0] == "1024"
    assert limits["Max data size"] == [str(1 << 30)] * 2
