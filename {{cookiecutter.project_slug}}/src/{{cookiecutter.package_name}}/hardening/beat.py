"""Beat: who may be it, what it may send, and what it remembers from one start to the next.

Guards against: a schedule file that runs code when it is read, as Celery's own does (``shelve`` is pickle); a beat that
is root or somebody else; and a schedule that every worker would refuse, night after night.
Rests on: the schedule being code. The file is JSON and says when each entry ran last: whoever can write it, and so can
read beat's key beside it, may have an entry of the schedule run now, and nothing else.
Controls: SER-1, SIG-1, AUT-1, AUT-2, WRK-1.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from celery.apps.beat import Beat
from celery.beat import Scheduler
from pydantic import AwareDatetime, ConfigDict, Field, NonNegativeInt, TypeAdapter

from . import audit, heartbeat
from .consumer import preflight
from .errors import ConfigurationRefused, NotAllowed
from .files import read_private_file, replace_file
from .identity import Role

#: When an entry ran last (Python's calendar has ends, where it cannot be reckoned with), and how often it has.
_Run = tuple[Annotated[AwareDatetime, Field(gt=datetime(2000, 1, 1, tzinfo=UTC))], NonNegativeInt]
_RUNS = TypeAdapter(dict[str, _Run], config=ConfigDict(strict=True))


class JsonScheduler(Scheduler):
    """Celery's scheduler, which remembers in JSON. Each run is written down before the next: a crash forgets none."""

    def __init__(self, app: Any, schedule_filename: str, **kwargs: Any) -> None:
        self._file = Path(schedule_filename).absolute()
        super().__init__(app, **{**kwargs, "sync_every_tasks": 1})

    def setup_schedule(self) -> None:
        """Take the schedule from the configuration, and from the file when each entry ran last.

        Raises:
            ConfigurationRefused: the file is none of ours or cannot be written, or beat may not send what is scheduled.
        """
        super().setup_schedule()
        beat, topology = self.app.hardening.signer.identity, self.app.hardening.topology
        try:
            content = read_private_file("beat_schedule_filename", self._file) if self._file.exists() else b"{}"
            runs = _RUNS.validate_json(content)
            for name, entry in self.schedule.items():
                queue = entry.options.get("queue")
                self.app.hardening.policy.check(beat, beat, entry.task, queue and topology.broker_name(queue))
                last, entry.total_run_count = runs.get(name, (entry.last_run_at, 0))
                # Never later than now: an entry that ran in the future would not run until then.
                entry.last_run_at = min(last, datetime.now(UTC)).astimezone(self.app.timezone)
            self.sync()
        except NotAllowed:
            fix = "allow it in topology.toml, or remove the entry"
            raise _refused(f"beat_schedule: {name}", f"{beat} may not send {entry.task} there", fix) from None
        except ValueError:
            reason = f"{self._file} is not what beat writes (Celery's own file would run code when it is read)"
            raise _refused("beat_schedule_filename", reason, "move it away: beat then counts from now") from None
        except OSError as error:
            reason = f"{self._file} cannot be written ({error.strerror})"
            raise _refused("beat_schedule_filename", reason, "let beat's user write to its folder") from None

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Send what is due; until it is sent, beat waits for the broker."""
        heartbeat.pause(self.app.hardening.settings.heartbeat_file)
        seconds = super().tick(*args, **kwargs)
        heartbeat.beat(self.app.hardening.settings.heartbeat_file)
        return seconds

    def sync(self) -> None:
        """Write down when each entry ran last."""
        runs = {name: (entry.last_run_at, entry.total_run_count) for name, entry in self.schedule.items()}
        replace_file(self._file, _RUNS.dump_json(runs, indent=1))


class HardenedBeat(Beat):
    """Celery's beat, which starts only if that is safe; else it ends with one sentence and status 1."""

    def run(self) -> None:
        """Check, then schedule."""
        try:
            self.init_loader()
            preflight(self.app, Role.BEAT, self.app.hardening.topology.callers)
            if self.scheduler_cls is not JsonScheduler:
                raise _refused("beat_scheduler", "is another one than harden() has set", "drop `-S`")
            JsonScheduler(self.app, self.schedule)  # what is wrong with its file is told before anything is started
        except ConfigurationRefused as refused:
            raise SystemExit(f"Refused to start. {refused}") from None
        self.remote_control = False  # it would answer to unsigned messages
        super().run()

    def setup_logging(self, colorize: bool | None = None) -> None:
        """Set the log up; from then on there is one to say that beat has started."""
        super().setup_logging(colorize)
        audit.record(audit.Event.STARTED, signer=self.app.hardening.signer.identity)


def _refused(setting: str, reason: str, fix: str) -> ConfigurationRefused:
    return ConfigurationRefused(setting, reason, fix, "beat.schedule")
