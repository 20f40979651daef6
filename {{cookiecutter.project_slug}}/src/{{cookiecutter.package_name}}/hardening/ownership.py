"""Whose ids, and on whose behalf: what a worker does because of a message belongs to that message's caller.

Guards against: a signer that names another caller's task, group or chord and so gets its results, fails it or drops it.
Rests on: every stored value lying under its owner's name, so that the same id of two callers is two values; and on one
rule for the owner: inside a task it is the task's owner, outside it is oneself.
Controls: AUT-3, AUT-6.

*Origin* is authority: who asked. What Celery itself sends for a message (callbacks, the rest of a chain, errbacks, a
retry) is sent on behalf of its origin; what a task's own code sends is the worker's own doing.
*Owner* is property: whose ids. Everything sent while a task runs belongs to the task's owner.

A client sends ``a | b``, and the code of ``a`` calls ``c.delay()``. The worker signs both ``b`` and ``c``. The origin
of ``b`` is the client, who must be allowed to send it; that of ``c`` is the worker, whose pool must be. Both are owned
by the client, who can wait for either.

Whoever calls another service is a stranger there: nobody acts through it, and what it sends is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import current_task

from .identity import Identity

#: (origin, owner) of the request that Celery is acting for; None while a task's own code runs, and in a caller.
_acting: ContextVar[tuple[str, str] | None] = ContextVar("acting", default=None)


@contextmanager
def acting_for(request: Any) -> Iterator[None]:
    """Act for a verified request until the block ends.

    The outermost block wins: what Celery nests in it (a failed chain's steps, a chord's body) is made of signed data,
    where an ``owner`` may be anything.
    """
    owner = getattr(request, "owner", None)
    if owner is None or _acting.get() is not None:
        yield
        return
    token = _acting.set((str(request.origin), str(owner)))
    try:
        yield
    finally:
        _acting.reset(token)


def owner(own: Identity, audience: str) -> str:
    """Return the SPIFFE ID of whoever owns what is sent to or stored by ``audience`` now; ``own`` is this process."""
    if own.audience != audience:
        return str(own)
    if (acting := _acting.get()) is not None:
        return acting[1]
    return str(getattr(current_request(), "owner", None) or own)


def origin(own: Identity, audience: str, task_id: str, task: str) -> str:
    """Return the SPIFFE ID of whoever asked for the task that is sent to ``audience`` now."""
    if own.audience != audience:
        return str(own)
    if (acting := _acting.get()) is not None:
        return acting[0]
    request = current_request()
    retry = request is not None and (request.id, request.task) == (task_id, task)
    return str((retry and getattr(request, "origin", None)) or own)


def current_request() -> Any:
    """Return the request of the task that runs now, or None."""
    return getattr(current_task, "request", None)


def namespace(owner: str, audience: str) -> str:
    """Return how an application's keys name an owner; see :meth:`Identity.namespace`."""
    return Identity.parse(owner).namespace(audience)
