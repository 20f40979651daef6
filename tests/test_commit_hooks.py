"""A fresh project's hooks, for real: each refuses what it is there for (SUP-2 to SUP-5)."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .advisories import Service, advisories
from .baking import bake_again, workshop
from .gates import pins, run, tools

__all__ = ["advisories", "tools"]

# Spelt so that this file holds none of it.
AWS_KEY = "AKIA" + "IOSFODNN7EXAMPLQ"
PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n"
PASSWORD = "pass" + 'word = "J3k9-fW2x-Qp8z"'
WORKFLOW = """name: x
on: push
permissions: {}
jobs:
  x:
    name: x
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    steps:
      - uses: actions/checkout@v4
"""
# gate, what its output must name, file, content. No two of a turn (see below) have the same file.
PLANTED = [
    ("format", "would be reformatted", "src/untidy.py", "x  =  1\n"),
    ("lint", "S102", "src/ruff.py", 'exec("x")\n'),
    ("lint", "yamllint", "deploy/lint.yaml", "a: 1\na: 2\n"),
    ("lint", "shellcheck", "deploy/lint.sh", "#!/bin/sh\nrm -rf $1/*\n"),
    ("types", "arg-type", "src/types_.py", "len(1)\n"),
    ("bandit", "bandit", "src/bandit_.py", 'import hashlib\n\nhashlib.md5(b"")\n'),
    ("bandit", "celery_rules.py", "src/rules.py", 'task_serializer = "pickle"\n'),
    ("bandit", "celery_rules.py", "deploy/worker.service", "[Service]\nEnvironment=C_FORCE_ROOT=1\n"),
    ("secrets", "detect-secrets-hook", "src/secret.py", f'KEY = "{AWS_KEY}"\n'),
    ("secrets", "detect-secrets-hook", "deploy/secret.toml", f"{PASSWORD}\n"),
    ("secrets", "Private Key", "deploy/secret.txt", PRIVATE_KEY),
    ("secrets", "check-added-large-files", "secret.bin", "x" * 600_000),
    ("secrets", "check-merge-conflict", "secret.md", "a\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> other\n"),
    ("workflows", "check-jsonschema", ".github/workflows/a.yml", WORKFLOW.replace("runs-on", "runs-in")),
    ("workflows", "zizmor", ".github/workflows/b.yml", WORKFLOW),
    ("workflows", "check-jsonschema", ".github/dependabot.yml", "version: 2\nupdates: [{}]\n"),
    ("workflows", "check-jsonschema", ".gitlab-ci.yml", "x: {script: [make], when: sometimes}\n"),
    ("container", "hadolint", "Dockerfile", "FROM python:latest\nRUN cd / && sudo x\n"),
    ("container", "hadolint", "deploy/Dockerfile.worker", "FROM python\n"),
    ("container", "check-jsonschema", "compose.yaml", "services: {x: {imagge: y}}\n"),
]


@pytest.fixture(scope="module")
def hooked(tools: Path) -> Iterator[Path]:
    """Generate, ``git init``, ``make hooks``: what the README says, and nothing more."""
    with workshop("gates") as folder:
        project = bake_again(folder)
        for extra in ("tests/hardening", "docs"):  # the template's
            subprocess.run(["rm", "-r", project / extra], check=True)
        for command in (["git", "init", "--quiet"], ["make", "hooks"]):
            done = run(project, *command)
            assert done.returncode == 0, done.stdout
        for name, text in (("user.name", "Test"), ("user.email", "t@example.org"), ("commit.gpgsign", "false")):
            assert run(project, "git", "config", name, text).returncode == 0
        yield project


def commit(project: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Add and commit as a person would."""
    assert run(project, "git", "add", *names).returncode == 0
    return run(project, "git", "commit", "-m", "Try")


@pytest.fixture(scope="module")
def first_commit(hooked: Path) -> Path:
    """Commit a fresh project, which every hook must let pass."""
    done = commit(hooked, "--all")
    assert done.returncode == 0, done.stdout
    assert not run(hooked, "git", "status", "--porcelain").stdout
    return hooked


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("turn", range(max(Counter(gate for gate, *_ in PLANTED).values())))
def test_hooks_stop_a_commit(turn: int, first_commit: Path) -> None:
    """In each turn, one violation for each gate that has another: each hook must find its own."""
    planted = {gate: [row for row in PLANTED if row[0] == gate][turn : turn + 1] for gate, *_ in PLANTED}
    rows = [row for rows in planted.values() for row in rows]
    for _, _, name, text in rows:
        (first_commit / name).parent.mkdir(parents=True, exist_ok=True)
        (first_commit / name).write_text(text, encoding="utf-8")
    names = [row[2] for row in rows]
    done = commit(first_commit, "--force", *names)
    assert run(first_commit, "git", "reset", "--quiet", "--hard").returncode == 0  # some stood there before
    assert done.returncode == 1, done.stdout
    assert run(first_commit, "git", "rev-list", "--count", "HEAD").stdout == "1\n"
    for gate, said, name, _ in rows:
        (output,) = re.findall(rf"^- hook id: {gate}\n((?:(?!- hook id).*\n?)*)", done.stdout, re.MULTILINE) or [""]
        assert said in output, f"{gate} let {name} pass:\n{done.stdout}"
        assert Path(name).name in output


@pytest.mark.slow
def test_a_hook_stops_the_push_of_what_is_known_to_be_vulnerable(
    first_commit: Path, advisories: Service, tmp_path: Path
) -> None:
    run(tmp_path, "git", "init", "--quiet", "--bare", "remote.git")
    push = ["git", "push", str(tmp_path / "remote.git"), "HEAD:main"]
    pin = next(pin for pin in pins(first_commit / "requirements/run.txt") if pin[0] == "celery")
    advisories.plant(*pin)
    done = run(first_commit, *push, **advisories.environment)
    assert done.returncode == 1
    assert f"celery {pin[1]}: GHSA-plan-ted1-0000" in done.stdout
    assert not run(tmp_path / "remote.git", "git", "branch").stdout
    advisories.known.clear()
    done = run(first_commit, *push, **advisories.environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_gates_pass_in_a_fresh_project(first_commit: Path, advisories: Service) -> None:
    done = run(first_commit, "make", "--no-print-directory", "gates", **advisories.environment)
    assert done.returncode == 0, done.stdout
    assert (first_commit / "reports" / "sbom.json").is_file()
    assert not run(first_commit, "git", "status", "--porcelain").stdout
