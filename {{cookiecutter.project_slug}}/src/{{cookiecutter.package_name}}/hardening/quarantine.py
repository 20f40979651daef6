"""The quarantine: where refused messages go, with the reason, before they are acknowledged.

Guards against: evidence and work lost by a refusal (stock Celery acknowledges and drops), refused messages that loop,
and bodies printed to logs.
Rests on: publisher confirms. Only after the broker has confirmed the copy is the original acknowledged; if it cannot be
stored, the original is rejected to the dead-letter queue, whose length the broker bounds.
What is put back into its queue is followed by an operator's countersignature, since not all of it would pass without;
the gate judges it again, and the replay guard lets it run once. It is put back by ``refused``.
Controls: AUT-5.
"""

from __future__ import annotations

import base64
import hashlib
import time
from typing import TYPE_CHECKING, Any

from . import audit, codec
from .claims import Text
from .control import Claims, sign, verify
from .envelope import CONTENT_TYPE, Type
from .errors import BadSignature, ControlDenied, MessageRefused
from .identity import Identity, Role

if TYPE_CHECKING:
    from .harden import Hardening

_TEXT_MAX = 255
#: Between an envelope and its countersignature; in neither of them.
MARK = b"~"
#: Longest mark and countersignature, in bytes: a chain of certificates, and little else.
COUNTERSIGNATURE_MAX = 20 * 1024


class Release(Claims):
    """An operator's countersignature under the one message with this SHA-256."""

    kind = Type.RELEASE
    signers = frozenset({Role.OPERATOR})
    lifetime = 86_400
    of: Text


def countersign(hardening: Hardening, envelope: bytes) -> bytes:
    """Return what a gate takes once more; raises PermissionError if this process is no operator."""
    return envelope + MARK + sign(hardening, Release, of=hashlib.sha256(envelope).hexdigest())


def released(hardening: Hardening, body: bytes) -> tuple[bytes, Identity | None]:
    """Return a delivered envelope, and the operator of this application who has countersigned it, if there is one.

    Raises:
        MessageRefused: the countersignature is no operator's, of another message, or too old.
    """
    envelope, mark, countersignature = body.partition(MARK)
    if not mark:
        return envelope, None
    release, operator = verify(hardening, Release, countersignature)
    if release.of != hashlib.sha256(envelope).hexdigest():
        raise BadSignature("of another message")
    if not hardening.policy.decide_command(operator, "release").allowed:
        raise ControlDenied("this operator may not release messages")
    return envelope, operator


def put(app: Any, envelope: bytes, exchange: str, queue: str) -> None:
    """Publish an envelope; when this returns, the broker has it in that queue."""
    with app.producer_or_acquire() as producer:
        producer.publish(
            envelope,
            exchange=exchange,
            routing_key=queue,
            content_type=CONTENT_TYPE,
            content_encoding="utf-8",
            delivery_mode=2,
            mandatory=True,
            retry=True,
            retry_policy={"max_retries": 2, "interval_start": 0, "interval_step": 0.2},
        )


class Quarantine:
    """Stores refused messages of one application."""

    def __init__(self, app: Any, hardening: Hardening) -> None:
        self._app = app
        self._hardening = hardening

    def store(self, message: Any, refusal: MessageRefused) -> None:
        """Record the refusal, tell a genuine caller, publish the message to the quarantine, then acknowledge it.

        Never raises because of what the message holds, or because broker or backend are away.
        """
        claims = refusal.claims
        audit.record(
            audit.Event.MESSAGE_REFUSED,
            code=refusal.code,
            detail=refusal.detail,
            signer=claims.iss if claims else None,
            task=claims.task.name if claims else None,
            id=claims.task.id if claims else None,
            sha256=hashlib.sha256(_bytes(message.body)).hexdigest(),
        )
        self._tell_caller(refusal)
        try:
            self._publish(self._record(message, refusal))
        except Exception as error:  # whatever stops the copy must not stop the worker or lose the original
            audit.record(audit.Event.QUARANTINE_FAILED, code=refusal.code, error=type(error).__name__)
            if not message.acknowledged:
                message.reject(requeue=False)
            return
        if not message.acknowledged:  # Celery may have done so before it failed
            message.ack()

    def _tell_caller(self, refusal: MessageRefused) -> None:
        try:
            if refusal.claims is not None and refusal.told:
                self._app.backend.store_refusal(refusal)
        except Exception as error:  # the caller then waits until its timeout; the refusal itself stands
            audit.record(audit.Event.CALLER_NOT_TOLD, code=refusal.code, error=type(error).__name__)

    def _publish(self, record: dict[str, Any]) -> None:
        envelope = self._hardening.signer.sign(Type.QUARANTINE, codec.encode(record))
        put(self._app, envelope, self._hardening.broker.quarantine_exchange, self._hardening.topology.quarantine)

    def _record(self, message: Any, refusal: MessageRefused) -> dict[str, Any]:
        body = _bytes(message.body)
        kept = self._hardening.settings.message_max_bytes  # of a longer body its start and its hash are kept
        delivery = message.delivery_info or {}
        where = ("exchange", "routing_key", "redelivered")
        return {
            "iss": str(self._hardening.signer.identity),
            "aud": self._hardening.signer.identity.audience,
            "iat": int(time.time()),
            "code": refusal.code,
            "detail": refusal.detail,
            "delivery": {name: str(delivery.get(name))[:_TEXT_MAX] for name in where},
            "content_type": str(message.content_type)[:_TEXT_MAX],
            "content_encoding": str(message.content_encoding)[:_TEXT_MAX],
            "headers": _text(message.headers)[: 16 * _TEXT_MAX],
            "unparsed": base64.b64encode(message.unparsed[:kept]).decode("ascii"),
            "size": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "body": base64.b64encode(body[:kept]).decode("ascii"),
        }


def _bytes(body: Any) -> bytes:
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else _text(body).encode("ascii")


def _text(value: Any) -> str:
    try:
        return ascii(value)
    except RecursionError:
        return "(nested too deep)"
