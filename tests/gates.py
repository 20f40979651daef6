"""The gates' environment, and projects to run them in: what the tests of gates share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .baking import PROJECT, TEMPLATE

TOOLS = TEMPLATE / ".venv-tools"
GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="session")
def tools() -> Path:
    """Make the gates' environment, as ``make hooks`` in the template does; a second run finds it."""
    venv, lock = PROJECT / "tools" / "venv.py", PROJECT / "requirements" / "tools.txt"
    subprocess.run([sys.executable, venv, TOOLS, lock], cwd=TEMPLATE, check=True, capture_output=True)
    return TOOLS / "bin"


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment without what an outer make, pytest or git hook passes on."""
    own = ("MAKE", "PYTEST", "MFLAGS", "GIT_", "PIP_AUDIT")
    return {name: text for name, text in os.environ.items() if not name.startswith(own)} | more


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a project; its lines of both kinds are in ``stdout``."""
    return subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def repository(folder: Path) -> Path:
    """Make a project a repository with everything in it added."""
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        assert run(folder, *GIT, *arguments).returncode == 0
    return folder


def pins(*locks: Path) -> set[tuple[str, str]]:
    """Return what locks hold, for any platform."""
    text = "".join(lock.read_text(encoding="utf-8") for lock in locks)
    return {(name, version) for name, version in re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.MULTILINE)}
