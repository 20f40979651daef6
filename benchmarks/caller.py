"""What a caller does, measured from inside: ``publish N``, ``fill N BEGIN END`` or ``round-trips N``; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import quantiles
from uuid import uuid4

from . import parts
from .apps import PROFILE, app

TEXT = "x" * 100
WARM = 100


def timed(count: int, call: Callable[[int], object]) -> dict[str, float]:
    """Call so often; return messages for each second and CPU microseconds for each message."""
    for number in range(WARM):
        call(number)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        call(number)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": count / wall, "cpu": cpu / count * 1e6}


def publish(number: int) -> None:
    """Publish one."""
    app.tasks["benchmarks.nothing"].delay(number, TEXT)


def main(what: str, count: int, *marks: str) -> object:
    """Do it."""
    with app.producer_or_acquire() as producer:
        producer.connection.ensure_connection()
    if what == "publish":
        return timed(count, publish)
    if what == "fill":
        begin, end = marks
        for number in range(WARM):
            publish(number)
        app.tasks["benchmarks.mark"].delay(begin)
        for number in range(count):
            publish(number)
        app.tasks["benchmarks.mark"].delay(end)
        return parts.means()
    took = []
    for number in range(count + WARM):
        since = time.perf_counter()
        # Stock Celery knows no owners: this puts its keys where this caller's rights are.
        own = {} if PROFILE in {"signed", "guarded"} else {"task_id": f"client:{uuid4()}"}
        assert app.tasks["benchmarks.echo"].apply_async((number,), **own).get(timeout=30) == number  # noqa: S101
        took.append(time.perf_counter() - since)
    cuts = quantiles(took[WARM:], n=100)
    return {"p50": cuts[49] * 1000, "p99": cuts[98] * 1000}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))
