"""Free ports on loopback."""

from __future__ import annotations

import random
import socket

from .errors import StackFailed

# Below the range that Linux takes outgoing connections' ports from, so that none of those can take ours.
_RANGE = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Choose ports that nothing listens on at the moment."""
    ports: list[int] = []
    for port in random.sample(_RANGE, 1000):  # so that two stacks that start at once seldom agree
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise StackFailed("found no free ports on 127.0.0.1")
