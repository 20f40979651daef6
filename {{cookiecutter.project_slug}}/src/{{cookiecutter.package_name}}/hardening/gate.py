"""The gate: the one place where a delivered task message becomes a request, or is refused.

Guards against: everything a broker, or whoever can write to it, may deliver to a worker.
Rests on: the intake having turned parse errors into refusals, and on being called before any Celery code looks at the
message. What passes is rebuilt from signed claims; of the delivery only what the broker itself set remains.
Controls: SIG-1, SIG-3, SIG-4, SIG-5, SER-1, SER-2, AUT-1, AUT-3, INT-1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import audit, canvas, errors
from .claims import PROPERTIES, TaskClaims, request_headers, utc
from .envelope import Type, enveloped
from .identity import Identity
from .quarantine import COUNTERSIGNATURE_MAX, Quarantine, released
from .replay import Claim, Guard, late

if TYPE_CHECKING:
    from .harden import Hardening


class Gate:
    """Admits or refuses task messages for one application."""

    def __init__(self, app: Any, hardening: Hardening) -> None:
        self._app, self._hardening = app, hardening
        self._quarantine = Quarantine(app, hardening)
        self.guard = Guard(hardening.replay_store, hardening.settings)

    def receive(self, message: Any) -> Admitted | None:
        """Return what Celery may act on.

        Or None: the message was refused and has gone to the quarantine, or the replay guard keeps it for later.
        """
        claim = None
        try:
            admitted = self.admit(message)
            claim = self.guard.claim(message, admitted.claims)
            if claim is None:
                return None
            # After the claim: a copy is no message of its signer's, and is not counted. What comes again was counted.
            if not admitted.delivery_info["redelivered"]:
                claim.counted = self._hardening.policy.admit(admitted.claims)
        except errors.MessageRefused as refusal:
            if claim is not None:
                refusal.claims = admitted.claims
                claim.settle(again=True)  # it has not run, and may be released
            self._quarantine.store(message, refusal)
            return None
        admitted.claim = claim
        return admitted

    def give_up(self, message: Any, admitted: Admitted, error: Exception) -> None:
        """Quarantine an admitted message that Celery's own code has failed on."""
        admitted.claim.settle()
        refusal = errors.NotHandled(type(error).__name__)
        refusal.claims = admitted.claims
        self._quarantine.store(message, refusal)

    def admit(self, message: Any) -> Admitted:
        """Verify ``message`` and return what Celery may act on.

        Raises:
            MessageRefused: a leaf that says why. Its ``claims`` are set when a genuine signer made the message for this
                application, so that the caller can be told. Nothing else is ever raised.
        """
        try:
            longest = self._hardening.settings.message_max_bytes + COUNTERSIGNATURE_MAX
            envelope, operator = released(self._hardening, enveloped(message, longest))
            claims, grace = self._verified(envelope), late(self._hardening.settings) if operator else 0
            self._judge(claims, grace)
            if operator:
                audit.record(audit.Event.RELEASED, signer=operator, task=claims.task.name, id=claims.task.id)
            return self._rebuilt(message, claims, grace)
        except errors.MessageRefused:
            raise
        except Exception as error:  # a defect here must refuse the message, not end the worker
            raise errors.GateFailed(type(error).__name__) from error

    def _verified(self, envelope: bytes) -> TaskClaims:
        """Return the claims of a message that a genuine signer made for this application."""
        verified = self._hardening.verify(Type.TASK, envelope)
        claims = TaskClaims.parse(verified.payload)
        if claims.iss != str(verified.signer.identity):
            raise errors.BadShape("iss")
        verified.signer.check_issue(claims.iat)
        if claims.aud != self._hardening.audience:
            raise errors.WrongAudience
        if claims.owner != claims.iss and not verified.signer.identity.works_for(claims.aud):
            raise errors.BadShape("owner")
        Identity.parse(claims.owner)
        return claims

    def _judge(self, claims: TaskClaims, grace: int) -> None:
        """Refuse genuine messages that come too late, to the wrong place, or from someone who may not send them.

        ``grace`` is for how many seconds after its expiry it may still run.
        """
        try:
            self._check(claims, grace)
        except errors.MessageRefused as refusal:
            refusal.claims = claims
            raise

    def _check(self, claims: TaskClaims, grace: int) -> None:
        settings = self._hardening.settings
        now, skew, task = time.time(), settings.clock_skew, claims.task
        if claims.iat > now + skew:
            raise errors.FromTheFuture
        start = max(claims.iat, utc(task.eta).timestamp() if task.eta else 0)
        # What waits here and not at the broker, which could keep it, would keep others out of the worker.
        if start > min(claims.iat + settings.message_max_delay, now + skew + self._hardening.broker.early):
            raise errors.DelayTooLong
        if claims.exp > start + settings.message_max_age + 1:
            raise errors.BadShape("exp")
        if claims.exp + grace < now - skew:
            raise errors.Expired
        if claims.queue not in self._hardening.consumed:
            raise errors.WrongQueue
        if task.name not in self._app.tasks:
            raise errors.UnknownTask
        signer, origin = Identity.parse(claims.iss), Identity.parse(claims.origin)
        policy = self._hardening.policy  # one for all that the message names
        policy.check(signer, origin, task.name, claims.queue)
        for name, queue in canvas.named(claims):
            policy.check(signer, origin, name, queue and self._hardening.topology.broker_name(queue))

    def _still_trusts(self, message: Any, claims: TaskClaims, grace: int) -> bool:
        """Say whether an admitted message may start: it is in time and allowed, its signer is not revoked by now.

        If it may not, it goes to the quarantine.
        """
        try:
            self._hardening.verifier.certificate(Type.TASK, enveloped(message).partition(b".")[0])
            self._judge(claims, grace)
        except errors.MessageRefused as refusal:
            self._quarantine.store(message, refusal)
            return False
        return True

    def _rebuilt(self, message: Any, claims: TaskClaims, grace: int) -> Admitted:
        task = self._app.tasks[claims.task.name]
        hard = _smaller(claims.task.timelimit[0], task.time_limit)
        # A soft limit behind the hard one would keep Celery from arming the hard one at all.
        soft = _smaller(_smaller(claims.task.timelimit[1], task.soft_time_limit), hard)
        return Admitted(
            message,
            claims,
            headers={**request_headers(claims), "timelimit": [hard, soft]},
            properties={name: getattr(claims.task, name) for name in PROPERTIES},
            delivery_info={
                "exchange": self._hardening.broker.exchange,
                "routing_key": claims.queue,
                "redelivered": bool((message.delivery_info or {}).get("redelivered")),
            },
            body=(claims.args, claims.kwargs, claims.embed.model_dump()),
            still_trusted=lambda: self._still_trusts(message, claims, grace),
        )


@dataclass(eq=False, repr=False)  # its arguments are not shown
class Admitted:
    """What Celery gets instead of the delivered message: only signed claims, and the broker's redelivered flag.

    It is decoded already and has no content type, so neither Celery nor a pool child decodes anything again. How it is
    acknowledged settles its claim.
    """

    _message: Any
    claims: TaskClaims
    headers: dict[str, Any]
    properties: dict[str, Any]
    delivery_info: dict[str, Any]
    body: tuple[list[Any], dict[str, Any], dict[str, Any]]
    still_trusted: Callable[[], bool]
    claim: Claim = field(init=False)
    content_type = content_encoding = None

    @property
    def payload(self) -> Any:
        """What Celery's strategies look at: the body."""
        return self.body

    def ack_log_error(self, *args: Any, **kwargs: Any) -> None:
        """Acknowledge the message, which is done."""
        self.claim.settle()
        self._message.ack_log_error(*args, **kwargs)

    def reject_log_error(self, logger: Any, errors: Any, requeue: bool = False) -> None:
        """Reject the message; only one that is put back into its queue may be claimed again."""
        self.claim.settle(again=requeue)
        self._message.reject_log_error(logger, errors, requeue=requeue)


def _smaller(claimed: float | None, own: float | None) -> float | None:
    return min((limit for limit in (claimed, own) if limit is not None), default=None)
