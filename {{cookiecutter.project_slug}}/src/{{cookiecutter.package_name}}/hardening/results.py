"""Signed results: every value in the result backend is an envelope, and every read verifies it.

Guards against: results forged, swapped or replayed by whoever can write to the backend or to its pub/sub channels, and
a worker being made to sign attacker-shaped data that passes for a task.
Rests on: Celery's backends encoding and decoding through ``encode`` and ``decode`` on every path (``.get()``, pub/sub,
chord join, group restore). An envelope says what kind of value it is, of which id, and for which caller.
Controls: RES-1, INT-2, AUT-6.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.cache import CacheBackend
from celery.backends.redis import RedisBackend
from celery.backends.redis import ResultConsumer as RedisResultConsumer
from celery.utils.serialization import ensure_serializable
from kombu.exceptions import EncodeError

from . import audit, codec
from .envelope import Type, Verified
from .errors import BadShape, ForeignResult, MessageRefused, WrongAudience
from .identity import Identity, Role
from .redis_tls import VerifiedSSLConnection

if TYPE_CHECKING:
    from .harden import Hardening

_PENDING = {"status": states.PENDING, "result": None}
#: Kinds of value, by the shape Celery gives them.
_RESULT, _PART, _GROUP = "result", "part", "group"


class SignedResults:
    """Mixed into a result backend in front of Celery's own class."""

    app: Any

    @property
    def _hardening(self) -> Hardening:
        hardening: Hardening = self.app.hardening
        return hardening

    def encode(self, data: Any) -> bytes:
        """Sign a value that Celery is about to store.

        Raises:
            kombu.exceptions.EncodeError: it has no JSON form, which Celery stores as the task's failure.
            PermissionError: not a result, chord part or group; or a result, and this signer is no worker.
        """
        kind = _kind(data)
        signer = self._hardening.signer
        if kind is None or (kind[0] != _GROUP and signer.identity.role is not Role.WORKER):
            raise PermissionError("only a worker signs results, and nothing but results")
        claims = {
            "iss": str(signer.identity),
            "aud": signer.identity.audience,
            "iat": int(time.time()),
            "kind": kind[0],
            "of": kind[1],
            "value": data,
        }
        envelope = signer.sign(Type.RESULT, codec.encode(claims))
        if len(envelope) > self._hardening.settings.message_max_bytes:
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
        own = self._hardening.signer.identity
        verified: Verified = self._hardening.verifier.verify(Type.RESULT, payload)
        claims = codec.decode(verified.payload)
        signer = verified.signer.identity
        if not isinstance(claims, dict) or claims.keys() != {"iss", "aud", "iat", "kind", "of", "value"}:
            raise BadShape
        if claims["iss"] != str(signer) or (claims["kind"], claims["of"]) != _kind(claims["value"]):
            raise BadShape("kind")
        if claims["aud"] != own.audience or signer.audience != own.audience:
            raise WrongAudience
        if signer.role is not Role.WORKER and claims["kind"] != _GROUP:
            raise ForeignResult("not signed by a worker")
        if signer.role is not Role.WORKER and own.role not in {Role.WORKER, Role.OPERATOR} and signer != own:
            raise ForeignResult("a group that another caller saved")
        return claims["value"]

    def store_refusal(self, refusal: MessageRefused) -> None:
        """Tell a genuine caller that its message was refused, so that ``.get()`` ends with the reason."""
        claims = refusal.claims
        if claims is None or claims.task.ignore_result:
            return
        request = SimpleNamespace(origin=claims.origin, group=None, parent_id=None, children=[], ignore_result=False)
        self.store_result(claims.task.id, refusal, states.FAILURE, request=request)  # type: ignore[attr-defined]  # of celery's Backend

    def prepare_exception(self, exc: BaseException, serializer: str | None = None) -> dict[str, Any]:
        """Return the stored form of an exception, as Celery does, but never sign just to see what can be encoded."""
        kind = type(exc)
        return {
            "exc_type": kind.__qualname__,
            "exc_message": ensure_serializable(exc.args, codec.encode),
            "exc_module": kind.__module__,
        }

    # --- hooks of celery.backends.base.Backend and BaseKeyValueStoreBackend ---

    def _get_result_meta(self, result: Any, state: str, traceback: Any, request: Any, **options: Any) -> dict[str, Any]:
        meta: dict[str, Any] = super()._get_result_meta(result, state, traceback, request, **options)  # type: ignore[misc]  # of Backend
        meta["origin"] = getattr(request, "origin", None) or str(self._hardening.signer.identity)
        return meta

    def _restore_group(self, group_id: str) -> Any:
        meta = super()._restore_group(group_id)  # type: ignore[misc]  # of BaseKeyValueStoreBackend
        if meta and meta["result"].id != group_id:
            raise ForeignResult("of another group")
        return meta

    def _get_task_meta_for(self, task_id: str) -> Any:
        try:
            meta = super()._get_task_meta_for(task_id)  # type: ignore[misc]  # of Backend
            return self._own(meta, task_id)
        except MessageRefused:
            if self._hardening.signer.identity.role is Role.WORKER:
                return dict(_PENDING)  # a forged value must not keep a worker from storing the genuine one
            raise

    def _mget_to_results(self, values: Any, keys: list[Any], *args: Any) -> dict[str, Any]:
        found: dict[str, Any] = super()._mget_to_results(values, keys, *args)  # type: ignore[misc]  # of BaseKeyValueStoreBackend
        owned = {task_id: self._own(meta, task_id) for task_id, meta in found.items()}
        return {task_id: meta for task_id, meta in owned.items() if meta["status"] != states.PENDING}

    def _own(self, meta: dict[str, Any], task_id: str) -> dict[str, Any]:
        """Return ``meta`` if it is the result of ``task_id`` for this caller.

        A genuine result for another caller under this id counts as none: the true one can still replace it.

        Raises:
            ForeignResult: it is the result of another task.
        """
        if meta.get("status") == states.PENDING:
            return meta
        if meta.get("task_id") != task_id:
            audit.record(audit.Event.RESULT_REFUSED, code=ForeignResult.code, id=task_id)
            raise ForeignResult
        own = self._hardening.signer.identity
        origin = Identity.parse(str(meta.get("origin")))
        if own.role in {Role.WORKER, Role.OPERATOR} or origin == own or origin.role is Role.WORKER:
            return meta
        return dict(_PENDING)


class _VerifyingConsumer(RedisResultConsumer):
    """Waits for results on pub/sub channels; what does not verify there is ignored, the genuine one still comes."""

    _decode_result: Any
    backend: SignedResults

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

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        if meta.get("task_id") is not None:
            super().on_state_change(meta, message)


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
