"""Beat starts only where that is safe, and its file is read as what it is: when each entry ran last."""

from __future__ import annotations

import json
import os
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from celery import Celery
from celery.apps import beat as apps

from ...project import beat, errors, hardening
from ...service import Party, Service
from . import documents

NAME = documents.checksum.name
GOOD = {"nightly": ["2025-01-01T02:30:00+01:00", 3]}


@pytest.fixture(autouse=True)
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root; what they test is that beat may not."""
    monkeypatch.setattr(os, "getresuid", lambda: (1000, 1000, 1000), raising=False)


@pytest.fixture
def party(service: Service) -> Party:
    return scheduled(service.party("beat"))


def scheduled(party: Party) -> Party:
    party.app.conf.beat_schedule = {"nightly": {"task": NAME, "schedule": 3600.0, "args": ["x"]}}
    return party


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "last-runs.json"


def write(file: Path, content: bytes | dict[str, Any]) -> bytes:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(data)
    file.chmod(0o600)
    return data


def refused(party: Party, file: Path, **options: Any) -> str:
    """Assert that beat ends with one sentence, and schedules nothing; return it."""
    with mock.patch.object(apps.Beat, "start_scheduler"), pytest.raises(SystemExit) as caught:
        party.app.Beat(schedule=str(file), quiet=True, **options).run()
    assert isinstance(caught.value.code, str)  # which Python prints, and exits with 1
    assert len(caught.value.code.splitlines()) == 1
    return caught.value.code


# -- who it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(0, 0, 0), (1000, 1000, 0), (0, 1000, 1000)], ids=["root", "saved", "real"])
def test_root_is_no_beat(party: Party, file: Path, monkeypatch: pytest.MonkeyPatch, ids: tuple[int, int, int]) -> None:
    monkeypatch.setattr(os, "getresuid", lambda: ids)
    assert "[worker.root]" in refused(party, file)
    assert not file.exists()


@pytest.mark.parametrize("role", ["client", "worker", "operator", "monitor", "client/web", "beat/other"])
def test_only_a_beat_of_the_topology_is_beat(service: Service, file: Path, role: str) -> None:
    said = refused(scheduled(service.party(role)), file)
    assert "[worker.identity]" in said
    assert role in said


def test_no_worker_is_beat_beside(service: Service, file: Path) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="--beat") as caught:
        service.worker.app.WorkController(pool="solo", beat=True, schedule_filename=str(file))
    assert caught.value.code == "worker.identity"


def test_another_scheduler_is_refused(party: Party, file: Path) -> None:
    for name in ("celery.beat:PersistentScheduler", "celery.beat:Scheduler", f"{beat.__name__}:LastRun"):
        assert "[beat.schedule]" in refused(party, file, scheduler=name)
    party.app.conf.beat_scheduler = "celery.beat:PersistentScheduler"
    assert "[config.changed]" in refused(party, file)


def test_an_application_whose_schedule_is_kept_elsewhere_is_not_hardened(party: Party) -> None:
    app = Celery("other", set_as_current=False)
    app.conf.beat_scheduler = "django_celery_beat.schedulers:DatabaseScheduler"
    with pytest.raises(errors.ConfigurationRefused, match="put it into `beat_schedule`"):
        hardening.harden(app, party.app.hardening.settings)


def test_it_listens_to_no_remote_control(party: Party, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = party.app.Beat(schedule=str(file), quiet=True, remote_control=True)
    monkeypatch.setattr(apps.Beat, "run", lambda self: None)
    instance.run()
    assert instance.remote_control is False


@pytest.mark.parametrize(
    ("entry", "said"), [({"task": "elsewhere.task"}, "elsewhere"), ({"options": {"queue": "no"}}, NAME)]
)
def test_a_schedule_that_every_worker_would_refuse_is_refused(
    party: Party, file: Path, entry: dict[str, Any], said: str
) -> None:
    party.app.conf.beat_schedule["nightly"] |= entry
    text = refused(party, file)
    assert "[beat.schedule]" in text
    assert f"may not send {said}" in text


# -- what it remembers ------------------------------------------------------------------------------------------------


def scheduler(party: Party, file: Path) -> Any:
    return beat.JsonScheduler(party.app, str(file))


def test_what_ran_is_remembered(party: Party, file: Path) -> None:
    before = datetime.now(UTC)
    first = scheduler(party, file)
    first.reserve(first.schedule["nightly"])
    first.sync()
    entry = scheduler(party, file).schedule["nightly"]
    assert before <= entry.last_run_at <= datetime.now(UTC)
    assert entry.total_run_count == 1
    assert entry.is_due().is_due is False
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.glob("*last-runs*")] == [file.name]


def test_each_due_run_is_written_down_at_once(party: Party, file: Path) -> None:
    party.app.conf.beat_schedule["hourly"] = party.app.conf.beat_schedule["nightly"]
    write(file, {**GOOD, "hourly": GOOD["nightly"]})
    running = scheduler(party, file)
    for written in (7, 8):
        assert running.tick() == 0  # it has sent something
        assert sum(count for _, count in json.loads(file.read_text()).values()) == written
    assert scheduler(party, file).tick() > 0


def test_the_schedule_itself_is_code(party: Party, file: Path) -> None:
    write(file, {**GOOD, "gone": GOOD["nightly"]})
    party.app.conf.beat_schedule["new"] = {"task": NAME, "schedule": 60.0, "args": ["x"]}
    found = scheduler(party, file)
    assert found.schedule.keys() == {"nightly", "new"}
    assert found.schedule["nightly"].last_run_at == datetime(2025, 1, 1, 1, 30, tzinfo=UTC)
    assert json.loads(file.read_text()).keys() == {"nightly", "new"}


def test_nothing_has_run_in_the_future(party: Party, file: Path) -> None:
    write(file, {"nightly": ["9999-12-31T23:59:59+00:00", 0]})
    entry = scheduler(party, file).schedule["nightly"]
    assert datetime.now(UTC) - timedelta(minutes=1) < entry.last_run_at <= datetime.now(UTC)


def test_a_look_at_the_schedule_writes_nothing(party: Party, file: Path) -> None:
    beat.JsonScheduler(party.app, str(file), lazy=True)
    assert not file.exists()


# -- its file ---------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, effect: str) -> None:
        self.effect = effect

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.effect,))


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"garbage",
        b"[]",
        b'"nightly"',
        b"{",
        b'{"nightly": null}',
        b'{"nightly": {}}',
        json.dumps(GOOD).encode() + b"x",
        json.dumps(GOOD).encode("utf-16"),
        b'{"nightly": ' * 10_000,
        *(
            json.dumps({"nightly": last}).encode()
            for last in (
                [],
                ["2026-01-01T02:30:00", 1],  # in no time zone
                ["0001-01-01T00:00:00+23:59", 1],
                ["yesterday", 1],
                [None, 1],
                [1767225600, 1],
                ["2025-01-01T02:30:00+01:00"],
                ["2025-01-01T02:30:00+01:00", -1],
                ["2025-01-01T02:30:00+01:00", "1"],
                ["2025-01-01T02:30:00+01:00", 1.5],
                ["2025-01-01T02:30:00+01:00", 1, NAME],
            )
        ),
    ],
)
def test_a_file_that_is_not_its_own_is_refused_and_left_as_it_is(party: Party, file: Path, content: bytes) -> None:
    written = write(file, content)
    said = refused(party, file)
    assert "[beat.schedule]" in said
    assert str(file) in said
    assert file.read_bytes() == written


def test_a_pickle_is_not_loaded(party: Party, file: Path, tmp_path: Path) -> None:
    effect = tmp_path / "effect"
    content = write(file, pickle.dumps(Evil(str(effect))))
    assert "[beat.schedule]" in refused(party, file)
    assert not effect.exists()
    pickle.loads(content)
    assert effect.exists()


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666])
def test_a_file_that_others_can_reach_is_refused(party: Party, file: Path, mode: int) -> None:
    write(file, GOOD)
    file.chmod(mode)
    assert "[config.key-permissions]" in refused(party, file)


def test_a_folder_that_does_not_exist_is_refused(party: Party, tmp_path: Path) -> None:
    assert "cannot be written (No such file or directory)" in refused(party, tmp_path / "none" / "file")


def test_a_write_that_fails_leaves_the_file_as_it_was(
    party: Party, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(file, GOOD)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert "No space left" in refused(party, file)
    assert file.read_bytes() == written
    assert [path.name for path in file.parent.glob("*last-runs*")] == [file.name]
