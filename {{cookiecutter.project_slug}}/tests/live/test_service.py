"""The service's tasks on real servers: signed, over mutual TLS, by a worker of another user."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
from celery import Celery

from stack import Stack

from ..project import Settings, documents, errors, hardening
from ..service import ROOT

SOON = 20  # seconds


def caller(stack: Stack, role: str) -> Celery:
    """A caller's application, with what its environment file says."""
    names = {name.removeprefix("SECURE_CELERY_").lower(): value for name, value in stack.environment(role).items()}
    app = Celery(role, set_as_current=False)
    settings: Any = Settings(**names)
    hardening.harden(app, settings)
    return app


def test_a_kept_result_comes_back(stack: Stack) -> None:
    result = caller(stack, "client").tasks[documents.checksum.name].delay("hello")
    assert result.get(timeout=SOON) == hashlib.sha256(b"hello").hexdigest()


def test_plain_python_needs_nothing_but_the_environment_file(stack: Stack) -> None:
    package = documents.__name__.partition(".")[0]
    code = f"from {package}.tasks import documents; print(documents.checksum.delay('hello').get(timeout={SOON}))"
    done = subprocess.run(
        ["sh", "-c", f'set -a; . {stack.folder}/client.env; exec "$0" -c "$1"', sys.executable, code],
        cwd=ROOT,
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == hashlib.sha256(b"hello").hexdigest(), done.stderr


def test_a_caller_is_told_why_its_message_was_refused(stack: Stack) -> None:
    result = caller(stack, "client").send_task("elsewhere.task", ignore_result=False)
    with pytest.raises(errors.UnknownTask):
        result.get(timeout=SOON)


def test_a_monitor_reaches_no_queue(stack: Stack) -> None:
    task = caller(stack, "monitor").tasks[documents.checksum.name]
    with pytest.raises(Exception, match=r"ACCESS_REFUSED|no permissions"):
        task.delay("hello")
