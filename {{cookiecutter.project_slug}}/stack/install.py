"""Finds the servers; as root on Debian or Ubuntu installs what is missing, without starting it.

Guards against: an installation that opens a broker on all interfaces, as Debian's packages do at once and at each boot.
Rests on: ``policy-rc.d``, which forbids the start during the installation, and on units that are disabled after it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import backend, broker
from .account import StackFailed

_POLICY = Path("/usr/sbin/policy-rc.d")
_SERVERS = {"rabbitmq-server": broker.find_server, "redis-server": backend.find_server}
_FORBID = "#!/bin/sh\n# put here for an installation by `python -m stack`\nexit 101\n"


def require_servers(*packages: str) -> None:
    """Make sure that the servers' programs are there.

    Args:
        packages: names of ``_SERVERS``.

    Raises:
        StackFailed: they are not, and it says which command installs them; or that command failed.
    """
    missing = _missing(packages)
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        command = f"apt-get install {' '.join(missing)}" if shutil.which("apt-get") else "your system's package manager"
        raise StackFailed(
            f"{' and '.join(missing)} must be installed: as root, run `{command}`, and disable the services it starts"
        )
    # Units have their package's name. Erlang's port mapper comes with RabbitMQ, unless it was there for something else.
    units = [*missing, *(["epmd.service", "epmd.socket"] if shutil.which("epmd") is None else [])]
    with _autostart_prevented():
        _run("apt-get", "update")
        _run("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    if shutil.which("systemctl"):
        for unit in units:
            _run("systemctl", "disable", unit, may_fail=True)  # not every release has each of them
    if still := _missing(packages):
        raise StackFailed(f"{' and '.join(still)}: installed, and yet not found")


def _missing(packages: Sequence[str]) -> list[str]:
    missing = []
    for package in packages:
        try:
            _SERVERS[package]()
        except StackFailed:
            missing.append(package)
    return missing


@contextmanager
def _autostart_prevented() -> Iterator[None]:
    """Put a ``policy-rc.d`` that forbids every start in place of the present one, if any."""
    kept = _POLICY.with_suffix(".d-before-stack")
    print(f"+ {_POLICY}: forbid packages to start services", flush=True)
    if _POLICY.exists() and _POLICY.read_text(encoding="utf-8") != _FORBID:  # ours, if an earlier run was killed
        _POLICY.rename(kept)
    try:
        _POLICY.write_text(_FORBID, encoding="ascii")
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(_POLICY)
        print(f"+ {_POLICY}: as before", flush=True)


def _run(*command: str, may_fail: bool = False) -> None:
    print("+", *command, flush=True)
    environment: dict[str, str] = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(_quiet(command), env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise StackFailed(f"`{' '.join(command)}` failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def _quiet(command: Sequence[str]) -> list[str]:
    return [command[0], "-qq", *command[1:]] if command[0] == "apt-get" else list(command)
