"""Finds the servers; on Debian and Ubuntu, and as root, installs what is missing without starting it.

Guards against: an installation that opens a broker on all interfaces, as Debian's packages do at once and at each boot.
Rests on: ``policy-rc.d`` for the start during installation, and on disabling the units for the next boot.
"""

from __future__ import annotations

from . import backend, broker
from .errors import StackFailed


def require_servers() -> None:
    """Make sure that the servers' programs are there."""
    missing = []
    for package, find in (("rabbitmq-server", lambda: broker.find("rabbitmq-server")), ("redis-server", backend.find)):
        try:
            find()
        except StackFailed:
            missing.append(package)
    if missing:
        raise StackFailed(f"missing: run `apt-get install {' '.join(missing)}`")
