"""Reading of key, password and certificate files, and writing of any, in the one place that knows which modes are safe.

Guards against: a private key that other users of the host can read, a trust anchor that they can replace, a path whose
meaning depends on the folder a process happens to start in, and a file that a crash has left half written.
Rests on: the modes of a POSIX file system (a Windows drive under WSL has none: no key is accepted there), and
on the checks being made on the opened file, so that it cannot be exchanged between check and read.
Controls: TLS-3.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import audit
from .errors import ConfigurationRefused

#: Bytes. A chain of certificates is a few kilobytes; anything near this is the wrong file.
LARGEST_FILE = 1024 * 1024

_WINDOWS_DRIVE = re.compile(r"/mnt/[a-z](/|$)")


def read_private_file(setting: str, path: Path) -> bytes:
    """Read a private key or a password; refuse one that somebody else could read.

    World access is always refused. Group read is accepted where it is how an orchestrator hands over a
    secret: a file of root's that this process cannot write (Kubernetes under ``fsGroup``: 0440 root:group),
    and a file below ``$CREDENTIALS_DIRECTORY`` (systemd's ``LoadCredential``, whose access control list shows
    as group read).

    Args:
        setting: the name a person set, for the refusal.
        path: absolute; symbolic links are followed, since Kubernetes mounts secrets through them.

    Raises:
        ConfigurationRefused: ``config.file`` or ``config.key-permissions``.
    """
    content, status, real = _read(setting, path)
    mode, reason = stat.S_IMODE(status.st_mode), ""
    if mode & 0o077 and _on_windows_drive(real):
        reason = f"{path} is on a Windows drive, where modes mean nothing and every user can read it"
        fix = "keep keys on WSL's own file system, for example below your home folder"
    elif mode & 0o007:
        reason = f"every user of this host can access {path} (mode {mode:04o})"
        fix = f"run `chmod 600 {path}` and replace the secret if others may have read it"
    elif mode & 0o070 and not _handed_over(real, status, mode):
        reason = f"the group of {path} can access it (mode {mode:04o})"
        fix = f"run `chmod 600 {path}`, or let root own it with mode 0440 and a group of this process alone"
    if reason:
        raise ConfigurationRefused(setting, reason, fix, "config.key-permissions")
    return content


def read_public_file(setting: str, path: Path) -> bytes:
    """Read a certificate, a trust anchor or a revocation list; refuse one that every user could replace.

    Args:
        setting: the name a person set, for the refusal.
        path: absolute.

    Raises:
        ConfigurationRefused: ``config.file``.
    """
    content, status, real = _read(setting, path)
    if status.st_mode & stat.S_IWOTH and not _on_windows_drive(real):
        reason = f"every user of this host can replace {path} (mode {stat.S_IMODE(status.st_mode):04o})"
        fix = f"run `chmod o-w {path}` and compare its content with the original"
        raise ConfigurationRefused(setting, reason, fix, "config.file")
    return content


def fingerprint(path: Path) -> object:
    """Return what changes when a file, or one of a folder, is replaced, rewritten, or given another mode or owner."""
    try:
        status = path.stat()  # of what a link leads to: Kubernetes replaces the link
        files = sorted(file for kind in ("*.pem", "*.crl", "*/*.pem", "*/*.crl") for file in path.glob(kind))
    except OSError as error:
        return error.errno
    own = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return path, own, [fingerprint(each) for each in files]


class Watched:
    """What files say now. Each process looks at them when they are used, at most once a second.

    What is refused leaves in force what was, with an audit event, and is tried again.
    """

    #: Seconds between two looks at the files.
    LOOK = 1.0

    def __init__(self, what: str, paths: Iterable[Path | None], **parts: Callable[[], str | None]) -> None:
        """Look at the files; what is read of them after that is not older.

        Args:
            what: the first word of the events.
            paths: of what is looked at.
            parts: what loads each part, in order; it may raise, or return what is to be said of it.
        """
        self._what, self._paths, self._parts = what, list(paths), parts
        self._problems: dict[str, str] = {}
        self._next_look = 0.0
        self._seen: object = self._fingerprint()

    def look(self) -> None:
        """Load what has changed."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + self.LOOK  # before anything else, so that no other thread looks too
            self.reload_if(bool(self._problems))

    def reload_if(self, again: bool) -> None:
        """Load if a file has changed since, or ``again``."""
        if (seen := self._fingerprint()) == self._seen and not again:
            return
        notes, problems = {}, {}
        for name, load in self._parts.items():
            try:
                notes[name] = load()
            except Exception as error:  # whatever a file makes a parser raise, it must stop no message
                problems[name] = str(error) or repr(error)
        self._seen = seen
        if not problems or problems != self._problems:
            event = audit.Event(f"{self._what}.{'refused' if problems else 'loaded'}")
            audit.record(event, **(problems or {name: note for name, note in notes.items() if note}))
        self._problems = problems

    def _fingerprint(self) -> object:
        return [path and fingerprint(path) for path in self._paths]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that only this process' user can read: all of it or, after a crash, none.

    Raises:
        OSError: the folder is missing, full or not ours to write to.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(setting: str, path: Path) -> tuple[bytes, os.stat_result, Path]:
    def refuse(reason: str, fix: str) -> ConfigurationRefused:
        return ConfigurationRefused(setting, reason, fix, "config.file")

    if not path.is_absolute():
        reason = f"{path} is a relative path, whose meaning depends on the folder the process starts in"
        raise refuse(reason, "write the absolute path")
    try:
        # Non-blocking, since opening a named pipe would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refuse(f"{path} does not exist", "correct the path or create the file") from None
    except OSError as error:
        reason = f"{path} cannot be read by user {os.geteuid()} ({error.strerror})"
        raise refuse(reason, "give the file to the user this process runs as") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refuse(f"{path} is not a file", "name one file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(LARGEST_FILE + 1)
    finally:
        os.close(descriptor)
    if not content.strip():
        raise refuse(f"{path} is empty", "write the key, certificate or password into it")
    if len(content) > LARGEST_FILE:
        raise refuse(f"{path} is larger than {LARGEST_FILE} bytes", "name the right file")
    real = Path(os.path.realpath(path))
    for folder in {path.parent, real.parent}:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX and not _on_windows_drive(real):
            reason = f"every user of this host can replace files in {folder} (mode {stat.S_IMODE(mode):04o})"
            raise refuse(reason, f"run `chmod o-w {folder}`")
    return content, status, real


def _handed_over(real: Path, status: os.stat_result, mode: int) -> bool:
    """Whether group read is an orchestrator's way of giving this process, and nobody else, the secret."""
    if mode & 0o030:
        return False
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and real.is_relative_to(os.path.realpath(credentials)):
        return True
    return status.st_uid == 0 and not os.access(real, os.W_OK)


def _on_windows_drive(real: Path) -> bool:
    return bool(_WINDOWS_DRIVE.match(str(real))) and "microsoft" in platform.release().lower()
