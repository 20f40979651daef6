"""Signed results: every value in the result backend is an envelope, and every read verifies it.

Guards against: results forged, swapped or replayed by whoever can write to the backend or to its pub/sub channels, and
a worker being made to sign attacker-shaped data that passes for a task.
Rests on: Celery's backends encoding and decoding through ``encode`` and ``decode`` on every path (``.get()``, pub/sub,
chord join, group restore). An envelope says what kind of value it is, of which id, and for which caller.
Controls: RES-1, INT-2, AUT-3, AUT-6.

==========================  ======================  ==========================================================
who reads                   Celery calls            what is checked, in this order
==========================  ======================  ==========================================================
``.get()``, ``.state``      ``_get_task_meta_for``  ``decode``: envelope, audience, signer's role, owner;
                                                    ``decode_result``: a result; ``_own``: of this very task
a group's ``.get()``        ``_mget_to_results``    the same
who waits on pub/sub        ``_VerifyingConsumer``  the same; what fails is ignored, and waiting goes on
a chord's last part         ``decode``              ``decode``
``GroupResult.restore()``   ``_restore_group``      ``decode``; a group of this very id
==========================  ======================  ==========================================================
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from celery import states
from celery.backends.base import BaseKeyValueStoreBackend
from celery.backends.cache import CacheBackend
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.canvas import group, maybe_signature
from celery.result import result_from_tuple
from celery.utils.serialization import ensure_serializable
from kombu.exceptions import EncodeError

from . import audit, codec, ownership
from .envelope import Type, Verified
from .errors import BadShape, ForeignResult, MessageRefused, WrongAudience
from .identity import Role
from .limits import spare_files
from .tls import VerifiedSSLConnection

_PENDING = {"status": states.PENDING, "result": None}
#: Kinds of value, by the shape Celery gives them.
_RESULT, _PART, _GROUP = "result", "part", "group"


class SignedResults(BaseKeyValueStoreBackend):
    """Mixed into a result backend in front of Celery's own class."""

    def encode(self, data: Any) -> bytes:
        """Sign a value that Celery is about to store.

        Raises:
            kombu.exceptions.EncodeError: it has no JSON form, which Celery stores as the task's failure.
            PermissionError: not a result, chord part or group; or a result, and this signer is no worker.
        """
        kind = _kind(data)
        signer, audience = self.app.hardening.signer, self.app.hardening.audience
        if kind is None or (kind[0] != _GROUP and not self.app.hardening.works):
            raise PermissionError("only a worker signs results, and nothing but results")
        claims = {
            "iss": str(signer.identity),
            "aud": audience,
            "iat": int(time.time()),
            "owner": ownership.owner(signer.identity, audience),
            "kind": kind[0],
            "of": kind[1],
            "value": data,
        }
        envelope: bytes = signer.sign(Type.RESULT, codec.encode(claims))
        if len(envelope) > self.app.hardening.settings.message_max_bytes:
            raise EncodeError("the result is larger than message_max_bytes, and every reader would refuse it")
        return envelope

    def decode(self, payload: Any) -> Any:
        """Verify a stored value and return it.

        Raises:
            MessageRefused: a leaf that says why it is refused.
        """
        if payload is None:
            return None
        try:
            return self._verified(bytes(payload) if isinstance(payload, bytearray | memoryview) else payload)
        except MessageRefused as refusal:
            audit.record(audit.Event.RESULT_REFUSED, code=refusal.code, detail=refusal.detail)
            raise

    def _verified(self, payload: bytes | str) -> Any:
        own, audience = self.app.hardening.signer.identity, self.app.hardening.audience
        verified: Verified = self.app.hardening.verify(Type.RESULT, payload)
        claims = codec.decode(verified.payload)
        signer = verified.signer.identity
        if not isinstance(claims, dict) or claims.keys() != {"iss", "aud", "iat", "owner", "kind", "of", "value"}:
            raise BadShape
        if claims["iss"] != str(signer) or (claims["kind"], claims["of"]) != _kind(claims["value"]):
            raise BadShape("kind")
        group = claims["kind"] == _GROUP and claims["owner"] == str(signer)  # who sends one saves it itself
        if claims["aud"] != audience or (signer.audience != audience and not group):
            raise WrongAudience
        if signer.role is not Role.WORKER and not group:
            raise ForeignResult("not signed by a worker")
        if claims["owner"] != ownership.owner(own, audience):
            raise ForeignResult("of another caller")
        verified.signer.check_issue(claims["iat"])
        return claims["value"]

    def store_refusal(self, refusal: MessageRefused) -> None:
        """Tell a genuine caller that its message was refused, so that ``.get()`` ends with the reason."""
        claims = refusal.claims
        if claims is None or claims.task.ignore_result:
            return
        request = SimpleNamespace(origin=claims.origin, owner=claims.owner, children=[])
        self.store_result(claims.task.id, refusal, states.FAILURE, request=request)

    def prepare_exception(self, exc: BaseException, serializer: str | None = None) -> Any:
        """Return the stored form of an exception, as Celery does, but never sign just to see what can be encoded."""
        if serializer == "pickle":  # from a pool's child to its parent, never stored
            return super().prepare_exception(exc, serializer)
        kind = type(exc)
        return {
            "exc_type": kind.__qualname__,
            "exc_message": ensure_serializable(exc.args, codec.encode),
            "exc_module": kind.__module__,
        }

    def exception_to_python(self, exc: Any) -> Any:
        """Return a stored exception; a refusal by another service, whose package is not here, is one of ours."""
        if isinstance(exc, dict) and str(exc.get("exc_module")).endswith(".hardening.errors"):
            exc = {**exc, "exc_module": MessageRefused.__module__}
        found = super().exception_to_python(exc)
        ends = isinstance(found, BaseException) and not isinstance(found, Exception)  # the caller
        return RuntimeError(repr(found)) if ends else found

    def _get_key_for(self, prefix: Any, id: Any, key: Any = "") -> Any:
        """Return the key of a result, group or chord, with its owner's name: the same id of two callers is two keys."""
        audience = self.app.hardening.audience
        owner = ownership.owner(self.app.hardening.signer.identity, audience)
        return super()._get_key_for(prefix, f"{ownership.namespace(owner, audience)}:{id}", key)

    def _strip_prefix(self, key: Any) -> str:
        return str(super()._strip_prefix(key)).partition(":")[2]

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store a result on behalf of the request's origin."""
        with ownership.acting_for(request):
            return super().store_result(task_id, result, state, traceback, request, **kwargs)

    def mark_as_failure(
        self, task_id: str, exc: BaseException, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store a failure, fail the rest of its chain and send its errbacks, all on behalf of the request's origin."""
        spare_files()
        with ownership.acting_for(request):
            return super().mark_as_failure(task_id, exc, traceback, request, **kwargs)

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        """Send errbacks as messages, with the failed task's id; Celery would call some of them here.

        After a time limit "here" is the worker's main process, where the keys are.
        """
        for errback in request.errbacks:
            try:
                # A group, as Celery has it among the failed task's children; of one each, for one can fail.
                group((maybe_signature(errback, app=self.app),), app=self.app).apply_async(
                    (request.id,), parent_id=request.id, root_id=request.root_id or request.id
                )
            except Exception as error:  # one that cannot be sent must not keep the failure from being settled
                audit.record(audit.Event.ERRBACK_FAILED, id=request.id, error=type(error).__name__)

    def on_chord_part_return(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a chord's part, and send its body, on behalf of the request's origin."""
        with ownership.acting_for(request):
            return super().on_chord_part_return(request, *args, **kwargs)

    def decode_result(self, payload: Any) -> Any:
        """Verify a stored result and return it, with its exception made.

        Raises:
            MessageRefused: it is refused, or is a genuine value of another kind.
        """
        meta = self.decode(payload)
        kind = _kind(meta)
        if kind is None or kind[0] != _RESULT:
            raise _foreign("not a result")
        return self.meta_from_decoded(meta)

    def _restore_group(self, group_id: str) -> Any:
        payload = self.get(self.get_key_for_group(group_id))
        if not payload:
            return None
        meta = self.decode(payload)
        if _kind(meta) != (_GROUP, group_id):
            raise _foreign("not this group")
        return {"result": result_from_tuple(meta["result"], self.app)}

    def _get_task_meta_for(self, task_id: str) -> Any:
        try:
            return self._own(super()._get_task_meta_for(task_id), task_id)
        except MessageRefused:
            if self.app.hardening.works:
                return dict(_PENDING)  # a forged value must not keep a worker from storing the genuine one
            raise

    def _mget_to_results(self, values: Any, keys: list[Any], *args: Any) -> dict[str, Any]:
        found: dict[str, Any] = super()._mget_to_results(values, keys, *args)
        return {task_id: self._own(meta, task_id) for task_id, meta in found.items()}

    def _own(self, meta: dict[str, Any], task_id: str) -> dict[str, Any]:
        """Return ``meta`` if it is the result of ``task_id``.

        Raises:
            ForeignResult: it is the result of another task.
        """
        if meta["status"] != states.PENDING and meta["task_id"] != task_id:
            raise _foreign("of another task", task_id)
        return meta


class _VerifyingConsumer(ResultConsumer):
    """Waits for results on pub/sub channels; of what does not verify there, the stored value says what it is.

    None or a genuine one: it was forged. One that is refused as well ends the waiting with the reason.
    """

    _decode_result: Any
    _socket: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decode, own = self._decode_result, self.backend._own

        def decode_or_ignore(payload: Any) -> Any:
            try:
                meta = decode(payload)
                return own(meta, meta["task_id"])
            except MessageRefused:
                return {**_PENDING, "task_id": None}

        self._decode_result = decode_or_ignore

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for messages; on a new connection look at what is stored, since what was published before is lost."""
        super().drain_events(timeout)
        connection = self._pubsub and self._pubsub.connection
        if connection and (socket := connection._sock) is not self._socket:
            with self._locked():
                for key in tuple(self.subscribed_to):
                    self.on_state_change(self._stored(self.backend._strip_prefix(key)), None)
            self._socket = socket

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        """Hand over what verified, or the refusal of what is stored."""
        if meta.get("task_id") is None and message is not None:
            meta = self._stored(self.backend._strip_prefix(message["channel"]))
        if meta.get("task_id") is not None:
            super().on_state_change(meta, message)

    def _stored(self, task_id: str) -> dict[str, Any]:
        try:
            return dict(self.backend._get_task_meta_for(task_id))
        except MessageRefused as refusal:
            return {"status": states.FAILURE, "result": refusal, "traceback": None, "task_id": task_id}


class SignedRedisBackend(SignedResults, RedisBackend):
    """Celery's Redis backend with signed results."""

    ResultConsumer = _VerifyingConsumer
    connection_class_ssl = VerifiedSSLConnection

    def _save_group(self, group_id: str, result: Any) -> Any:
        # As for a result, but not published too: nobody waits on that channel, and no account may write to it.
        value = self.encode({"result": result.as_tuple()})
        self.ensure(partial(self.client.set, ex=self.expires or None), (self.get_key_for_group(group_id), value))
        return result

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> dict[str, Any]:
        return {**super()._params_from_url(url, defaults), "connection_class": self.connection_class_ssl}


class SignedMemoryBackend(SignedResults, CacheBackend):
    """Celery's in-memory cache backend with signed results, for tests."""


#: Result backends by URL scheme; ``harden`` gives them to Celery's loader, which wants names.
BACKENDS = {"rediss": f"{__name__}:SignedRedisBackend", "cache": f"{__name__}:SignedMemoryBackend"}


def _foreign(detail: str, task_id: str | None = None) -> ForeignResult:
    audit.record(audit.Event.RESULT_REFUSED, code=ForeignResult.code, detail=detail, id=task_id)
    return ForeignResult(detail)


def _kind(data: Any) -> tuple[str, str] | None:
    """Return what a value is and the id it belongs to; None for a shape that Celery does not store."""
    match data:
        case {"status": str(), "task_id": str(task_id)}:
            return _RESULT, task_id
        case [_, str(task_id), str(), _]:
            return _PART, task_id
        case {"result": [[str(group_id), _], [*_]]} if len(data) == 1:
            return _GROUP, group_id
    return None
