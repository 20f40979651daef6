"""Starts processes in sessions of their own, and ends exactly those.

Guards against: ending somebody else's process because its number was used again, and leaving children behind.
Rests on: ``/proc``. A process is known by number *and* start time; its children by its session, whose number the kernel
does not give away while one of them lives; and all of it by the machine's boot.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .account import Account
from .errors import StackFailed

_GRACE = 10.0  # seconds from the polite signal to the other one
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """A process that was started here, also by an earlier command: what it is known by, and its log."""

    name: str
    pid: int
    started: int
    boot: str
    log: str

    def alive(self) -> bool:
        """Whether the process itself runs."""
        if (child := _children.get(self.pid)) is not None:
            child.poll()  # a child that ended is ours to collect
        status = _status(self.pid)
        return self.boot == _boot() and status is not None and status.started == self.started and not status.zombie

    def members(self) -> list[int]:
        """The processes of its session that still run, itself included."""
        if (child := _children.get(self.pid)) is not None:
            child.poll()
        leader = _status(self.pid)
        if self.boot != _boot() or (leader is not None and leader.started != self.started):
            return []
        return [
            pid
            for pid, status in _processes()
            if status.session == self.pid and status.started >= self.started and not status.zombie
        ]

    def stop(self) -> None:
        """End the process and all of its session: first politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            targets = [self.pid] if number == signal.SIGTERM and self.alive() else self.members()
            for pid in targets:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            try:
                wait_until(lambda: not self.members(), f"{self.name} to end", _GRACE)
            except StackFailed:
                continue
            return
        raise StackFailed(f"{self.name} (process {self.pid}) does not end")

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for a message to a person."""
        try:
            lines = Path(self.log).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error.strerror})"
        return "\n".join(f"  {line}" for line in lines[-count:])

    def require_alive(self) -> None:
        """Raise with the last lines of its log if it has ended."""
        if not self.alive():
            raise StackFailed(f"{self.name} ended; the last lines of {self.log}:\n{self.last_lines()}")


def start(
    name: str, command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, log: Path, account: Account
) -> Process:
    """Start a command as ``account`` in a session of its own, its output going to ``log``, a file that stays ours."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **account.popen_options(),
        )
    _children[child.pid] = child
    status = _status(child.pid)
    if status is None:  # not even a zombie: impossible for a child that nobody has waited for
        raise StackFailed(f"{name} did not start")
    return Process(name, child.pid, status.started, _boot(), str(log))


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll a condition until it holds; raise ``StackFailed`` at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise StackFailed(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)


@dataclass(frozen=True)
class _Status:
    zombie: bool
    session: int
    started: int


def _status(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # proc(5); the name, in parentheses, may hold anything
    return _Status(fields[0] in "ZX", int(fields[3]), int(fields[19]))


def _processes() -> Iterator[tuple[int, _Status]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (status := _status(int(entry))) is not None:
            yield int(entry), status


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
