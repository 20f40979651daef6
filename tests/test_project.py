"""A generated project's own commands, run as its people run them: what they print on failure is the failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import attack_table


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
@pytest.mark.parametrize("target", ["setup", "lint", "test", "test-live"])
def test_target_succeeds(project: Path, target: str) -> None:
    make(project, target)


def run_hardening(project: Path, *tests: str) -> None:
    """Run the hardening layer's own tests, in a project's place and environment."""
    command = [".venv/bin/python", "-m", "pytest", "-q", *(f"tests/hardening/{test}" for test in tests)]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["unit", "live"])
def test_hardening_passes(project: Path, tests: str) -> None:
    run_hardening(project, tests)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["setup", "test", "test-live"])
def test_target_succeeds_with_redis(redis_project: Path, target: str) -> None:
    make(redis_project, target)


#: What a broker can do better or worse; the other tests of the hardening layer are about no broker, or about RabbitMQ.
OF_BROKERS = ("backend_accounts", "celery", "reliability", "stack", "redis_accounts", "redis_broker")


@pytest.mark.slow
@pytest.mark.parametrize("module", OF_BROKERS)
def test_hardening_passes_with_redis(redis_project: Path, module: str) -> None:
    run_hardening(redis_project, f"live/test_{module}.py")


@pytest.mark.slow
def test_a_demo_with_redis_shows_signers_and_says_that_no_attack_was_run(redis_project: Path) -> None:
    printed = make(redis_project, "demo")
    for role in ("client", "worker"):
        assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed
    assert "No attack was run" in printed


@pytest.mark.slow
def test_attacks_that_cannot_be_run_are_no_success(redis_project: Path) -> None:
    make(redis_project, "setup")
    done = subprocess.run(["make", "attack"], cwd=redis_project, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "No attack was run" in done.stderr


@pytest.mark.slow
def test_demo_shows_signers_and_attacks_and_leaves_nothing_running(project: Path) -> None:
    """It fails if an attack succeeds here, or proves nothing because it fails on stock for another reason."""
    printed = make(project, "demo")
    for role in ("client", "worker"):
        assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed
    report = json.loads((project / "reports" / "attacks.json").read_text(encoding="utf-8"))
    assert attack_table.shown() == attack_table.table(report), "the README shows other attacks: make demo table"
    status = subprocess.run(["make", "status"], cwd=project, capture_output=True, text=True, check=False)
    assert "nothing is up" in status.stdout


@pytest.mark.slow
def test_a_run_leaves_the_tree_as_it_was_committed(project: Path, tmp_path: Path) -> None:
    """Also what the stack and the tests write is ignored, and is not among what a first commit would hold."""
    git = ["git", "--git-dir", str(tmp_path / "git"), "--work-tree", str(project)]
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "git")], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    )
    assert not [name for name in listed.stdout.split() if name.startswith((".stack", ".venv", "reports"))]
