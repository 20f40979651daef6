"""The same tasks behind the project's own `harden()`, with nothing but the environment of its role."""

from importlib import import_module

from celery import Celery

from .. import PACKAGE

hardening = import_module(f"{PACKAGE}.hardening")

app = Celery("attacks.ours", include=["attacks.targets.tasks"])
hardening.harden(app, hardening.Settings())
