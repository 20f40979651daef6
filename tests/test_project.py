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


def test_unit_tests_pass(default: Path) -> None:
    """With the template's own environment, which has the project's requirements."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"]
    done = subprocess.run(command, cwd=default, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["setup", "lint", "test", "test-live"])
def test_target_succeeds(project: Path, target: str) -> None:
    make(project, target)


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["unit", "live"])
def test_hardening_passes(project: Path, tests: str) -> None:
    """The hardening layer's own tests, in a project's place and environment."""
    command = [".venv/bin/python", "-m", "pytest", "-q", f"tests/hardening/{tests}"]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
