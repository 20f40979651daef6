"""Writes the README's attack table from ``reports/attacks.json``, which ``make demo`` leaves: ``make table``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .baking import TEMPLATE

README = TEMPLATE / "README.md"
REPORT = TEMPLATE / "reports" / "attacks.json"
BEGIN, END = "<!-- attacks -->", "<!-- /attacks -->"


def table(report: list[dict[str, Any]]) -> str:
    """Return the report as Markdown, and one sentence that counts."""
    rows = [f"| {row['id']} | {row['title']} | {row['assumes']} | {row['stock']} | {row['ours']} |" for row in report]
    fallen = {target: sum(row[target] == "succeeded" for row in report) for target in ("stock", "ours")}
    return "\n".join(
        (
            f"{len(report)} attacks: {fallen['stock']} succeed on stock Celery, "
            f"{fallen['ours']} on a generated project.",
            "",
            "| id | the attacker's goal | needs | stock | ours |",
            "|---|---|---|---|---|",
            *rows,
        )
    )


def shown(readme: Path = README) -> str:
    """Return what the README shows between its two marks."""
    return readme.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> int:
    """Write the table."""
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    written = table(json.loads(REPORT.read_text(encoding="utf-8")))
    README.write_text(f"{head}{BEGIN}\n{written}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
