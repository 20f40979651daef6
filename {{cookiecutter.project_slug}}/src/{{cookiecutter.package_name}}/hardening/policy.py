"""The decision: may this origin, through this signer, send this task to this queue?

Guards against: a low-privilege signer that sends what it should not, itself or through a worker; everything not allowed
in topology.toml is denied.
Rests on: identities from verified certificates, and on one file for all rules.
Controls: AUT-1, AUT-2, AUT-3.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

from .errors import NotAllowed
from .identity import Identity, Role
from .topology import Topology

#: Roles whose messages may carry a task at all. A monitor only watches.
_SENDERS = frozenset({Role.CLIENT, Role.BEAT, Role.WORKER, Role.OPERATOR})


class Policy:
    """Decides from the topology of one application in one environment.

    The answer for each (signer, task, queue) is remembered, so its cost does not grow with the number of rules.
    """

    def __init__(self, topology: Topology, own: Identity) -> None:
        self._topology = topology
        self._own = own
        self._decide = lru_cache(maxsize=4096)(self._matches)

    def check(self, signer: Identity, origin: Identity, task: str, queue: str | None) -> None:
        """Return if both the signer and the origin may; ``queue`` is a name on the broker, None any of theirs.

        Raises:
            NotAllowed: one of them may not.
        """
        if origin != signer and signer.role is not Role.WORKER:
            raise NotAllowed("only a worker sends on behalf of another")
        for identity in {signer, origin}:
            if not self._decide(identity, task, queue):
                raise NotAllowed(f"{identity.role} may not send this task to this queue")

    def _matches(self, identity: Identity, task: str, queue: str | None) -> bool:
        if identity.audience != self._own.audience or identity.role not in _SENDERS:
            return False
        rules = self._topology.pools if identity.role is Role.WORKER else self._topology.callers
        rule = rules.get(identity.account)
        return (
            rule is not None
            and any(fnmatchcase(task, pattern) for pattern in rule.sends)
            and queue in {None, *(self._topology.queue(name).broker_name for name in rule.publishes_to)}
        )
