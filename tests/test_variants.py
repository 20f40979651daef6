"""Every combination of answers, every way to get the template, oldest and newest Cookiecutter (TPL-1, TPL-3)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .baking import LICENCES, TEMPLATE, bake, environment, published
from .test_quality import check, files

QUESTIONS = {
    question: choices
    for question, choices in json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8")).items()
    if isinstance(choices, list) and question[0] != "_" and question != "licence"
}


def combinations() -> Iterator[dict[str, str]]:
    """Give all answers with all others, and the licences, on which nothing else depends, in turn."""
    for answers, licence in zip(itertools.product(*QUESTIONS.values()), itertools.cycle(LICENCES), strict=False):
        yield dict(zip(QUESTIONS, answers, strict=True)) | {"licence": licence}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share what mypy knows of the libraries."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.exhaustive
@pytest.mark.parametrize("answers", [*combinations()], ids=lambda answers: "-".join(answers.values()))
def test_each_combination_is_formatted_linted_and_typed(
    answers: dict[str, str], template: Path, cache: Path, tmp_path: Path
) -> None:
    project = bake(tmp_path / "out", template, answers)
    check(project, "ruff", "format", "--check", "--no-cache", ".")
    check(project, "ruff", "check", "--no-cache", ".")
    check(project, "mypy", "--cache-dir", str(cache))
    check(project, "pytest", "-q", "-p", "no:cacheprovider", "tests/unit")


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", ["oldest", "ci"], ids=["oldest", "newest"])
def test_oldest_and_newest_cookiecutter_make_the_same_project(
    version: str, template: Path, default: Path, tmp_path: Path
) -> None:
    program = environment(version) / "bin" / "cookiecutter"
    used = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    lock = (TEMPLATE / "requirements/tools" / f"{version}.txt").read_text(encoding="utf-8")
    assert f"cookiecutter=={used.split()[1]} " in lock
    for form, source in published(template, tmp_path).items():
        output = tmp_path / form
        output.mkdir()
        environ = {**os.environ, "HOME": str(tmp_path)}
        subprocess.run([program, "--no-input", "--output-dir", output, *source], env=environ, cwd=output, check=True)
        made = {path.relative_to(output / "my-service"): path.read_bytes() for path in files(output / "my-service")}
        assert made == {path.relative_to(default): path.read_bytes() for path in files(default)}
