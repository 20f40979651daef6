"""``make celery-suite CELERY_SOURCE=...``: Celery's integration tests on both brokers, stock beside ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from ..baking import PROJECT, bake_again, workshop
from .verdict import Result, intended

HERE = Path(__file__).parent
BROKERS = ("rabbitmq", "redis")
OUTCOMES = "celery-suite/outcomes.json"


def version() -> str:
    """Return the version of Celery that projects are locked to."""
    lock = (PROJECT / "requirements" / "run.txt").read_text(encoding="utf-8")
    return str(re.findall(r"^celery==(\S+)", lock, re.MULTILINE)[0])


def wrong(source: str) -> str | None:
    """Return what is wrong with this source, in one sentence, or None."""
    give = (
        "make celery-suite CELERY_SOURCE=/path/to/celery takes a checkout of Celery's tag "
        f"v{version()}, or its unpacked source distribution, with its tests in t/"
    )
    if not source:
        return f"CELERY_SOURCE is not set: {give}"
    module = Path(source, "celery", "__init__.py")
    if not module.is_file() or not Path(source, "t", "integration").is_dir():
        return f"{source} is no source of Celery with its tests: {give}"
    found = re.search(r"__version__ = '(.+)'", module.read_text(encoding="utf-8"))
    if found is None or found[1] != version():
        return f"{source} is Celery {found[1] if found else '?'}, projects have {version()}: {give}"
    return None


def prepare(folder: Path, broker: str, source: Path) -> Path:
    """Bake a project for this broker and put the tests into it."""
    project = bake_again(folder, {"broker": broker})
    shutil.copytree(HERE, project / "tests" / HERE.name)
    suite = project / "celery-suite"
    shutil.copytree(source / "t", suite / "t", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", suite)  # pytest's settings
    topology = (HERE / "topology.toml").read_text(encoding="utf-8")
    (suite / "topology.toml").write_text(topology.replace('"rabbitmq"', f'"{broker}"'), encoding="utf-8")
    for path in (suite, *suite.rglob("*")):  # whatever the source's modes are, an unprivileged user reads this copy
        path.chmod(0o755 if path.is_dir() else 0o644)
    subprocess.run(["make", "--no-print-directory", "setup"], cwd=project, check=True)
    return project


def main(source: str) -> int:
    """Return 0 if nothing differs from stock but what shall."""
    if sentence := wrong(source):
        print(sentence, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the lanes end their servers
    with ExitStack() as folders:
        projects = {
            broker: prepare(folders.enter_context(workshop(f"celery-suite-{broker}")), broker, Path(source))
            for broker in BROKERS
        }
        outer = ("MAKE", "MFLAGS", "PYTEST")
        environment = {name: text for name, text in os.environ.items() if not name.startswith(outer)}
        lanes = {
            broker: subprocess.Popen(
                [".venv/bin/python", "-m", f"tests.{HERE.name}.lane"], cwd=project, env=environment
            )
            for broker, project in projects.items()
        }
        try:
            ended = {broker: lane.wait() for broker, lane in lanes.items()}
        except BaseException:
            for lane in lanes.values():
                lane.terminate()
                lane.wait()
            raise
        if any(ended.values()):
            print("A run broke off, see above.", file=sys.stderr)
            return 1
        results = [
            Result(broker, intended(broker), **json.loads((project / OUTCOMES).read_text(encoding="utf-8")))
            for broker, project in projects.items()
        ]
    complaints = [complaint for result in results for complaint in result.complaints()]
    print("\n".join([*(line for result in results for line in result.notes()), *complaints]))
    print("\n| broker | stock passed | ours passed | intended differences |\n|---|---|---|---|")
    for result in results:
        print(result.row())
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
