"""Who signed: a SPIFFE ID, parsed strictly.

Guards against: two readings of one name (case, empty or dotted segments, percent escapes, user info, ports).
Rests on: ``spiffe://<trust-domain>/<environment>/<application>/<role>[/<name>]`` in the one URI SAN of the signer's
certificate (SPIFFE-ID standard, section 2; X509-SVID standard, section 2).
Controls: AUT-2, SIG-4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from .errors import InvalidIdentity


class Role(StrEnum):
    """What a signer is; the first thing the policy asks."""

    CLIENT = "client"
    WORKER = "worker"
    BEAT = "beat"
    MONITOR = "monitor"
    OPERATOR = "operator"


TRUST_DOMAIN = r"[a-z0-9](?:[a-z0-9.-]{0,252}[a-z0-9])?"
_SEGMENT = r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?"
_SPIFFE_ID = re.compile(
    rf"spiffe://(?P<trust_domain>{TRUST_DOMAIN})/(?P<environment>{_SEGMENT})/(?P<application>{_SEGMENT})"
    rf"/(?P<role>{'|'.join(Role)})(?:/(?P<name>{_SEGMENT}))?"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A signer's identity."""

    trust_domain: str
    environment: str
    application: str
    role: Role
    name: str | None = None

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, uri: str) -> Identity:
        """Parse a SPIFFE ID.

        Raises:
            InvalidIdentity: it is not of the form above, to the letter.
        """
        match = _SPIFFE_ID.fullmatch(uri)
        # A client named `operator` would have the operator's account and rights.
        if match is None or match["name"] in set(Role):
            raise InvalidIdentity
        domain, environment, application, role, name = match.groups()
        return cls(domain, environment, application, Role(role), name)

    @property
    def audience(self) -> str:
        """The application in its environment: what messages to it are addressed to."""
        return f"spiffe://{self.trust_domain}/{self.environment}/{self.application}"

    @property
    def account(self) -> str:
        """The name topology.toml knows this signer by: its role, or its own name where it has one."""
        return self.name or self.role.value

    def works_for(self, audience: str) -> bool:
        """Whether this is one of that application's own workers, and not a worker of a service that calls it."""
        return self.role is Role.WORKER and self.audience == audience

    def namespace(self, audience: str) -> str:
        """How an application's keys name an owner: ``client.web``; of another one ``<trust domain>/orders/worker``."""
        name = f"{self.role}.{self.name}" if self.name else self.role.value
        return name if self.audience == audience else f"{self.trust_domain}/{self.application}/{name}"

    def __str__(self) -> str:
        """Return the SPIFFE ID."""
        return f"{self.audience}/{self.role}{'/' + self.name if self.name else ''}"
