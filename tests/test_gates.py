"""A fresh project passes every gate, and the gates are the same everywhere (SUP-2 to SUP-5)."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from .baking import LONG, PROJECT, TEMPLATE, bake
from .gates import GIT, pins, repository, run, tools
from .test_celery_rules import RULES

__all__ = ["tools"]

GATES = ("lint", "bandit", "secrets", "workflows", "container")
#: Words that go before secrets. An answer that is a password in quotes, or a plain URL, is refused like any other.
AWKWARD = {
    "project_name": "Secret Password Key",
    "author": "Password & Token Ltd",
    "description": "api_key: a secret",
}
ANSWERS: dict[str, dict[str, str]] = {"default": {}, "redis": {"broker": "redis"}, "long": LONG, "awkward": AWKWARD}


@pytest.fixture(
    scope="session",
    params=[name if name == "default" else pytest.param(name, marks=pytest.mark.slow) for name in ANSWERS],
)
def fresh(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake and ``git init``, which is all that a person does before the first commit."""
    answers = ANSWERS[request.param]
    return repository(bake(tmp_path_factory.mktemp(request.param), template, answers))


@pytest.mark.parametrize("gate", GATES)
def test_a_fresh_project_passes(gate: str, fresh: Path, tools: Path) -> None:
    done = run(fresh, tools / "python", "tools/gate.py", gate)
    assert done.returncode == 0, done.stdout
    assert run(fresh, *GIT, "diff", "--exit-code").returncode == 0, "a gate changes nothing"


@pytest.mark.parametrize("where", ["nowhere", "ignored"])
def test_a_gate_with_no_files_to_look_at_is_refused(where: str, template: Path, tools: Path, tmp_path: Path) -> None:
    """No repository, or a folder that one ignores: a gate that passes there proves nothing."""
    project = bake(tmp_path / "out", template)
    if where == "ignored":
        (project.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        repository(project.parent)
    done = run(project, tools / "python", "tools/gate.py", "secrets")
    assert done.returncode == 1
    assert re.fullmatch(r"The gates look at the files that git would commit, and .*: git init\n", done.stdout), (
        done.stdout
    )


def test_a_gate_says_when_nothing_is_its_business(template: Path, tools: Path, tmp_path: Path) -> None:
    project = repository(bake(tmp_path / "out", template))
    done = run(project, tools / "python", "tools/gate.py", "workflows", "README.md")
    assert (done.returncode, done.stdout) == (0, "workflows: no such files here, so nothing to look at\n")


# --- one set of gates


def targets(makefile: Path) -> list[str]:
    """Return the gates that ``make gates`` runs."""
    (names,) = re.findall(r"^GATES := (.*)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    return list(names.split())


@pytest.mark.parametrize("root", [TEMPLATE, PROJECT], ids=["template", "project"])
def test_hooks_run_gates_and_nothing_else(root: Path) -> None:
    gates = targets(root / "Makefile")
    hooks = re.findall(r"^ +entry: (.*)$", (root / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    called = [entry.removeprefix("make --no-print-directory ") for entry in hooks]
    assert sorted(called) == sorted({*gates} - {"test", "sbom"})


def test_gates_are_the_same_in_the_template_and_in_a_project() -> None:
    assert targets(TEMPLATE / "Makefile") == targets(PROJECT / "Makefile")
    hooks = ".pre-commit-config.yaml"
    assert (TEMPLATE / hooks).read_bytes() == (PROJECT / hooks).read_bytes()


def test_the_baseline_holds_no_secret_that_somebody_accepted(default: Path) -> None:
    baseline = json.loads((default / ".secrets.baseline").read_text(encoding="utf-8"))
    assert baseline["results"] == {}
    locked = dict(pins(default / "requirements/tools.txt"))
    assert baseline["version"] == locked["detect-secrets"], "run make secrets, which writes the new version into it"


def test_the_rules_are_the_ones_that_the_gate_runs(default: Path) -> None:
    assert (default / "tools/celery_rules.py").read_bytes() == RULES.read_bytes()


def test_ruff_has_all_its_security_rules_on(default: Path) -> None:
    for folder in (TEMPLATE, default):
        lint = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
        assert "S" in lint["select"]
        assert not [rule for rule in lint["ignore"] if rule.startswith("S") and not rule.startswith("SIM")]


def test_sonarqube_is_told_where_code_and_tests_are(default: Path) -> None:
    text = (default / "sonar-project.properties").read_text(encoding="utf-8")
    properties = dict(line.split("=", 1) for line in text.splitlines() if line and line[0] != "#")
    assert properties["sonar.projectKey"] == "my-service"
    for name in ("sonar.sources", "sonar.tests"):
        assert all((default / folder).is_dir() for folder in properties[name].split(","))
    assert properties["sonar.qualitygate.wait"] == "true"
