"""What a stack has started, written down at once, so that any later command can end it.

Guards against: processes that nobody knows of because the command that started them was killed.
Rests on: one folder per stack, a lock on it, and a file that is replaced and never half written.
"""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .account import StackFailed, own_folder, write_own
from .process import Process

_STAYS = {"logs", "lock", ".gitignore"}
# Below the range that Linux takes outgoing connections' ports from, so that none of those can take ours.
_RANGE = range(20_000, 32_000)


class Record:
    """The ports and processes of the stack in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "stack.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out; make the folder if need be, and refuse one that is not a stack's."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "lock").exists():
            raise StackFailed(f"{self.folder} holds something that is not a stack's: name another folder")
        own_folder(self.folder)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / ".gitignore").write_text("*\n", encoding="ascii")
            yield

    @property
    def exists(self) -> bool:
        """Whether a stack was started and not taken down."""
        return self._file.exists()

    @property
    def ready(self) -> bool:
        """Whether the servers were started to the end."""
        return self.exists and bool(self._load()["ready"])

    @property
    def ports(self) -> dict[str, int]:
        """Port numbers by what listens there."""
        return dict(self._load()["ports"])

    @property
    def processes(self) -> list[Process]:
        """What was started, oldest first."""
        return [Process(**process) for process in self._load()["processes"]] if self.exists else []

    def begin(self, ports: Mapping[str, int]) -> None:
        """Start a new record."""
        own_folder(self.folder / "logs", 0o700)
        self._save({"ready": False, "ports": dict(ports), "processes": []})

    def complete(self) -> None:
        """Write down that the servers were started to the end."""
        self._save({**self._load(), "ready": True})

    def add(self, process: Process) -> Process:
        """Write down a process."""
        state = self._load()
        self._save({**state, "processes": [*state["processes"], asdict(process)]})
        return process

    def drop(self, process: Process) -> None:
        """Forget a process that has ended."""
        state = self._load()
        self._save({**state, "processes": [entry for entry in state["processes"] if entry != asdict(process)]})

    def log(self, name: str) -> Path:
        """Where the output of a process goes."""
        return self.folder / "logs" / f"{name}.log"

    def clear(self) -> None:
        """Remove everything but the logs."""
        for entry in self.folder.iterdir():
            if entry.name in _STAYS:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _load(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StackFailed(f"no stack is up in {self.folder}: run `make up`") from None

    def _save(self, state: dict[str, Any]) -> None:
        write_own(self.folder / "stack.json.new", json.dumps(state, indent=1), 0o600).replace(self._file)


def free_ports(count: int) -> list[int]:
    """Choose ports that nothing listens on at the moment."""
    ports: list[int] = []
    for port in random.sample(_RANGE, 1000):  # nosec B311 # so that two stacks that start at once seldom agree
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise StackFailed("found no free ports on 127.0.0.1")


def read_environment(file: Path) -> dict[str, str]:
    """Read what a role's environment file says."""
    return dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines())
