"""Attacks a project of each broker and writes the README's attack table from their reports: ``make table``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .baking import TEMPLATE, bake_again, workshop

README = TEMPLATE / "README.md"
BROKERS = {"rabbitmq": "RabbitMQ", "redis": "Redis"}
NO_SUCH_THING = "·"


def table(report: list[dict[str, Any]]) -> str:
    """Return the rows of all brokers' reports as Markdown: a sentence that counts, the table, what stock withstands."""
    rows = {(row["id"], row["broker"]): row for row in report}
    first = {row["id"]: row for row in reversed(report)}
    ids = _merged([[row["id"] for row in report if row["broker"] == broker] for broker in BROKERS])
    columns = [(broker, target) for target in ("stock", "ours") for broker in BROKERS]

    def outcome(id: str, broker: str, target: str) -> str:
        return str(rows[id, broker][target]) if (id, broker) in rows else NO_SUCH_THING

    def counted(broker: str) -> str:
        of = [row for row in report if row["broker"] == broker]
        fallen = {target: sum(row[target] == "succeeded" for row in of) for target in ("stock", "ours")}
        return f"over {BROKERS[broker]}, {fallen['stock']} of {len(of)} succeed on stock and {fallen['ours']} on ours"

    cells = [
        ["id", "the attacker's goal", "needs", *(f"{target}, {BROKERS[broker]}" for broker, target in columns)],
        ["---"] * (3 + len(columns)),
        *([id, first[id]["title"], first[id]["assumes"], *(outcome(id, *column) for column in columns)] for id in ids),
    ]
    withstood = "; ".join(f"{id}, because {first[id]['withstood']}" for id in ids if "withstood" in first[id])
    return "\n".join(
        (
            f"{len(ids)} attacks on stock Celery and on a generated project: {'; '.join(map(counted, BROKERS))}.",
            "",
            *(f"| {' | '.join(row)} |" for row in cells),
            "",
            f"`{NO_SUCH_THING}`: there is no such thing over that broker. Stock Celery withstands {withstood}.",
        )
    )


def _merged(orders: list[list[str]]) -> list[str]:
    """Return what is in any of the orders, each behind what it is behind in its own."""
    merged: list[str] = []
    for order in orders:
        place = 0
        for one in order:
            if one not in merged:
                merged.insert(place, one)
            place = merged.index(one) + 1
    return merged


def shown(what: str = "attacks", readme: Path = README) -> str:
    """Return what the README shows between its two marks."""
    return readme.read_text(encoding="utf-8").partition(f"<!-- {what} -->")[2].partition(f"<!-- /{what} -->")[0].strip()


def show(what: str, text: str) -> None:
    """Write it between these marks."""
    begin, end = f"<!-- {what} -->", f"<!-- /{what} -->"
    head, _, rest = README.read_text(encoding="utf-8").partition(begin)
    README.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def attacked(broker: str, folder: str) -> list[dict[str, Any]]:
    """Return the report of a project with this broker; its environment stays in ``build/<folder>``."""
    with workshop(folder) as place:
        project = bake_again(place, {"broker": broker})
        subprocess.run(["make", "--no-print-directory", "attack"], cwd=project, check=True)
        rows: list[dict[str, Any]] = json.loads((project / "reports" / "attacks.json").read_text(encoding="utf-8"))
        return rows


def main() -> int:
    """Attack, and write the table."""
    show("attacks", table([*attacked("rabbitmq", "test"), *attacked("redis", "test-redis")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
