"""What the outcomes mean: which tests differ from stock though they should not, and which should and do not."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: By test: how it ended, why, and after how many seconds.
Outcomes = dict[str, dict[str, Any]]
DIFFERENCES = Path(__file__).with_name("differences.toml")


def read(file: Path, without: Collection[str] = ()) -> Outcomes:
    """Read what the plugin has written."""
    notes = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {note["test"]: note for note in notes if note["test"] not in without}


def intended(broker: str, file: Path = DIFFERENCES) -> set[str]:
    """Return the tests that shall not pass on this broker."""
    return _tests(one for one in _listed(file, "difference") if broker in one["brokers"])


def unsteady(file: Path = DIFFERENCES) -> set[str]:
    """Return the tests that pass or fail by chance."""
    return _tests(_listed(file, "unsteady"))


def _listed(file: Path, kind: str) -> list[dict[str, Any]]:
    stanzas: list[dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))[kind]
    return stanzas


def _tests(stanzas: Iterable[dict[str, Any]]) -> set[str]:
    return {f"t/integration/{test}" for one in stanzas for test in one["tests"]}


def passed(outcomes: Outcomes) -> set[str]:
    """Return the tests that passed."""
    return {test for test, one in outcomes.items() if one["outcome"] == "passed"}


def unexpected(stock: Outcomes, ours: Outcomes, listed: set[str]) -> set[str]:
    """Return the tests that passed on stock, and neither passed on ours nor are listed."""
    return passed(stock) - passed(ours) - listed


@dataclass(frozen=True)
class Result:
    """All outcomes on one broker. ``again`` are the tests that ours got another chance for."""

    broker: str
    listed: set[str]
    stock: Outcomes
    ours: Outcomes
    again: list[str]

    def complaints(self) -> Iterator[str]:
        """Yield a sentence for each reason to fail."""
        if len(passed(self.stock)) <= len(self.stock) * 0.9:
            yield f"{self.broker}: more than a tenth of the tests fail on stock, so this run proves nothing"
        for test in sorted(unexpected(self.stock, self.ours, self.listed)):
            why = self.ours.get(test, {}).get("why", "it did not run")
            yield f"{self.broker}: {test} passes on stock and not on ours: {why}"
        for test in sorted(self.listed & passed(self.ours)):
            yield f"{self.broker}: {test} passes on ours: take it out of {DIFFERENCES.name}"
        for test in sorted(self.listed - self.stock.keys()):
            yield f"{self.broker}: {test}, in {DIFFERENCES.name}, is no test of this Celery"

    def notes(self) -> Iterator[str]:
        """Yield what a person should know though it is no reason to fail."""
        for test in sorted(passed(self.ours) & set(self.again)):
            yield f"{self.broker}: {test} passed on ours when it was run again"
        for test in sorted(self.stock.keys() - passed(self.stock)):
            yield f"{self.broker}: {test} does not pass on stock: {self.stock[test]['why']}"

    def row(self) -> str:
        """Return this broker's row of the table."""
        numbers = (len(passed(self.stock)), len(passed(self.ours)), len(self.listed & passed(self.stock)))
        return f"| {self.broker} | {' | '.join(map(str, numbers))} |"
