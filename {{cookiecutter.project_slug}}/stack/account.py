"""The unprivileged account that servers and workers run as, and the files that belong to it.

Guards against: a broker or a worker that runs as root because a developer's shell does, and keys that others can read.
Rests on: folders that only we can write to. What runs unprivileged can plant no link there for root to follow.
Controls: WRK-1, DAT-3.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class StackFailed(Exception):
    """The stack could not do what was asked: what went wrong and what to do, in one message for a person."""


@dataclass(frozen=True)
class Account:
    """A user and group by number. ``switch`` says whether processes have to change to it."""

    name: str
    uid: int
    gid: int
    switch: bool

    @classmethod
    def unprivileged(cls) -> Account:
        """Our own account, or `nobody` if that is root."""
        if os.geteuid() != 0:  # which need not have a name
            return cls(str(os.geteuid()), os.geteuid(), os.getegid(), switch=False)
        nobody = pwd.getpwnam("nobody")
        return cls("nobody", nobody.pw_uid, nobody.pw_gid, switch=True)

    def popen_options(self) -> dict[str, Any]:
        """Arguments for ``subprocess`` that make the process run as this account."""
        if not self.switch:
            return {"umask": 0o077}
        return {"user": self.uid, "group": self.gid, "extra_groups": [], "umask": 0o077}

    def give(self, path: Path) -> Path:
        """Make the account the owner of a file or folder."""
        if self.switch:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
        return path

    def write(self, path: Path, content: bytes | str) -> Path:
        """Write or replace a file that only this account can read, at no moment anyone else."""
        return self.give(write_own(path.with_name(f"{path.name}.new"), content, 0o600)).replace(path)

    def folder(self, path: Path) -> Path:
        """Make a folder that only this account can enter."""
        path.mkdir(mode=0o700)
        return self.give(path)

    def require_reachable(self, project: Path, folder: Path) -> None:
        """Check that the account can read the project, enter the stack's folder and run our interpreter.

        Raises:
            StackFailed: one sentence saying what it cannot reach.
        """
        check = "import celery, os, sys; open(sys.argv[1]).close(); os.stat(sys.argv[2])"
        command = [sys.executable, "-c", check, str(project / "topology.toml"), str(folder / "lock")]
        options: dict[str, Any] = {"cwd": project, "env": {"PATH": os.defpath}, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, check=False, **options, **self.popen_options())
            if done.returncode == 0:
                return
            error = str(done.stderr)
        except PermissionError as failed:
            error = str(failed)
        elsewhere = "move it to where everyone may enter, or do not run the stack as root"
        python = "make the virtual environment with a Python that everyone may run, such as /usr/bin/python3"
        interpreter = Path(sys.executable)
        for path, advice in (
            (project, elsewhere),
            (folder, elsewhere),
            (interpreter, python),
            (interpreter.resolve(), python),
        ):
            for parent in reversed((path, *path.parents)):
                if not self._may_enter(parent):
                    raise StackFailed(f"{self.name!r} cannot reach {path}, for the mode of {parent}: {advice}")
        raise StackFailed(f"{interpreter} does not work for {self.name!r}: {error.strip()[-500:]}")

    def _may_enter(self, path: Path) -> bool:
        status = path.stat()
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
        return bool(status.st_mode >> shift & 1)


def own_folder(path: Path, mode: int = 0o711) -> Path:
    """Make a folder that stays ours, whatever the umask; others may pass through to what is theirs below."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(mode)
    return path


def write_own(path: Path, content: bytes | str, mode: int) -> Path:
    """Write or replace a file that stays ours: an unprivileged process may at most read it, and never half of it."""
    data = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
    return new.replace(path)
