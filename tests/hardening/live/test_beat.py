"""Beat: what it sends is signed by it, it forgets no run, its file runs no code, and nobody else can be it.

The attack on the schedule file is made against Celery's own scheduler too, where it succeeds.
"""

from __future__ import annotations

import json
import os
import pickle
import shelve
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stack.worker import Worker

from ...project import envelope, errors
from ...service import ROOT
from .everything import within
from .running import SOON, TASKS, Running

HOUR = 3600  # seconds
STOCK = "celery.beat:PersistentScheduler"


def entry(task: str, key: str, seconds: float, **options: Any) -> dict[str, Any]:
    return {"task": f"{TASKS}.{task}", "schedule": seconds, "args": [key], "options": options}


@contextmanager
def beat(running: Running, schedule: Mapping[str, Any], *options: str) -> Iterator[Worker]:
    """Run beat with a schedule for a while. The file it remembers in stays for the next one."""
    environment = {**running.stack.environment("beat"), "SCHEDULE": json.dumps(schedule)}
    started = running.stack.start_beat(env=environment, options=options)
    try:
        yield started
    finally:
        started.stop()


def remembered(running: Running) -> Path:
    return running.stack.folder / "workers/beat/celerybeat-schedule.json"


@pytest.fixture(autouse=True)
def forget(running: Running) -> Iterator[None]:
    yield
    remembered(running).unlink(missing_ok=True)


def remember(running: Running, name: str, ago: timedelta) -> None:
    """Write that an entry ran that long ago."""
    last = (datetime.now(UTC) - ago).isoformat(), 7
    folder = remembered(running).parent
    if not folder.exists():
        running.stack.account.folder(folder)
    running.stack.account.write(remembered(running), json.dumps({name: last}))


def last_run(running: Running, name: str) -> tuple[datetime, int]:
    at, count = json.loads(remembered(running).read_text())[name]
    return datetime.fromisoformat(at), count


# -- what it sends ----------------------------------------------------------------------------------------------------


def test_what_is_scheduled_every_second_arrives_and_beat_asked_for_it(running: Running, key: str) -> None:
    with beat(running, {"tick": entry("origin", key, 1.0)}):
        assert running.happens(f"{key}=beat", times=3)
    assert running.effect_names() & {f"{key}={role}" for role in ("client", "worker")} == set()


def test_what_it_sends_is_signed_with_its_own_key(running: Running, key: str) -> None:
    with beat(running, {"tick": entry("effect", key, 1.0, queue="slow")}):
        assert within(SOON, lambda: running.waiting("slow"))
    batch = running.caller("batch")
    with batch.connection_for_read() as connection:
        queue = batch.amqp.queues["slow"].bind(connection.default_channel)
        messages = [*iter(queue.get, None)]
        for message in messages:
            message.ack()
    assert messages
    for message in messages:
        verified = batch.hardening.verifier.verify(envelope.Type.TASK, bytes(message.body))
        assert str(verified.signer.identity) == "spiffe://everything.test/development/everything/beat"
        assert json.loads(verified.payload)["args"] == [key]


def test_beats_key_sends_nothing_else(running: Running) -> None:
    refused = running.task("add", running.caller("beat")).delay(1, 2)
    with pytest.raises(errors.NotAllowed):
        refused.get(timeout=SOON)


# -- what it remembers ------------------------------------------------------------------------------------------------


def test_a_killed_beat_runs_nothing_again_that_is_not_due(running: Running, key: str) -> None:
    schedule = {"hourly": entry("effect", f"{key}-hourly", HOUR), "tick": entry("effect", f"{key}-tick", 0.5)}
    remember(running, "hourly", timedelta(hours=2))
    before = remembered(running).read_text()

    def ticks() -> bool:
        return running.happens(f"{key}-tick", running.count(f"{key}-tick") + 2)

    with beat(running, schedule) as first:
        assert running.happens(f"{key}-hourly")  # due since an hour
        assert ticks()
        first.process.kill()
    at, count = last_run(running, "hourly")
    assert datetime.now(UTC) - at < timedelta(minutes=5)
    assert count == 8
    with beat(running, schedule):
        assert ticks()
    assert running.count(f"{key}-hourly") == 1
    assert last_run(running, "hourly") == (at, count)
    assert remembered(running).stat().st_mode & 0o777 == 0o600
    # Without what it remembered it would have run it again.
    running.stack.account.write(remembered(running), before)
    with beat(running, schedule):
        assert ticks()
        assert running.happens(f"{key}-hourly", times=2)


def test_what_is_said_to_have_run_in_the_future_runs_in_time(running: Running, key: str) -> None:
    remember(running, "tick", -timedelta(days=1000))
    with beat(running, {"tick": entry("effect", key, 1.0)}):
        assert running.happens(key, times=2)


# -- its file ---------------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, effect: Path) -> None:
        self.effect = effect

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.effect),))


def shelf(folder: Path, effect: Path) -> Path:
    with shelve.open(str(folder / "schedule")) as file:
        file["entries"] = Evil(effect)
    return folder / "schedule"


def pickled(folder: Path, effect: Path) -> Path:
    (folder / "schedule").write_bytes(pickle.dumps(Evil(effect)))
    return folder / "schedule"


def celery(running: Running, role: str, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that should end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", f"{TASKS}:app", *command],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.defpath, **running.stack.environment(role), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **running.stack.account.popen_options(),
    )


@pytest.fixture
def folder(running: Running, key: str) -> Path:
    """A folder that beat may write to."""
    return running.stack.account.folder(running.stack.folder / key)


def give(running: Running, folder: Path) -> None:
    for path in folder.iterdir():
        running.stack.account.give(path)
        path.chmod(0o600)


@pytest.mark.parametrize("plant", [shelf, pickled])
def test_a_pickle_in_the_file_is_not_loaded(running: Running, folder: Path, plant: Any) -> None:
    file = plant(folder, folder / "effect")
    give(running, folder)
    for path in folder.iterdir():  # whatever this machine's dbm has made of the name
        for choice in ((), ("-S", STOCK)):
            done = celery(running, "beat", "beat", "-s", str(path), *choice)
            assert done.returncode == 1
            assert "[beat.schedule]" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "effect").exists()
    assert file.parent == folder


def test_the_same_pickle_runs_in_stock_celery(running: Running, folder: Path) -> None:
    file = shelf(folder, folder / "effect")
    give(running, folder)
    arguments = ("-A", f"{__package__}.stock:app", "beat", "-s", str(file))
    started = running.stack._launch("stock-beat", (*arguments, "--loglevel", "INFO"), {})
    try:
        assert within(SOON, (folder / "effect").exists)
    finally:
        started.stop()


# -- who it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["client", "worker", "shop"])
def test_nobody_else_can_be_beat(running: Running, folder: Path, role: str) -> None:
    done = celery(running, role, "beat", "-s", str(folder / "schedule"))
    assert (done.returncode, "[worker.identity]" in done.stderr) == (1, True)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [*folder.iterdir()]


def test_no_worker_is_beat_beside(running: Running, folder: Path) -> None:
    done = celery(running, "worker", "worker", "-B", "-s", str(folder / "schedule"), "-S", STOCK)
    assert (done.returncode, "[worker.identity]" in done.stderr + done.stdout) == (1, True)
    assert not [*folder.iterdir()]


def test_a_schedule_that_no_worker_would_do_is_refused(running: Running, folder: Path, key: str) -> None:
    schedule = json.dumps({"sum": entry("add", key, 1.0)})
    done = celery(running, "beat", "beat", "-s", str(folder / "schedule"), SCHEDULE=schedule)
    assert (done.returncode, "[beat.schedule]" in done.stderr) == (1, True)
    assert f"may not send {TASKS}.add" in done.stderr
