"""The suite's verdict: what differs from stock is listed, and what is listed differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..baking import TEMPLATE
from .__main__ import version, wrong
from .verdict import DIFFERENCES, Outcomes, Result, intended, read, unsteady


def outcomes(**by_test: str) -> Outcomes:
    return {test: {"outcome": outcome, "why": "a reason"} for test, outcome in by_test.items()}


ALL = {f"test_{number}": "passed" for number in range(20)}


def result(stock: dict[str, str] | None = None, ours: dict[str, str] | None = None, listed: str = "") -> Result:
    tests = {listed} if listed else set()
    return Result("redis", tests, outcomes(**(ALL | (stock or {}))), outcomes(**(ALL | (ours or {}))), [])


@pytest.mark.parametrize(
    "fine",
    [
        result(),
        result(stock={"test_1": "failed"}, ours={"test_1": "failed"}),
        result(stock={"test_1": "failed"}),
        result(ours={"test_1": "failed"}, listed="test_1"),
        result(stock={"test_1": "skipped"}, ours={"test_1": "skipped"}),
    ],
)
def test_what_is_as_on_stock_or_listed_is_fine(fine: Result) -> None:
    assert list(fine.complaints()) == []


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (result(ours={"test_1": "failed"}), "passes on stock and not on ours: a reason"),
        (result(ours={"test_1": "skipped"}), "passes on stock and not on ours"),
        (result(stock={"test_that_did_not_run": "passed"}), "passes on stock and not on ours: it did not run"),
        (result(listed="test_1"), "test_1 passes on ours: take it out"),
        (result(listed="test_of_an_older_celery"), "is no test of this Celery"),
        (result(stock=dict.fromkeys(["test_1", "test_2", "test_3"], "failed")), "proves nothing"),
        (Result("redis", set(), {}, {}, []), "proves nothing"),
    ],
)
def test_what_differs_unlisted_or_is_listed_and_does_not_is_a_complaint(bad: Result, complaint: str) -> None:
    (sentence,) = bad.complaints()
    assert complaint in sentence


def test_outcomes_are_read_without_those_that_are_unsteady(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    file.write_text("".join(json.dumps({"test": test, "outcome": "passed"}) + "\n" for test in "ab"))
    assert read(file, {"a"}) == {"b": {"test": "b", "outcome": "passed"}}


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_each_difference_has_a_reason_and_is_listed_once(broker: str) -> None:
    text = DIFFERENCES.read_text(encoding="utf-8")
    assert text.count("[[") == text.count("\nwhy = ") == text.count("\ntests = ")
    assert intended(broker)
    assert not intended(broker) & unsteady()


def test_a_source_that_is_missing_or_of_another_version_gets_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.celery_suite", ""], cwd=TEMPLATE, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("CELERY_SOURCE is not set: make celery-suite CELERY_SOURCE=/path/to/celery")
    assert "is no source of Celery" in str(wrong(str(tmp_path)))
    (tmp_path / "t" / "integration").mkdir(parents=True)
    (tmp_path / "celery").mkdir()
    module = tmp_path / "celery" / "__init__.py"
    module.write_text("__version__ = '5.0.0'\n")
    assert f"is Celery 5.0.0, projects have {version()}" in str(wrong(str(tmp_path)))
    module.write_text(f"__version__ = '{version()}'\n")
    assert wrong(str(tmp_path)) is None
