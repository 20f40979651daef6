"""Takes each control out of a generated project and sees which tests notice: ``make mutations``.

``removals.toml`` says what is taken out. A removal that no test notices is a failure: the control is there, and not
proven. So is one that cannot be made any more, or that breaks a test before it has tested anything. The report goes to
``reports/mutations.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from ..baking import TEMPLATE, bake_again, workshop

REMOVALS = Path(__file__).with_name("removals.toml")
REPORT = TEMPLATE / "reports" / "mutations.json"
#: What pytest says at its end about each test that failed; an error outside of a test proves nothing.
_FAILED = re.compile(r"^FAILED (\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)
#: Projects to work on side by side; the machine's cores are shared with what the tests start.
AT_ONCE = 2
SECONDS = 600


@dataclass(frozen=True)
class Removal:
    """One control, and how to take it out: in ``file``, the text ``old`` becomes ``new``."""

    control: str
    removal: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    broker: str = "rabbitmq"


@dataclass(frozen=True)
class Verdict:
    """Which tests noticed; ``error`` says why a removal could not be tried."""

    control: str
    removal: str
    caught_by: list[str]
    error: str = ""


def removals(file: Path) -> list[Removal]:
    """Read the table."""
    table = tomllib.loads(file.read_text(encoding="utf-8"))["removal"]
    return [Removal(**{**row, "tests": tuple(row["tests"])}) for row in table]


def run(project: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run some tests of a project, and return the exit status and what was printed."""
    # Bytecode is told to be fresh by times and sizes, which a removal may leave as they are.
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST", "MAKE"))}
    command = [".venv/bin/python", "-B", "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--maxfail", "3"]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=project,
            env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, f"still not done after {SECONDS} s"
    return done.returncode, done.stdout


def found(project: Path, removal: Removal) -> tuple[Path, str]:
    """Return the file that a removal is about, and its text."""
    path = project / removal.file.replace("PACKAGE", next((project / "src").iterdir()).name)
    return path, path.read_text(encoding="utf-8")


def attempt(project: Path, removal: Removal) -> Verdict:
    """Take a control out, run the tests, put it back."""
    path, text = found(project, removal)
    if text.count(removal.old) != 1:
        said = f"{removal.file} has this text {text.count(removal.old)} times"
        return Verdict(removal.control, removal.removal, [], said)
    path.write_text(text.replace(removal.old, removal.new), encoding="utf-8")
    try:
        status, printed = run(project, removal.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    caught_by = sorted(set(_FAILED.findall(printed)))
    error = "" if caught_by or status == 0 else printed[-1500:]
    return Verdict(removal.control, removal.removal, caught_by, error)


def prepared(folder: Path, broker: str) -> Path:
    """Bake a project with its own environment, and see that its tests pass as it is."""
    project = bake_again(folder, {"broker": broker})
    subprocess.run(["make", "setup"], cwd=project, check=True, stdout=subprocess.DEVNULL)
    return project


def tried(chosen: list[Removal], broker: str) -> list[Verdict]:
    """Try removals on several projects at once."""
    with workshop(f"mutations-{broker}") as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(AT_ONCE):
            own = folder / str(number)
            own.mkdir(mode=0o755, exist_ok=True)
            free.put(prepared(own, broker))
        tests = sorted({test for removal in chosen for test in removal.tests})
        first = free.get()
        status, printed = run(first, tests)
        free.put(first)
        if status != 0:
            raise SystemExit(f"with nothing taken out, a test fails already:\n{printed[-3000:]}")

        def one(removal: Removal) -> Verdict:
            project = free.get()
            try:
                verdict = attempt(project, removal)
            finally:
                free.put(project)
            shown = "caught" if verdict.caught_by else "SURVIVED" if not verdict.error else "BROKEN"
            print(f"{shown:9} {verdict.control:7} {verdict.removal}", flush=True)
            return verdict

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(one, chosen))


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if each removal was noticed by a test."""
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__)
    parser.add_argument("--only", action="append", help="a control's id, such as SIG-4; may be given several times")
    parser.add_argument("--table", type=Path, default=REMOVALS, help="another table of removals")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    options = parser.parse_args(arguments)
    chosen = [each for each in removals(options.table) if not options.only or each.control in options.only]
    verdicts: list[Verdict] = []
    for broker in sorted({removal.broker for removal in chosen}, reverse=True):
        verdicts += tried([removal for removal in chosen if removal.broker == broker], broker)
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=2) + "\n", encoding="utf-8")
    lacking = [verdict for verdict in verdicts if not verdict.caught_by]
    for verdict in lacking:
        print(f"\n{verdict.control}: {verdict.removal}\n{verdict.error or 'no test noticed'}")
    controls = Counter(verdict.control for verdict in verdicts)
    proven = controls.keys() - {verdict.control for verdict in lacking}
    print(f"\n{len(proven)} of {len(controls)} controls proven, by {len(verdicts)} removals: {options.report}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
