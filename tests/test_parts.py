"""What each answer keeps and drops is one table, and the table is about files that exist (TPL-1)."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from .baking import PROJECT, TEMPLATE, bake


def parts() -> dict[str, dict[str, dict[str, str]]]:
    """Read the table out of the hook, which parses as Python before it is rendered."""
    statements = ast.parse((TEMPLATE / "hooks" / "post_gen_project.py").read_text(encoding="utf-8")).body
    (table,) = (s.value for s in statements if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "PARTS")
    return dict(ast.literal_eval(table))


QUESTIONS = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES = [(question, answer) for question, choices in parts().items() for answer in choices]


def test_each_choice_is_in_the_table_and_explained() -> None:
    for question, choices in QUESTIONS.items():
        if isinstance(choices, list) and not question.startswith("_"):
            assert list(parts()[question]) == choices
            assert QUESTIONS["__prompts__"][question].keys() == {"__prompt__", *choices}


def test_each_question_has_a_prompt() -> None:
    assert QUESTIONS["__prompts__"].keys() == {question for question in QUESTIONS if question[0] != "_"}


@pytest.mark.parametrize(("question", "answer"), CHOICES)
def test_a_choice_keeps_its_parts_and_drops_all_others(
    question: str, answer: str, template: Path, tmp_path: Path
) -> None:
    project = bake(tmp_path / "out", template, {question: answer})
    package = next((project / "src").iterdir()).name
    chosen = parts()[question][answer].values()
    assert all((project / target.replace("{{cookiecutter.package_name}}", package)).exists() for target in chosen)
    for paths in parts()[question].values():
        for source in paths:
            assert (PROJECT / source).exists()
            there = (project / source.replace("{{cookiecutter.package_name}}", package)).exists()
            assert there == (source in chosen)
