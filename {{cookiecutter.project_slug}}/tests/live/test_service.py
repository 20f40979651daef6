"""The service's tasks on real servers: signed, over mutual TLS, by a worker of another user."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from PIL import Image

from stack import Stack
from stack.process import wait_until

from ..project import Settings, errors, hardening, tasks
from ..service import ROOT

SOON = 20  # seconds
NAME = tasks.thumbnail.thumbnail.name


def caller(stack: Stack, role: str) -> Celery:
    """A caller's application, with what its environment file says."""
    names = {name.removeprefix("SECURE_CELERY_").lower(): value for name, value in stack.environment(role).items()}
    app = Celery(role, set_as_current=False)
    settings: Any = Settings(**names)
    hardening.harden(app, settings)
    return app


@pytest.fixture
def upload(stack: Stack) -> Path:
    """An image that lies where the worker reads."""
    file = stack.folder / "uploads" / "sunset.png"
    Image.new("RGB", (640, 480), "orange").save(file)
    file.chmod(0o644)
    return file


def test_a_kept_result_comes_back(stack: Stack, upload: Path) -> None:
    result = caller(stack, "client").tasks[NAME].delay(upload.name).get(timeout=SOON)
    checksum = hashlib.sha256(upload.read_bytes()).hexdigest()
    assert result == {"sha256": checksum, "bytes": upload.stat().st_size, "thumbnail": f"{checksum}.png"}
    with Image.open(stack.folder / "output" / f"{checksum}.png") as thumbnail:
        assert thumbnail.size == (256, 192)


def test_plain_python_needs_nothing_but_the_environment_file(stack: Stack, upload: Path) -> None:
    package = tasks.__name__
    code = f"from {package} import thumbnail as t; print(t.thumbnail.delay('sunset.png').get(timeout={SOON})['sha256'])"
    done = subprocess.run(
        ["sh", "-c", f'set -a; . {stack.folder}/client.env; exec "$0" -c "$1"', sys.executable, code],
        cwd=ROOT,
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == hashlib.sha256(upload.read_bytes()).hexdigest(), done.stderr


def test_what_beat_may_send_is_done(stack: Stack) -> None:
    [beat] = [process for process, _ in stack.status() if process.name == "beat"]
    assert beat.alive()
    day = datetime.now(UTC).date() - timedelta(days=1000)
    caller(stack, "beat").tasks[tasks.report.report.name].delay(day)
    wait_until((stack.folder / f"output/report-{day}.json").exists, "the report", SOON)


def test_no_webhook_leaves_until_its_host_is_listed(stack: Stack) -> None:
    options: Any = {"ignore_result": False}
    task = caller(stack, "client").tasks[tasks.notify.notify.name]
    with pytest.raises(Exception, match="not among SECURE_CELERY_WEBHOOK_HOSTS"):
        task.apply_async(("https://127.0.0.1/", "stored", "sunset.png"), **options).get(timeout=SOON)


def test_a_caller_is_told_why_its_message_was_refused(stack: Stack) -> None:
    result = caller(stack, "client").send_task("elsewhere.task", ignore_result=False)
    with pytest.raises(errors.UnknownTask):
        result.get(timeout=SOON)


def test_a_monitor_reaches_no_queue(stack: Stack) -> None:
    task = caller(stack, "monitor").tasks[NAME]
    with pytest.raises(Exception, match=r"ACCESS_REFUSED|no permissions"):
        task.delay("sunset.png")
