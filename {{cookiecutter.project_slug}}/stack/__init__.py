"""The local stack: broker, backend, a worker and beat on loopback over TLS, with a throw-away PKI.

Guards against: development against a broker that is weaker than production's. The servers run the files of ``deploy/``.
Rests on: Linux' ``/proc`` for ending exactly the processes that were started here, and nothing else.
Controls: TLS-1, TLS-2, BRK-1, BRK-2, BRK-3, DAT-3.
"""

from .account import StackFailed
from .stack import Stack

__all__ = ["Stack", "StackFailed"]
