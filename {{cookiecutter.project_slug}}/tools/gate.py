"""One gate: ``python tools/gate.py NAME [GIT PATHSPEC ...]`` runs its checks on the files that git would commit.

Guards against: a check that a laptop, a hook and a pipeline each run in another way, and one that passes because it
was given nothing to look at.
Rests on: running in the locked environment of ``requirements/tools.txt``, whose programs are beside its Python.
Controls: SUP-3, SUP-4, SUP-5.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from identify.identify import tags_from_path

PROGRAMS = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
YAML = "{extends: relaxed, rules: {line-length: {max: 140}, truthy: {check-keys: false}, octal-values: enable}}"


class Check(NamedTuple):
    """A command, and which files it gets: globs, or what ``identify`` says they are (``#yaml``)."""

    command: str
    files: str = "*"
    unless: str = ""
    arguments: tuple[str, ...] = ()


SCHEMA = "check-jsonschema --builtin-schema"
TESTS = "tests/* */tests/* test_*.py */test_*.py"
GATES = {
    "lint": (
        Check("yamllint --strict", "#yaml", arguments=("--config-data", YAML)),
        Check("shellcheck --severity=style", "#shell", unless="#zsh"),
    ),
    "bandit": (
        Check("bandit --quiet --configfile pyproject.toml", "#python", unless=TESTS),
        Check("celery_rules.py"),
    ),
    "secrets": (
        Check("detect-secrets-hook --no-verify --baseline .secrets.baseline", unless=".secrets.baseline"),
        Check("check-added-large-files --enforce-all --maxkb=500"),
        Check("check-merge-conflict --assume-in-merge", "#text"),
    ),
    "workflows": (
        Check(f"{SCHEMA} vendor.github-workflows", ".github/workflows/*.yml .github/workflows/*.yaml"),
        Check(f"{SCHEMA} vendor.dependabot", ".github/dependabot.yml .github/dependabot.yaml"),
        Check(f"{SCHEMA} vendor.gitlab-ci --data-transform gitlab-ci", ".gitlab-ci.yml"),
        Check(f"{SCHEMA} vendor.renovate", "renovate.json .github/renovate.json"),
        Check(
            "zizmor --offline --no-progress --quiet --persona auditor --strict-collection",
            ".github/workflows/*.y*ml .github/dependabot.y*ml action.y*ml */action.y*ml .pre-commit-config.yaml",
        ),
    ),
    "container": (
        Check("hadolint --no-color", "#dockerfile"),
        Check(f"{SCHEMA} vendor.compose-spec", "compose.y*ml compose.*.y*ml docker-compose*.y*ml */compose*.y*ml"),
    ),
}


def committed(pathspec: list[str]) -> list[str]:
    """Return the files of this folder that git has, or would add. None at all ends the gate: it would prove nothing."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *pathspec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit("git is not installed, and the gates look at the files that git would commit: install git")
    reason = done.stderr.strip().splitlines()[:1] or ["git ignores this folder, or it is empty"]
    files = [name for name in done.stdout.split("\0") if name and Path(name).is_file() and not Path(name).is_symlink()]
    if done.returncode or not files:
        sys.exit(f"The gates look at the files that git would commit, and it names none ({reason[0]}): git init")
    return sorted(files)


def matches(name: str, patterns: str) -> bool:
    """Whether a file has one of these names, or is of one of these kinds."""
    kinds = tags_from_path(name) if "#" in patterns else set()
    return any(
        pattern[1:] in kinds if pattern[0] == "#" else fnmatch.fnmatch(name, pattern) for pattern in patterns.split()
    )


def main() -> int:
    """Return 0 if every check of the gate passed or had no file to look at; run all of them in either case."""
    parser = argparse.ArgumentParser(prog="gate")
    parser.add_argument("gate", choices=GATES)
    parser.add_argument("pathspec", nargs="*")
    options = parser.parse_args()
    files = committed(options.pathspec)
    ran: list[str] = []
    refused: list[str] = []
    for check in GATES[options.gate]:
        program, *arguments = check.command.split()
        chosen = [name for name in files if matches(name, check.files) and not matches(name, check.unless)]
        if chosen:
            ran.append(program)
            started = [sys.executable, str(HERE / program)] if program.endswith(".py") else [str(PROGRAMS / program)]
            if subprocess.run([*started, *arguments, *check.arguments, *chosen], check=False).returncode:
                refused.append(program)
    if refused:
        print(f"{options.gate}: refused by {', '.join(refused)}, see above", file=sys.stderr)
    elif not ran:
        print(f"{options.gate}: no such files here, so nothing to look at")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
