"""A file that says when a worker or beat was last seen to work, and the health check that reads it.

Guards against: a process that is there and does nothing. No check goes through the broker: an answer from there would
need a key, and a broker that is away must not end its workers.
Rests on: the event loop, whose timer writes the file. It cannot while it hangs; while it connects or ends it says so.
Controls: IMG-1.

As a program (``python heartbeat.py``) this is the health check, and imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

#: Seconds without a sign of life that are too many; workers give one each second, beat at least every 30.
TOO_LONG = 60.0
_PAUSED = 0.0  # as the file's time: whoever waits for a broker is well


def beat(file: Path | None, at: tuple[float, float] | None = None) -> None:
    """Write down that this process works: now, or at other times of access and modification."""
    if file is not None:
        with suppress(OSError):  # a task has removed it, perhaps: the check says so
            os.utime(file, at)


def pause(file: Path | None) -> None:
    """Write down that this process waits for a broker, or ends."""
    beat(file, (_PAUSED, _PAUSED))


def check(file: Path) -> str:
    """Return what is wrong, or nothing."""
    try:
        seen = file.stat().st_mtime
    except OSError as error:
        return f"{file}: {error.strerror}"
    since = abs(time.time() - seen)  # the clock may have been put back
    return f"no sign of life for {since:.0f} s" if seen != _PAUSED and since > TOO_LONG else ""


if __name__ == "__main__":
    sys.exit(check(Path(os.environ["SECURE_CELERY_HEARTBEAT_FILE"])) or 0)
