"""What a task may take of the machine: a process of the pool has limits that the kernel holds it to.

Guards against: a task that eats memory or file handles until its neighbours or the whole host fail, and secrets in core
dumps. Celery replaces a process that has grown too large only once its task has ended; a task without an end it kills
(``task_time_limit``).
Rests on: setrlimit(2). Threads and solo pools have no process of their own, so there is nothing to limit.
Controls: WRK-5, DAT-3.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from typing import Any

from billiard import pool

logger = logging.getLogger(__name__)

#: How far a task may go beyond ``worker_max_memory_per_child``, at which its process is replaced when it has ended.
_MEMORY_FACTOR = 2
#: Files and sockets that a task may have open at once, and some more with which its failure is stored.
_FILES, _SPARE = 1024, 64


def limit_process(app: Any) -> None:
    """Limit this process: more memory raises ``MemoryError`` in its task, more files ``OSError``; it leaves no core."""
    limits = [(resource.RLIMIT_CORE, 0, 0), (resource.RLIMIT_NOFILE, _FILES, _FILES + _SPARE)]
    kib = app.conf.worker_max_memory_per_child
    if kib:
        limits.append((resource.RLIMIT_DATA, *(_MEMORY_FACTOR * kib * 1024,) * 2))
        pool.mem_rss = _or_holds_files(pool.mem_rss, kib)
    for kind, *most in limits:
        hard = resource.getrlimit(kind)[1]
        soft, hard = most if hard == resource.RLIM_INFINITY else (min(each, hard) for each in most)
        resource.setrlimit(kind, (soft, hard))


def spare_files() -> None:
    """Let this process open the files with which a failure is stored, be it that there were too many.

    Until the pool looks, which it does after each task.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _or_holds_files(kib_used: Callable[[], int], kib: int) -> Callable[[], int]:
    """Return what the pool asks after each task: a process that keeps files open is replaced as too large, too."""

    def used() -> int:
        try:
            lowest = os.open(os.devnull, os.O_RDONLY)  # all below it are in use
            os.close(lowest)
        except OSError:
            lowest = _FILES
        if lowest < _FILES // 2:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard), hard))  # the next one has no spare ones
            return kib_used()
        logger.warning("This process keeps more than %d files open and is replaced.", _FILES // 2)
        return kib + 1

    return used
