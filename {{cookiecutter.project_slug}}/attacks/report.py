"""The table for people and the report for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .attack import Attack

SUCCEEDED, FAILED, ERROR = "succeeded", "failed", "error"
_WIDTHS = (5, 43, 26, 9, 9)  # with two spaces between them: 100 columns
_COLOURS = {SUCCEEDED: "31", FAILED: "32", ERROR: "33"}


@dataclass(frozen=True)
class Trial:
    """One attack on one target. `evidence` says what was seen; an error says why nothing was proven."""

    id: str
    target: str
    outcome: str
    evidence: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One attack on both targets."""

    attack: Attack
    stock: Trial
    ours: Trial

    @property
    def complaint(self) -> str:
        """What is wrong with this row, if anything."""
        for trial in (self.stock, self.ours):
            if trial.outcome == ERROR:
                return f"{self.attack.id} proves nothing on {trial.target}: {trial.evidence}"
        if self.ours.outcome == SUCCEEDED:
            return f"{self.attack.id} succeeds on ours: {self.ours.evidence}"
        if self.attack.works_on_stock and self.stock.outcome == FAILED:
            return f"{self.attack.id} fails on stock, where it is known to work, so it proves nothing on ours"
        return ""

    def as_json(self) -> dict[str, Any]:
        """The report's form."""
        attack = asdict(self.attack)
        return {
            **{name: attack[name] for name in ("id", "title", "control", "assumes")},
            "stock": self.stock.outcome,
            "ours": self.ours.outcome,
            "evidence": {"stock": self.stock.evidence, "ours": self.ours.evidence},
        }


def table(rows: Iterable[Row], *, colour: bool) -> str:
    """The table, at most 100 columns wide."""
    lines = [_line(("id", "the attacker's goal", "needs", "stock", "ours")), _line("─" * width for width in _WIDTHS)]
    for row in rows:
        cells = _line((row.attack.id, row.attack.title, row.attack.assumes))
        lines.append("  ".join((cells, *(_outcome(trial.outcome, colour) for trial in (row.stock, row.ours)))).rstrip())
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False))


def _outcome(outcome: str, colour: bool) -> str:
    cell = outcome.ljust(_WIDTHS[-1])
    return f"\x1b[{_COLOURS[outcome]}m{cell}\x1b[0m" if colour else cell


def summary(rows: list[Row]) -> str:
    """One sentence."""
    fallen = {name: sum(getattr(row, name).outcome == SUCCEEDED for row in rows) for name in ("stock", "ours")}
    return f"{len(rows)} attacks: {fallen['stock']} succeed on stock Celery, {fallen['ours']} on ours."


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the report."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
