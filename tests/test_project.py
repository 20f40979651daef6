"""A generated project's own commands, run as its people run them: what they print on failure is the failure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from . import attack_table
from .baking import TEMPLATE
from .controls.__main__ import sections


def make(project: Path, target: str) -> str:
    """Run a target of the project's Makefile and return what it printed."""
    # An outer make and an outer pytest would pass their own variables on.
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "PYTEST", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--no-print-directory", target],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"make {target} in {project}:\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("broker", ["default", "redis"])
def test_unit_tests_pass(broker: str, request: pytest.FixtureRequest) -> None:
    """With the template's own environment, which has the project's requirements."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"]
    tree = request.getfixturevalue(broker)
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["setup", "format", "lint", "types", "test", "test-live"])
def test_target_succeeds(project: Path, target: str) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)  # `lint` looks at what would be committed
    make(project, target)


def run_hardening(project: Path, *tests: str, **settings: str) -> None:
    """Run the hardening layer's own tests, in a project's place and environment."""
    modules = [f"tests/hardening/{test}" for test in tests]
    report = project / "reports" / f"{'-'.join(tests).replace('/', '.')}.xml"
    command = [".venv/bin/python", "-m", "pytest", "-q", f"--junitxml={report}", *modules]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    environment |= settings
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tests", ["unit", "fuzz", "live"])
def test_hardening_passes(project: Path, tests: str) -> None:
    run_hardening(project, tests)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_hardening_withstands_a_million_inputs(project: Path) -> None:
    make(project, "setup")
    run_hardening(project, "fuzz", FUZZ_INPUTS="1000000", PYTEST_TIMEOUT="3600")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["setup", "test", "test-live"])
def test_target_succeeds_with_redis(redis_project: Path, target: str) -> None:
    make(redis_project, target)


#: What a broker can do better or worse; the other tests of the hardening layer are about no broker, or about RabbitMQ.
OF_BROKERS = (
    *("backend_accounts", "celery", "control", "events", "flower", "limits", "managed", "policy", "quarantine"),
    *("redis_accounts", "redis_broker", "reliability", "replay", "rotation", "routes", "stack", "stock_flower"),
    "two_services",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", OF_BROKERS)
def test_hardening_passes_with_redis(redis_project: Path, module: str) -> None:
    run_hardening(redis_project, f"live/test_{module}.py")


def test_what_only_redis_can_promise_is_run_there() -> None:
    """Such a test is left out with RabbitMQ, so it would never run."""
    modules = (TEMPLATE / "tests" / "hardening" / "live").glob("test_*.py")
    marked = {path.stem.removeprefix("test_") for path in modules if 'broker("redis")' in path.read_text()}
    assert "control" in marked
    assert marked <= set(OF_BROKERS)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("broker", ["project", "redis_project"])
def test_a_worker_withstands_ten_thousand_bad_messages(broker: str, request: pytest.FixtureRequest) -> None:
    project = request.getfixturevalue(broker)
    make(project, "setup")
    test = "live/test_quarantine.py::test_a_worker_under_bad_messages_of_every_kind_does_not_grow"
    run_hardening(project, test, FLOOD="10000", PYTEST_TIMEOUT="3600")


@pytest.mark.slow
def test_the_demos_tasks_are_signed_over_redis_too(redis_project: Path) -> None:
    """Of ``make demo``; the attacks behind it ran with the live tests."""
    make(redis_project, "up")
    command = "set -a; . ./.stack/client.env; exec .venv/bin/python -m my_service.demo"
    try:
        printed = subprocess.run(["sh", "-c", command], cwd=redis_project, capture_output=True, text=True, check=False)
    finally:
        make(redis_project, "down")
    assert printed.returncode == 0, printed.stderr
    for role in ("client", "worker"):
        assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed.stdout


@pytest.mark.slow
def test_demo_shows_signers_and_attacks_and_leaves_nothing_running(project: Path) -> None:
    """It fails if an attack succeeds here, or proves nothing because it fails on stock for another reason."""
    printed = make(project, "demo")
    for role in ("client", "worker"):
        assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed
    assert "attacks over RabbitMQ" in printed
    status = subprocess.run(["make", "status"], cwd=project, capture_output=True, text=True, check=False)
    assert "nothing is up" in status.stdout


def reported(project: Path) -> list[dict[str, Any]]:
    """What the project's live tests, or its demo, have reported of its attacks; else attack it."""
    report = project / "reports" / "attacks.json"
    if not report.exists():
        make(project, "attack")
    rows: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    return rows


@pytest.mark.slow
def test_the_readme_shows_the_attacks_over_both_brokers(project: Path, redis_project: Path) -> None:
    written = attack_table.table([*reported(project), *reported(redis_project)])
    assert attack_table.shown() == written, "the README shows other attacks: make table"


@pytest.mark.slow
def test_a_run_leaves_the_tree_as_it_was_committed(project: Path, tmp_path: Path) -> None:
    """Also what the stack and the tests write is ignored, and is not among what a first commit would hold."""
    git = ["git", "--git-dir", str(tmp_path / "git"), "--work-tree", str(project)]
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "git")], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    )
    assert not [name for name in listed.stdout.split() if name.startswith((".stack", ".venv", "reports"))]


def ran(*projects: Path) -> set[str]:
    """Return the modules of which a test has passed, as their reports say: ``unit/test_gate.py``."""
    return {
        re.sub(r"\.[A-Z].*", "", case.attrib["classname"]).replace(".", "/").removeprefix("tests/hardening/") + ".py"
        for project in projects
        for report in (project / "reports").glob("*.xml")
        for case in ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest has written it, moments ago
        if not len(case)  # no failure, no error, not skipped
    }


@pytest.mark.slow
def test_every_test_that_proves_a_control_was_run(
    project: Path, redis_project: Path, request: pytest.FixtureRequest
) -> None:
    """Those of the hardening layer have left reports; the template's own are in this run."""
    named = {name for _, controls in sections() for control in controls for name in control.tests}
    here = {f"tests/{item.path.name}" for item in request.session.items}
    made = {name for name in named if name.startswith("tests/unit")}  # a generated project's own: `make test`
    # `make test` leaves to `make test-all` what is marked so.
    later = {"tests/test_variants.py"} if "not exhaustive" in request.config.getoption("markexpr") else set()
    assert named - made - here - later - ran(project, redis_project) == set()
