"""A Celery worker of the local stack.

Guards against: a worker that inherits a developer's environment, and with it secrets that no production worker has.
Rests on: the environment file of its role, and a minimal base.
Controls: WRK-1, DAT-3.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .account import Account
from .process import Process, start

_READY = re.compile(rb"@\S+ ready\.")


@dataclass(frozen=True)
class Worker:
    """A worker that was started."""

    process: Process
    _drop: Callable[[Process], None]

    @property
    def pid(self) -> int:
        """The main process's number."""
        return self.process.pid

    @property
    def log(self) -> Path:
        """What it printed."""
        return Path(self.process.log)

    def alive(self) -> bool:
        """Whether the main process runs."""
        return self.process.alive()

    def stop(self) -> None:
        """End it and its children."""
        self.process.stop()
        self._drop(self.process)


def start_worker(
    name: str,
    project: Path,
    arguments: Sequence[str],
    env: Mapping[str, str],
    home: Path,
    log: Path,
    account: Account,
) -> Process:
    """Start a worker; it is not ready yet."""
    base = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(project / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "celery", *arguments]
    return start(name, command, env={**base, **env}, cwd=project, log=log, account=account)


def wait_ready(process: Process) -> None:
    """Wait until the worker consumes."""
    process.wait(lambda: bool(_READY.search(Path(process.log).read_bytes())), 60)
