"""Every refusal of the hardening layer, as one tree of exceptions.

Guards against: a refusal that nobody can match, and a message that fails without saying why.
Rests on: each leaf carrying a stable ``code``; the codes are the reasons in audit events, in the quarantine and in
what a caller's ``.get()`` raises. ``python -m <package>.hardening.explain CODE`` prints cause and fix.
Controls: AUT-5, LOG-1, TLS-3.
"""

from __future__ import annotations

from typing import ClassVar

from celery.exceptions import SecurityError


class Refused(Exception):
    """Something was refused for a security reason.

    ``code`` is stable and safe to show to anyone; ``str()`` never holds a value from the refused message.
    """

    code: ClassVar[str] = "refused"


class ConfigurationRefused(Refused, SecurityError):
    """A setting is missing, malformed or insecure. ``str()`` is one sentence: setting, reason, fix, code."""

    def __init__(self, setting: str, reason: str, fix: str, code: str = "config.invalid") -> None:
        super().__init__(f"{setting}: {reason}; {fix} [{code}]")
        self.setting, self.reason, self.fix = setting, reason, fix
        self.code = code  # type: ignore[misc]  # one class, many codes: settings are many and their class is not caught by kind
