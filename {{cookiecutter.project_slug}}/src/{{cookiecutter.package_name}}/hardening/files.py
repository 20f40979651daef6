"""Reading of key, password and certificate files, in the one place that knows which modes are safe.

Guards against: a private key that other users of the host can read, a trust anchor that they can replace, and
a path whose meaning depends on the folder a process happens to start in.
Rests on: the modes of a POSIX file system (a Windows drive under WSL has none: no key is accepted there), and
on the checks being made on the opened file, so that it cannot be exchanged between check and read.
Controls: TLS-3.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from pathlib import Path

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
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 and _on_windows_drive(real):
        raise ConfigurationRefused(
            setting,
            f"{path} is on a Windows drive, where modes mean nothing and every user can read it",
            "keep keys on WSL's own file system, for example below your home folder",
            "config.key-permissions",
        )
    if mode & 0o007:
        raise ConfigurationRefused(
            setting,
            f"every user of this host can access {path} (mode {mode:04o})",
            f"run `chmod 600 {path}` and replace the secret if others may have read it",
            "config.key-permissions",
        )
    if mode & 0o070 and not _handed_over(real, status, mode):
        raise ConfigurationRefused(
            setting,
            f"the group of {path} can access it (mode {mode:04o})",
            f"run `chmod 600 {path}`, or let root own it with mode 0440 and a group of this process alone",
            "config.key-permissions",
        )
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
        raise ConfigurationRefused(
            setting,
            f"every user of this host can replace {path} (mode {stat.S_IMODE(status.st_mode):04o})",
            f"run `chmod o-w {path}` and compare its content with the original",
            "config.file",
        )
    return content


def _read(setting: str, path: Path) -> tuple[bytes, os.stat_result, Path]:
    def refuse(reason: str, fix: str) -> ConfigurationRefused:
        return ConfigurationRefused(setting, reason, fix, "config.file")

    if not path.is_absolute():
        raise refuse(
            f"{path} is a relative path, whose meaning depends on the folder the process starts in",
            "write the absolute path",
        )
    try:
        # Non-blocking, since opening a named pipe would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refuse(f"{path} does not exist", "correct the path or create the file") from None
    except OSError as error:
        raise refuse(
            f"{path} cannot be read by user {os.geteuid()} ({error.strerror})",
            "give the file to the user this process runs as",
        ) from None
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
            raise refuse(
                f"every user of this host can replace files in {folder} (mode {stat.S_IMODE(mode):04o})",
                f"run `chmod o-w {folder}`",
            )
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
