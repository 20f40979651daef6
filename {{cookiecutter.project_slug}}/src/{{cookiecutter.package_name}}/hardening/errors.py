"""Every refusal of the hardening layer, as one tree of exceptions.

Guards against: a refusal that nobody can match, and a message that fails without saying why.
Rests on: each leaf having a stable ``code``. The codes are the reasons in audit events, in the quarantine and in what a
caller's ``.get()`` raises; ``python -m <package>.hardening.explain CODE`` prints the docstring and the fix.
Controls: AUT-5, LOG-1, TLS-3.

No text here ever holds a value taken from a refused message: texts end up in logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.exceptions import SecurityError

if TYPE_CHECKING:
    from .claims import TaskClaims


class Refused(Exception):
    """Something was refused for a security reason."""

    code = "refused"
    fix = "Look the code up with `explain`."

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        """Return one line: the first sentence of the cause, the detail, the code."""
        cause = (self.__doc__ or "").partition("\n")[0].rstrip(".")
        return f"{cause}{': ' + self.detail if self.detail else ''} [{self.code}]"


class ConfigurationRefused(Refused, SecurityError):
    """A setting is missing, malformed or insecure; ``str()`` is one sentence: setting, reason, fix, code.

    A :exc:`celery.exceptions.SecurityError` too, because ``celery worker`` prints those as one sentence and exits 1.
    """

    code = "config.invalid"
    fix = "The sentence says what to change."

    def __init__(self, setting: str, reason: str, fix: str, code: str = "config.invalid") -> None:
        super().__init__(f"{setting}: {reason}; {fix} [{code}]")
        self.setting, self.reason, self.fix, self.code = setting, reason, fix, code

    def __str__(self) -> str:
        """Return the sentence."""
        return self.detail


#: What the codes of :exc:`ConfigurationRefused` are about.
CONFIGURATION_CODES = {
    "config.invalid": "A setting is missing or malformed.",
    "config.tls": "A connection would be plain, unverified, or configured by something else than the TLS builder.",
    "config.file": "A file is missing, unreadable, not what it should be, or replaceable by every user of the host.",
    "config.key-permissions": "Others on this host can read a private key or a password.",
    "config.trust": "The certificate store is empty, a system store, or holds what is no certificate or current list.",
    "config.certificate": "This process's own signing certificate is one that every reader would refuse.",
    "config.topology": "topology.toml cannot be read, or says something unknown or inconsistent.",
    "config.changed": "Something changed the Celery configuration after harden().",
    "config.stock-signing": "setup_security() would put Celery's own signing back.",
    "queue.unknown": "A message was sent to a queue that is not in the topology.",
    "task.unannotated": "A task has an argument without an annotation, or one that cannot be validated.",
    "worker.root": "A worker, beat or an operator's command was started as root.",
    "worker.pool": "A worker was started with a pool that is not of prefork, threads or solo; gevent, for example.",
    "worker.identity": "A process was started with a certificate that is not of its role in the topology.",
    "beat.schedule": "Beat has another scheduler, a file of last runs that is not its own, or entries it may not send.",
}


class MessageRefused(Refused):
    """A message was refused before Celery acted on it.

    ``claims`` is set once the signature holds and the message is for this application. Its caller is ``told``. What is
    ``curable`` can pass after somebody has changed something, and an operator may release the message then.
    """

    code = "message.refused"
    fix = "The code of the refusal itself says more."
    claims: TaskClaims | None = None
    told = True
    curable = False


# --- intake: what the transport delivers ------------------------------------------------------------------------------


class Unparseable(MessageRefused):
    """The transport could not parse the message's properties or headers."""

    code = "message.unparseable"
    fix = "Find who can publish to the queue: no Celery producer sends this. The raw bytes are in the quarantine."


class Compressed(MessageRefused):
    """The message asks to be decompressed before its sender is known."""

    code = "message.compressed"
    fix = "Send without `compression`: a compressed body expands in the worker before anything can be checked."


class TooLarge(MessageRefused):
    """The message is larger than the limit."""

    code = "message.too-large"
    fix = "Send a reference to the data instead of the data, or raise `message_max_bytes`."


# --- envelope: is it signed, and by whom ------------------------------------------------------------------------------


class Unsigned(MessageRefused):
    """The message is not a signed envelope."""

    code = "message.unsigned"
    fix = "Send it from an application that called `harden(app, settings)`."


class Malformed(MessageRefused):
    """The envelope is not a well-formed compact JWS."""

    code = "message.malformed"
    fix = "Something changed the envelope on its way, or it was made by hand."


class WrongType(MessageRefused):
    """The envelope is of another type than this door accepts."""

    code = "message.type"
    fix = "A result, event or control message was presented as a task, or the other way round: look for a replay."


class BadSignature(MessageRefused):
    """The signature does not fit the message."""

    code = "message.signature"
    fix = "The message was altered, or signed with a key that is not the certificate's."


class UntrustedSigner(MessageRefused):
    """The signer's certificate does not lead to a trusted signing CA."""

    code = "signer.untrusted"
    curable = True
    fix = "Issue the signer's certificate from the signing CA in `security_cert_store`."


class InvalidIdentity(MessageRefused):
    """The signer's certificate does not name exactly one well-formed SPIFFE ID."""

    code = "signer.identity"
    fix = "Issue it with one URI SAN: spiffe://<trust-domain>/<environment>/<application>/<role>[/<name>]."


class NotValidAtIssue(MessageRefused):
    """The signer's certificate had expired, or was not valid yet, when the message was signed."""

    code = "signer.validity"
    fix = "Renew the certificate, and check the clocks of both machines."


class RevokedSigner(MessageRefused):
    """The signer's certificate has been revoked."""

    code = "signer.revoked"
    fix = "Issue a new key and certificate to the signer, if it is still to sign."


class RevocationUnknown(MessageRefused):
    """The revocation list of the signer's CA is out of date, so that nobody knows whether the signer is revoked."""

    code = "signer.revocation"
    curable = True
    fix = "Put the CA's current list into `security_cert_store`, and find out why nothing did."


# --- claims: what was signed ------------------------------------------------------------------------------------------


class BadShape(MessageRefused):
    """The signed claims do not have the shape of a task message."""

    code = "message.shape"
    fix = "Producer and worker run different versions of the hardening layer, or a signer makes messages by hand."


class WrongAudience(MessageRefused):
    """The message is addressed to another application or environment."""

    code = "message.audience"
    fix = "Send to the right environment; never share signing certificates between environments."


class WrongQueue(MessageRefused):
    """The message was signed for a queue that this worker does not serve."""

    code = "message.queue"
    curable = True
    fix = "It was moved between queues, or the topology of producer and worker differ."


class Expired(MessageRefused):
    """The message is older than its signed lifetime."""

    code = "message.expired"
    curable = True
    fix = "Send or release it; raise `message_max_age` if queues are longer than that by design."


class FromTheFuture(MessageRefused):
    """The message was signed later than this clock and the allowed skew."""

    code = "message.future"
    curable = True
    fix = "Synchronise the clocks of producer and worker."


class Replayed(MessageRefused):
    """The message has run already, or this is a copy of one that runs."""

    code = "message.replayed"
    fix = "Find who can publish to the queue and has seen the message. To have it run again, send it again."
    told = False  # the task's own result stands


class DelayTooLong(MessageRefused):
    """The message is to wait longer than workers accept; or it waits in one, where RabbitMQ could keep it."""

    code = "message.delay"
    curable = True
    fix = "Send it by Celery, nearer to its time, or raise `message_max_delay` in producer and worker."


class UnknownTask(MessageRefused):
    """No task of that name is registered here."""

    code = "task.unknown"
    curable = True
    fix = "Deploy the worker that has the task, or correct the name."


class NotAllowed(MessageRefused):
    """The signer may not send this task to this queue."""

    code = "policy.denied"
    curable = True
    fix = "Allow it in topology.toml, if it should be."


class RateExceeded(MessageRefused):
    """The signer, or who it sends for, has had as many messages admitted as topology.toml allows in that time."""

    code = "policy.rate"
    curable = True
    fix = "Send it again later and more slowly, or raise `rate` in the signer's stanza of topology.toml."


class GateFailed(MessageRefused):
    """The gate itself failed on the message, which counts as a refusal."""

    code = "gate.failed"
    fix = "This is a defect: report it with the audit event."


class NotHandled(MessageRefused):
    """Celery's own code failed on the message before its task could start."""

    code = "message.failed"
    fix = "Look for the result backend being away, or for an odd canvas in the quarantined message."


# --- remote control and events ----------------------------------------------------------------------------------------


class ControlDenied(MessageRefused):
    """The signer may not give this command, or may send no message of this kind."""

    code = "control.denied"
    fix = "Name it under `controls` in topology.toml. Monitors may only look: `COMMANDS` in policy.py says what."


class ControlReplayed(MessageRefused):
    """The command was given before, or before this worker started, or there are too many of them."""

    code = "control.replayed"
    fix = "Give it again. If nobody gave it, someone who can write to the broker has recorded it."


class WrongNode(MessageRefused):
    """A worker spoke for a node of another pool."""

    code = "control.node"
    fix = "Look at the worker whose key signed it: node names start with the name of their pool."


# --- task and result --------------------------------------------------------------------------------------------------


class InvalidArguments(Refused):
    """The task's arguments do not fit its annotations."""

    code = "task.arguments"
    fix = "Send what the task's signature asks for; types are not converted."


class ForeignResult(MessageRefused):
    """The stored result belongs to another task or another caller."""

    code = "result.foreign"
    fix = "Someone with write access to the result backend swapped results: rotate its credentials."
