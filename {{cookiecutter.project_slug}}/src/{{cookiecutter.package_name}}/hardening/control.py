"""Remote control and events, signed: what operators tell workers, what workers answer, and what they report.

Guards against: anyone who can write to the broker, or holds any trusted key, revoking tasks or stopping workers; a
command played again; a foreign reply or event that misleads or breaks who waits for it; arguments and passwords shown.
Rests on: kombu's ``Mailbox`` and ``Node`` and Celery's dispatcher and receiver, which get only what was verified here.
Each process has a queue that nobody else may read, and the broker says who may write to which exchange.
Controls: AUT-4, SIG-1, INT-2.

An operator revokes an id, whoever's task it is: callers' ids are random, and one who copies another's shares its fate.
Workers keep revoked ids in memory, as in Celery: one that starts later does not know them.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from celery.events.dispatcher import EventDispatcher
from celery.events.receiver import EventReceiver
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from celery.worker.control import Panel
from kombu import Consumer, Exchange, Queue
from kombu.exceptions import EncodeError
from kombu.pidbox import Mailbox, Node

from . import audit, codec, errors
from .claims import Signed, Text, new_id
from .envelope import CONTENT_TYPE, Type, enveloped
from .identity import Identity, Role
from .policy import CHANGE, COMMANDS

if TYPE_CHECKING:
    from celery.app.control import Control
    from celery.app.events import Events

    from .harden import Hardening
else:
    Control = Events = object  # what is mixed in stands before the application's own class

#: Commands of one signer that a worker remembers until they have expired; one more than that is refused.
REMEMBERED = 10_000
#: Messages that wait in a queue of commands, replies or events, and events that wait for the broker; the oldest go.
WAITING = 1_000

#: Fields of events that hold what a caller or a task has written.
_HIDDEN = frozenset({"args", "kwargs", "result", "exception", "traceback"})
_Kind = TypeVar("_Kind", bound="Claims")


class Claims(Signed):
    """What all of these messages sign. ``iat`` and ``exp`` are seconds since the epoch, ``lifetime`` apart at most."""

    kind: ClassVar[Type]
    signers: ClassVar[frozenset[Role]] = frozenset({Role.WORKER})
    lifetime: ClassVar[int] = 60
    iss: Text
    aud: Text
    iat: int
    exp: int
    jti: Text


class Command(Claims):
    """What a worker shall do. A reply goes to the signer's account, whatever the message says."""

    kind = Type.CONTROL
    signers = frozenset(COMMANDS)
    method: Text
    arguments: dict[str, Any]
    destination: list[Text] | None
    pattern: Text | None
    matcher: Literal["glob"] | None  # a regular expression could keep the worker busy
    ticket: Text | None


class Reply(Claims):
    """A worker's answer to the command with this ticket."""

    kind = Type.REPLY
    ticket: Text
    node: Text
    reply: Any


class Report(Claims):
    """Events: what a worker says about itself."""

    kind = Type.EVENT
    node: Text
    events: list[dict[str, Any]]


def sign(hardening: Hardening, kind: type[Claims], **fields: Any) -> bytes:
    """Return a signed message of one kind.

    Raises:
        PermissionError: this signer sends none of that kind.
        BadShape, TooLarge: its reader would refuse it.
        kombu.exceptions.EncodeError: a field has no JSON form.
    """
    signer, now = hardening.signer, int(time.time())
    if signer.identity.role not in kind.signers:
        raise PermissionError(f"the role {signer.identity.role} sends no {kind.kind}")
    fields |= {"iss": str(signer.identity), "aud": signer.identity.audience, "jti": new_id()}
    payload = codec.encode({"iat": now, "exp": now + kind.lifetime, **fields})
    kind.parse(payload)
    envelope = signer.sign(kind.kind, payload)
    if len(envelope) > hardening.settings.message_max_bytes:
        raise errors.TooLarge
    return envelope


def verify(hardening: Hardening, kind: type[_Kind], envelope: bytes) -> tuple[_Kind, Identity]:
    """Return the claims of an envelope and who signed them.

    Raises:
        MessageRefused: a leaf that says why.
    """
    own, now, skew = hardening.signer.identity, time.time(), hardening.settings.clock_skew
    verified = hardening.verify(kind.kind, envelope)
    claims, signer = kind.parse(verified.payload), verified.signer.identity
    if claims.iss != str(signer):
        raise errors.BadShape("iss")
    if claims.aud != own.audience or signer.audience != own.audience:
        raise errors.WrongAudience
    if signer.role not in kind.signers:
        raise errors.ControlDenied(f"{signer.role} sends no {kind.kind}")
    verified.signer.check_issue(claims.iat)
    if claims.iat > now + skew:
        raise errors.FromTheFuture
    if min(claims.exp, claims.iat + kind.lifetime) < now - skew:
        raise errors.Expired
    if isinstance(claims, Reply | Report) and not _belongs(signer, claims.node):
        raise errors.WrongNode
    return claims, signer


def _refuse(event: audit.Event, error: Exception) -> None:
    """Leave a trace; a defect refuses too, and ends neither worker nor monitor."""
    refusal = error if isinstance(error, errors.MessageRefused) else errors.GateFailed(type(error).__name__)
    audit.record(event, code=refusal.code, detail=refusal.detail)


def node_name(own: Identity, hostname: str) -> str:
    """Return the name of a worker's node, which starts with its account: nobody speaks for another pool's nodes."""
    return hostname if _belongs(own, hostname) else f"{own.account}.{hostname}"


def _belongs(signer: Identity, node: str) -> bool:
    return node.partition("@")[0].partition(".")[0] == signer.account


def publish(producer: Any, envelope: bytes, exchange: Exchange, key: str, **options: Any) -> None:
    """Publish and do not wait: a broker that is short of memory must not stop a worker for the sake of an event."""
    options |= {"content_type": CONTENT_TYPE, "content_encoding": "utf-8", "delivery_mode": 1, "confirm_timeout": 0}
    producer.publish(envelope, exchange=exchange.name, routing_key=key, declare=[exchange], **options)


def _own_queue(exchange: Exchange, routing_key: str = "") -> Queue:
    """A queue that the broker names and only this connection may use."""
    return Queue("", exchange, routing_key, durable=False, exclusive=True, auto_delete=True, max_length=WAITING)


class SignedNode(Node):
    """A worker's end: does what those say who may, once, and signs its replies."""

    def __init__(self, hostname: str, state: Any, channel: Any, handlers: Any, mailbox: SignedMailbox) -> None:
        name = node_name(mailbox.hardening.signer.identity, hostname)
        super().__init__(name, state, channel, {**handlers, **_HANDLERS}, mailbox)
        self._started = int(time.time())
        self._remembered: dict[str, dict[str, int]] = {}

    def listen(self, channel: Any = None, callback: Any = None) -> Consumer:
        """Consume; ``callback`` gets the body of a command that may be given, and no message."""

        def on_message(message: Any) -> None:
            try:
                body = self._admitted(message)
            except Exception as error:
                _refuse(audit.Event.CONTROL_REFUSED, error)
            else:
                (callback or self.handle_message)(body, None)

        queue = _own_queue(self.mailbox.exchange)
        consumer = Consumer(channel or self.channel, [queue], on_message=on_message, no_ack=True)
        consumer.consume()
        return consumer

    def _admitted(self, message: Any) -> dict[str, Any]:
        command, signer = verify(self.mailbox.hardening, Command, enveloped(message))
        if not self.mailbox.hardening.policy.decide_command(signer, command.method).allowed:
            raise errors.ControlDenied(f"{signer.role} may not give this command")
        allowed = COMMANDS[signer.role][command.method]
        arguments = {name: command.arguments[name] for name in allowed if name in command.arguments}
        if "queue" in allowed and arguments.get("queue") not in self.mailbox.hardening.consumed:
            raise errors.ControlDenied("not a queue of this worker's pool")
        self._remember(command)
        reply_to = command.ticket and {"exchange": None, "routing_key": signer.account}
        return {**command.model_dump(), "arguments": arguments, "reply_to": reply_to}

    def _remember(self, command: Command) -> None:
        past = time.time() - self.mailbox.hardening.settings.clock_skew
        seen = self._remembered.setdefault(command.iss, {})
        while seen and seen[oldest := next(iter(seen))] < past:
            del seen[oldest]
        # What is older than this worker was said to another one, and perhaps stopped it.
        if command.iat < self._started or command.jti in seen or len(seen) >= REMEMBERED:
            raise errors.ControlReplayed
        seen[command.jti] = command.iat + command.lifetime

    def dispatch(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Do what was commanded; a change leaves a trace."""
        if method in CHANGE:
            audit.record(audit.Event.CONTROLLED, method=method, signer=kwargs["iss"])
        return super().dispatch(method, *args, **kwargs)


class SignedMailbox(Mailbox):
    """Both ends' way to send, and where who asked waits for replies."""

    node_cls = SignedNode
    hardening: Hardening

    def _publish_reply(self, reply: Any, exchange: Any, routing_key: str, ticket: str, **options: Any) -> None:
        ((node, value),) = reply.items()
        try:
            envelope = sign(self.hardening, Reply, ticket=ticket, node=node, reply=value)
        except (EncodeError, errors.TooLarge):
            envelope = sign(self.hardening, Reply, ticket=ticket, node=node, reply={"error": "it cannot be sent"})
        self._send(envelope, self.reply_exchange, routing_key, options["channel"])

    def _send(self, envelope: bytes, exchange: Exchange, routing_key: str, channel: Any) -> None:
        with self.producer_or_acquire(None, channel) as producer:
            publish(producer, envelope, exchange, routing_key, retry=True, retry_policy={"max_retries": 3})

    def _broadcast(
        self,
        command: str,
        arguments: Any = None,
        destination: Any = None,
        reply: bool = False,
        timeout: float | None = None,
        limit: int | None = None,
        callback: Any = None,
        channel: Any = None,
        **options: Any,
    ) -> list[dict[str, Any]] | None:
        """Give a command; wait for ``limit`` replies, or until none has come for ``timeout`` seconds."""
        own, ticket = self.hardening.signer.identity, new_id() if reply else None
        if not self.hardening.policy.decide_command(own, command).allowed:
            raise PermissionError(f"the role {own.role} may not give the command {command!r}")
        fields = {name: options.get(name) for name in ("pattern", "matcher")}
        fields |= {"method": command, "arguments": arguments or {}, "destination": destination, "ticket": ticket}
        channel, envelope = channel or self.connection.default_channel, sign(self.hardening, Command, **fields)
        if not reply:
            self._send(envelope, self.exchange, "", channel)
            return None
        replies: dict[str, Any] = {}
        wait, deadline = timeout or 1, 0.0

        def on_message(message: Any) -> None:
            nonlocal deadline
            try:
                answer, _ = verify(self.hardening, Reply, enveloped(message))
            except Exception as error:
                return _refuse(audit.Event.REPLY_REFUSED, error)
            # Others are to a colleague, of a node that was not asked, or came twice.
            if answer.ticket == ticket and answer.node not in replies and answer.node in (destination or [answer.node]):
                replies[answer.node] = answer.reply
                deadline = time.monotonic() + wait
                if callback:
                    callback({answer.node: answer.reply})

        limit, queue = limit or len(destination or ()), _own_queue(self.reply_exchange, own.account)
        with Consumer(channel, [queue], on_message=on_message, no_ack=True):
            deadline = time.monotonic() + wait
            self._send(envelope, self.exchange, "", channel)
            # Not until silence: whoever can write to the exchange could keep us here.
            while (not limit or len(replies) < limit) and (left := deadline - time.monotonic()) > 0:
                try:
                    self.connection.drain_events(timeout=left)
                except TimeoutError:
                    break
        return [{node: value} for node, value in replies.items()]


class SignedControl(Control):
    """Mixed into the application's control class by ``harden``."""

    Mailbox = SignedMailbox

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        hardening = self.mailbox.hardening = app.hardening
        hardening.check_configuration(app)
        self.mailbox.exchange = hardening.broker.broadcast("control", "fanout")
        self.mailbox.reply_exchange = hardening.broker.broadcast("replies", "topic")


def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None) -> dict[str, str]:
    """Celery's would store a result without a request, which alone says whose it is."""
    worker_state.revoked.update(ids := set(maybe_list(task_id)))
    known = {*worker_state.scheduled_requests, *worker_state.reserved_requests, *worker_state.active_requests}
    for request in [each for each in known if each.id in ids]:
        entry = request._eta_timer_entry
        if request in worker_state.scheduled_requests and entry.fun == state.consumer.apply_eta_task:
            entry.cancel()
            entry()  # its time is now: Celery looks whether it is revoked, and tells its caller
        elif terminate:
            request.terminate(state.consumer.pool, signal=signal)
    return {"ok": f"tasks {', '.join(sorted(ids))} flagged as revoked"}


def _stats(state: Any) -> dict[str, Any]:  # Celery's without the broker's addresses and options
    return {**Panel.data["stats"](state), "broker": {}}


_HANDLERS = {"revoke": _revoke, "terminate": partial(_revoke, terminate=True), "stats": _stats}


class SignedDispatcher(EventDispatcher):
    """A worker's end: signs its events, without arguments and results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hostname: str = node_name(self.app.hardening.signer.identity, self.hostname)
        self.exchange = self.app.hardening.broker.broadcast("events", "topic")
        self._outbound_buffer: deque[Any] = deque(maxlen=WAITING)

    def _publish(self, event: Any, producer: Any, routing_key: str, **options: Any) -> None:
        if producer is None:
            return
        events = [{**each, **dict.fromkeys(_HIDDEN & each.keys(), "(hidden)")} for each in maybe_list(event)]
        envelope = sign(self.app.hardening, Report, node=self.hostname, events=events)
        try:
            publish(producer, envelope, self.exchange, routing_key, **options)
        except Exception:
            if not self.buffer_while_offline:
                raise
            self._outbound_buffer.append((event, routing_key))


class SignedReceiver(EventReceiver):
    """A monitor's end: hands on what workers have said about themselves. Nothing that arrives makes it raise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = _own_queue(self.app.hardening.broker.broadcast("events", "topic"), "#")

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:  # noqa: N803  # kombu's name
        """Consume without decoding."""
        return [Consumer(queues=[self.queue], on_message=self._receive_signed, no_ack=True)]

    def _receive_signed(self, message: Any) -> None:
        try:
            report, _ = verify(self.app.hardening, Report, enveloped(message))
            self._receive([{**event, "hostname": report.node} for event in report.events], message)
        except Exception as error:  # a worker that was taken over can sign events that Celery's State fails on
            _refuse(audit.Event.EVENT_REFUSED, error)


class SignedEvents(Events):
    """Mixed into the application's events class by ``harden``."""

    receiver_cls = f"{__name__}:SignedReceiver"
    dispatcher_cls = f"{__name__}:SignedDispatcher"
