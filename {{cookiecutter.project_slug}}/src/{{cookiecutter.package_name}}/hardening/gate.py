"""The gate: the one place where a delivered task message becomes a request, or is refused.

Guards against: everything a broker, or whoever can write to it, may deliver to a worker.
Rests on: the intake having turned parse errors into refusals, and on being called before any Celery code looks at the
message. What passes is rebuilt from signed claims; of the delivery only what the broker itself set remains.
Controls: SIG-1, SIG-3, SIG-4, SER-1, SER-2, AUT-1, AUT-3, INT-1.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from . import canvas
from .claims import TaskClaims, request_headers, utc
from .envelope import CONTENT_TYPE, Type
from .errors import (
    BadShape,
    DelayTooLong,
    Expired,
    FromTheFuture,
    GateFailed,
    MessageRefused,
    NotHandled,
    TooLarge,
    UnknownTask,
    Unsigned,
    WrongAudience,
    WrongQueue,
)
from .identity import Identity, Role
from .quarantine import Quarantine

if TYPE_CHECKING:
    from .harden import Hardening


class Gate:
    """Admits or refuses task messages for one application."""

    def __init__(self, app: Any, hardening: Hardening) -> None:
        self._app = app
        self._hardening = hardening
        self._quarantine = Quarantine(app, hardening)

    def receive(self, message: Any) -> Admitted | None:
        """Return what Celery may act on, or None when the message was refused and has gone to the quarantine."""
        try:
            return self.admit(message)
        except MessageRefused as refusal:
            self._quarantine.store(message, refusal)
            return None

    def give_up(self, message: Any, admitted: Admitted, error: Exception) -> None:
        """Quarantine an admitted message that Celery's own code has failed on."""
        refusal = NotHandled(type(error).__name__)
        refusal.claims = admitted.claims
        self._quarantine.store(message, refusal)

    def admit(self, message: Any) -> Admitted:
        """Verify ``message`` and return what Celery may act on.

        Raises:
            MessageRefused: a leaf that says why. Its ``claims`` are set when a genuine signer made the message for this
                application, so that the caller can be told. Nothing else is ever raised.
        """
        try:
            claims = self._verified(message)
            try:
                self._judge(claims)
            except MessageRefused as refusal:
                refusal.claims = claims
                raise
            return self._rebuilt(message, claims)
        except MessageRefused:
            raise
        except Exception as error:  # a defect here must refuse the message, not end the worker
            raise GateFailed(type(error).__name__) from error

    def _verified(self, message: Any) -> TaskClaims:
        """Return the claims of a message that a genuine signer made for this application."""
        settings = self._hardening.settings
        if message.refusal is not None:
            raise message.refusal
        body = message.body
        if body is not None and len(body) > settings.message_max_bytes:
            raise TooLarge
        if message.content_type != CONTENT_TYPE or not isinstance(body, bytes | str | memoryview):
            raise Unsigned
        verified = self._hardening.verifier.verify(Type.TASK, bytes(body) if isinstance(body, memoryview) else body)
        claims = TaskClaims.parse(verified.payload)
        if claims.iss != str(verified.signer.identity):
            raise BadShape("iss")
        verified.signer.check_issue(claims.iat)
        if claims.aud != self._hardening.signer.identity.audience:
            raise WrongAudience
        if claims.owner != claims.iss and verified.signer.identity.role is not Role.WORKER:
            raise BadShape("owner")
        return claims

    def _judge(self, claims: TaskClaims) -> None:
        """Refuse genuine messages that come too late, to the wrong place, or from someone who may not send them."""
        settings = self._hardening.settings
        now, skew, task = time.time(), settings.clock_skew, claims.task
        if claims.iat > now + skew:
            raise FromTheFuture
        start = max(claims.iat, utc(task.eta).timestamp() if task.eta else 0)
        if start > claims.iat + settings.message_max_delay:
            raise DelayTooLong
        if claims.exp > start + settings.message_max_age + 1:
            raise BadShape("exp")
        if claims.exp < now - skew:
            raise Expired
        if claims.queue not in self._hardening.consumed:
            raise WrongQueue
        if task.name not in self._app.tasks:
            raise UnknownTask
        signer, origin = Identity.parse(claims.iss), Identity.parse(claims.origin)
        self._hardening.policy.check(signer, origin, task.name, claims.queue)
        for name, queue in canvas.named(claims):
            self._hardening.policy.check(signer, origin, name, queue and self._hardening.topology.broker_name(queue))

    def _rebuilt(self, message: Any, claims: TaskClaims) -> Admitted:
        task = self._app.tasks[claims.task.name]
        hard = _smaller(claims.task.timelimit[0], task.time_limit)
        # A soft limit behind the hard one would keep Celery from arming the hard one at all.
        soft = _smaller(_smaller(claims.task.timelimit[1], task.soft_time_limit), hard)
        return Admitted(
            message,
            claims,
            headers={**request_headers(claims), "timelimit": [hard, soft]},
            properties={
                "correlation_id": claims.task.correlation_id,
                "reply_to": claims.task.reply_to,
                "priority": claims.task.priority,
            },
            delivery_info={
                "exchange": self._hardening.broker.exchange,
                "routing_key": claims.queue,
                "redelivered": bool((message.delivery_info or {}).get("redelivered")),
            },
            body=(claims.args, claims.kwargs, claims.embed.model_dump()),
        )


class Admitted:
    """What Celery gets instead of the delivered message: only signed claims, and the broker's redelivered flag.

    It is decoded already and has no content type, so neither Celery nor a pool child decodes anything again.
    """

    content_type = content_encoding = None

    def __init__(
        self,
        message: Any,
        claims: TaskClaims,
        headers: dict[str, Any],
        properties: dict[str, Any],
        delivery_info: dict[str, Any],
        body: tuple[list[Any], dict[str, Any], dict[str, Any]],
    ) -> None:
        self.claims = claims
        self.headers = headers
        self.properties = properties
        self.delivery_info = delivery_info
        self.body = self.payload = body
        self.ack_log_error = message.ack_log_error
        self.reject_log_error = message.reject_log_error


def _smaller(claimed: float | None, own: float | None) -> float | None:
    return min((limit for limit in (claimed, own) if limit is not None), default=None)
