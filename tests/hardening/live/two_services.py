"""Two services: ``orders`` calls one task of ``billing``. Workers name them ``...live.two_services:orders``.

Effects are files, as in ``everything``: each run of a task of billing's makes one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery, Task

from ...project import Settings, hardening


def _hardened(name: str, settings: hardening.Settings) -> Celery:
    app = Celery(name, set_as_current=False)
    hardening.harden(app, settings)
    return app


def billing_app(settings: hardening.Settings) -> Celery:
    """Make the application that is called."""
    app = _hardened("billing", settings)

    def note(task: Task, effect: str) -> str:
        (Path(os.environ["EFFECTS"]) / f"{effect}:{uuid4().hex}").touch()
        return f"{effect} for {task.request.origin}"

    @app.task(name="billing.tasks.charge", bind=True, ignore_result=False, shared=False)
    def charge(self: Task, amount: int) -> str:
        return note(self, f"charge {amount}")

    @app.task(name="billing.tasks.refund", bind=True, ignore_result=False, shared=False)
    def refund(self: Task, amount: int) -> str:
        return note(self, f"refund {amount}")

    return app


def orders_app(settings: hardening.Settings, billing: Celery | None = None) -> Celery:
    """Make the application that calls; ``billing`` is what its tasks call."""
    app = _hardened("orders", settings)

    @app.task(name="orders.tasks.order", ignore_result=False, shared=False)
    def order(amount: int, task: str = "billing.tasks.charge") -> str:
        assert billing is not None
        called = billing.send_task(task, (amount,))
        return str(called.get(timeout=60, disable_sync_subtasks=False))

    return app


def __getattr__(name: str) -> Any:  # only a worker's environment has the settings
    if name == "billing":
        return billing_app(Settings())
    if name == "orders":
        return orders_app(Settings(), _hardened("billing", Settings(_env_prefix="BILLING_")))
    raise AttributeError(name)
