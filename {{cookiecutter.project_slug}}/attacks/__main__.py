"""`python -m attacks [--json] [--only ID ...]`: run the attacks and print the table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from stack import StackFailed

from . import PROJECT, attack, suite


def main() -> int:
    """The command: 0, 1 when an attack has the wrong outcome, 2 when one proves nothing, 3 when no server came up."""
    parser = argparse.ArgumentParser(
        prog="attacks", description="The same attacks on stock Celery and on this project."
    )
    parser.add_argument("--json", action="store_true", help="print the report instead of the table")
    parser.add_argument("--only", action="append", metavar="ID", help="run this one, may be given again; with evidence")
    parser.add_argument("--list", action="store_true", help="list the attacks and run none")
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / ".stack-attacks", help="where servers keep their files"
    )
    options = parser.parse_args()
    attacks = attack.catalogue()
    if options.list:
        for one in attacks:
            print(f"{one.id:6} {one.control:6} {one.title}")
        return 0
    if unknown := set(options.only or ()) - {one.id for one in attacks}:
        parser.error(f"there is no attack {', '.join(sorted(unknown))}; `--list` shows all")
    chosen = [one for one in attacks if not options.only or one.id in options.only]

    def progress(trial: attack.Trial) -> None:
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
    path = PROJECT / "reports" / "attacks.json"
    attack.write(rows, path)
    if options.json:
        print(json.dumps([row.as_json() for row in rows], indent=1, ensure_ascii=False))
    else:
        print(attack.table(rows, colour=sys.stdout.isatty()))
        for row in rows if options.only else ():
            for trial in (row.stock, row.ours):
                print(f"{row.attack.id} on {trial.target}, {trial.seconds:.1f} s: {trial.evidence}")
        for row in rows:
            if row.attack.withstood:
                print(f"{row.attack.id:5}  stock withstands it: {row.attack.withstood}")
        print(f"\n{attack.summary(rows)} Evidence: {path.relative_to(PROJECT)}")
    for complaint in filter(None, (row.complaint for row in rows)):
        print(complaint, file=sys.stderr)
    if any(attack.ERROR in (row.stock.outcome, row.ours.outcome) for row in rows):
        return 2
    return int(any(row.complaint for row in rows))


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that the servers are ended


if __name__ == "__main__":
    sys.exit(main())
