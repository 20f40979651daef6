"""A generated project's own commands, run as its people run them: what they print on failure is the failure."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("target", ["setup", "lint", "test", "test-live"])
def test_target_succeeds(project: Path, target: str) -> None:
    make(project, target)


def test_attacks_succeed_on_stock_and_fail_here(project: Path) -> None:
    make(project, "attack")
    assert json.loads((project / "reports" / "attacks.json").read_text(encoding="utf-8"))


def test_demo_ends_with_nothing_running(project: Path) -> None:
    make(project, "demo")
    assert (
        "nothing is up"
        in subprocess.run(["make", "status"], cwd=project, capture_output=True, text=True, check=False).stdout
    )


def test_a_run_leaves_the_tree_as_it_was_committed(project: Path, tmp_path: Path) -> None:
    """Also what the stack and the tests write is ignored, and is not among what a first commit would hold."""
    git = ["git", "--git-dir", str(tmp_path / "git"), "--work-tree", str(project)]
    subprocess.run(["git", "init", "--quiet", "--bare", str(tmp_path / "git")], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    )
    assert not [name for name in listed.stdout.split() if name.startswith((".stack", ".venv", "reports"))]
