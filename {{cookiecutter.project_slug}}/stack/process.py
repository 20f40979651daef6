"""Starts processes in sessions of their own, and ends exactly those and their descendants.

Guards against: ending somebody else's process because its number was used again, and leaving children behind.
Rests on: ``/proc``. A process is known by number *and* start time; its descendants by their parents, and orphans among
them by the session, whose number the kernel does not give away while one of its members lives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .account import Account, StackFailed

_GRACE = 5.0  # seconds from the polite signal to the other one
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """A process that was started here, perhaps by an earlier command: what it is known by, and its log."""

    name: str
    pid: int
    started: int  # clock ticks since boot
    boot: str
    log: str

    def alive(self) -> bool:
        """Whether the process itself runs."""
        return self._is_ours(_processes().get(self.pid))

    def family(self) -> frozenset[tuple[int, int]]:
        """Number and start time of everything that runs of it: itself, its session, and its descendants."""
        processes = _processes()
        leader = processes.get(self.pid)
        if self.boot != _boot() or (leader is not None and leader.started != self.started):
            return frozenset()
        family = {pid for pid, status in processes.items() if self.pid in (pid, status.session)}
        while more := {pid for pid, status in processes.items() if status.parent in family} - family:
            family |= more
        return frozenset((pid, processes[pid].started) for pid in family)

    def stop(self) -> None:
        """End the process and its family: first politely, then not."""
        family = self.family()
        if self.boot == _boot():
            _send(signal.SIGTERM, self.pid, self.started)
        if not _holds_within(_GRACE, lambda: not _running(family)):
            self.kill(family)

    def kill(self, family: frozenset[tuple[int, int]] = frozenset()) -> None:
        """End the process and its family at once, as a crash or a power cut would; ``family`` as it was before."""

        def gone() -> bool:
            left = _running(family | self.family())
            for pid, started in left:
                _send(signal.SIGKILL, pid, started)
            return not left

        if not _holds_within(_GRACE, gone):
            raise StackFailed(f"{self.name} (process {self.pid}) does not end")

    def wait(self, ready: Callable[[], bool], seconds: float, pause: float = 0.05) -> None:
        """Wait until it is ready; if it ends, or never is, raise with the end of its log."""

        def ready_or_ended() -> bool:
            if not self.alive():
                raise StackFailed(f"{self.name} ended; {self._last_lines()}")
            return ready()

        if not _holds_within(seconds, ready_or_ended, pause):
            raise StackFailed(f"{self.name} is not ready after {seconds:.0f} s; {self._last_lines()}")

    def _last_lines(self, count: int = 15) -> str:
        lines = Path(self.log).read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
        return "\n".join([f"the last lines of {self.log}:", *(f"  {line[:400]}" for line in lines)])

    def _is_ours(self, status: _Status | None) -> bool:
        return status is not None and status.started == self.started and self.boot == _boot()


def start(
    name: str, command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, log: Path, account: Account
) -> Process:
    """Start a command as ``account`` in a session of its own, its output going to ``log``, a file that stays ours."""
    with log.open("wb") as output:
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
    status = _status(child.pid)  # at worst a zombie's: nobody has waited for it yet
    return Process(name, child.pid, status.started if status else 0, _boot(), str(log))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put signals off until the block ends, so that a process is started *and* written down, or neither."""
    arrived: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(ending)):  # not one that ends us at once, or is ignored
                handlers[ending] = signal.signal(ending, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll a condition until it holds; raise ``StackFailed`` at the deadline."""
    if not _holds_within(seconds, condition):
        raise StackFailed(f"waited {seconds:.0f} s in vain for {what}")


def _holds_within(seconds: float, condition: Callable[[], bool], pause: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _send(number: signal.Signals, pid: int, started: int) -> None:
    """Signal a process, unless it is gone and its number another one's: a descriptor stays with the one it was for."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            status = _status(pid)
            if status is not None and status.started == started:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _running(family: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    return family & {(pid, status.started) for pid, status in _processes().items()}


@dataclass(frozen=True)
class _Status:
    ended: bool
    parent: int
    session: int
    started: int


def _status(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # proc(5); the name, in parentheses, may hold anything
    return _Status(fields[0] in "ZX", int(fields[1]), int(fields[3]), int(fields[19]))


def _processes() -> dict[int, _Status]:
    """Everything that runs on this machine; what has ended and waits for its parent to notice does not."""
    _collect()
    statuses = ((int(entry), _status(int(entry))) for entry in os.listdir("/proc") if entry.isdigit())
    return {pid: status for pid, status in statuses if status is not None and not status.ended}


def _collect() -> None:
    """Notice which of our own children have ended."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            del _children[pid]


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
