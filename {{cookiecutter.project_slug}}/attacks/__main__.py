"""`python -m attacks [--json] [--only ID ...]`: run the attacks and print the table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from stack import StackFailed

from . import report, suite
from .attack import catalogue

OTHER_BROKER = 4


def main() -> int:
    """The command: 0, 1 when an attack has the wrong outcome, 2 when one proves nothing, 3 when no server came up.

    4 when the broker is one that the attacks do not speak to: ``make demo`` goes on after that one alone.
    """
    parser = argparse.ArgumentParser(
        prog="attacks", description="The same attacks on stock Celery and on this project."
    )
    parser.add_argument("--json", action="store_true", help="print the report instead of the table")
    parser.add_argument("--only", action="append", metavar="ID", help="run this one, may be given again; with evidence")
    parser.add_argument("--list", action="store_true", help="list the attacks and run none")
    parser.add_argument(
        "--folder", type=Path, default=suite.PROJECT / ".stack-attacks", help="where servers keep their files"
    )
    options = parser.parse_args()
    if not (suite.PROJECT / "deploy/rabbitmq").exists():
        message = "No attack was run: they speak AMQP, and this project's broker is Redis; see deploy/redis/broker.md."
        print(message, file=sys.stderr)
        return OTHER_BROKER  # nothing was proven, so this is no success
    attacks = catalogue()
    if options.list:
        for one in attacks:
            print(f"{one.id:6} {one.control:6} {one.title}{f' (waits for {one.pending})' if one.pending else ''}")
        return 0
    if unknown := set(options.only or ()) - {one.id for one in attacks}:
        parser.error(f"there is no attack {', '.join(sorted(unknown))}; `--list` shows all")
    chosen = [one for one in attacks if (one.id in options.only if options.only else not one.pending)]

    def progress(trial: report.Trial) -> None:
        if sys.stderr.isatty():
            print(f"\r{trial.target:5} {trial.id:6} {trial.outcome:9}\x1b[K", end="\r", file=sys.stderr)

    signal.signal(signal.SIGTERM, _terminate)
    try:
        rows = suite.run(chosen, options.folder, progress)
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    path = suite.PROJECT / "reports" / "attacks.json"
    report.write(rows, path)
    if options.json:
        print(json.dumps([row.as_json() for row in rows], indent=1, ensure_ascii=False))
    else:
        print(report.table(rows, colour=sys.stdout.isatty()))
        for row in rows if options.only else ():
            for trial in (row.stock, row.ours):
                print(f"{row.attack.id} on {trial.target}, {trial.seconds:.1f} s: {trial.evidence}")
        waiting = [] if options.only else [one for one in attacks if one.pending]
        for one in waiting:
            print(f"{one.id:5}  {one.title:43}  not run: {one.pending} is still to come")
        print(f"\n{report.summary(rows)} Evidence: {path.relative_to(suite.PROJECT)}")
    for complaint in filter(None, (row.complaint for row in rows)):
        print(complaint, file=sys.stderr)
    if any(report.ERROR in (row.stock.outcome, row.ours.outcome) for row in rows):
        return 2
    return int(any(row.complaint for row in rows))


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that the servers are ended


if __name__ == "__main__":
    sys.exit(main())
