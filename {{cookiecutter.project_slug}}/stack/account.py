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

from .errors import StackFailed


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
        entry = pwd.getpwuid(os.geteuid()) if os.geteuid() else pwd.getpwnam("nobody")
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, switch=os.geteuid() == 0)

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
        """Write a file that only this account can read, at no moment anyone else."""
        return self.give(write_own(path, content, 0o600))

    def folder(self, path: Path) -> Path:
        """Make a folder that only this account can enter."""
        path.mkdir(mode=0o700)
        return self.give(path)

    def require_reachable(self, project: Path) -> None:
        """Check that the account can read the project and run our interpreter with what is installed for it.

        Raises:
            StackFailed: one sentence saying what it cannot reach.
        """
        try:
            probe = subprocess.run(
                [sys.executable, "-c", "import celery, sys; open(sys.argv[1]).close()", project / "topology.toml"],
                cwd=project,
                env={"PATH": os.defpath},
                capture_output=True,
                text=True,
                check=False,
                **self.popen_options(),
            )
        except OSError:
            self._explain(project)
            raise
        if probe.returncode:
            self._explain(project)
            raise StackFailed(f"{sys.executable} does not work for {self.name!r}: {probe.stderr.strip()[-500:]}")

    def _explain(self, project: Path) -> None:
        for path, advice in (
            (project, "move the project to a folder that everyone may enter, or do not run the stack as root"),
            (Path(sys.executable).resolve(), "make the virtual environment with another one, such as /usr/bin/python3"),
        ):
            for parent in reversed((path, *path.parents)):
                if not self._may_enter(parent):
                    raise StackFailed(f"{self.name!r} cannot reach {path}, because of the mode of {parent}: {advice}")

    def _may_enter(self, path: Path) -> bool:
        status = path.stat()
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
        return bool(status.st_mode >> shift & 1)


def write_own(path: Path, content: bytes | str, mode: int) -> Path:
    """Write a file that stays ours: an unprivileged process may at most read it."""
    data = content.encode() if isinstance(content, str) else content
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
    return path
