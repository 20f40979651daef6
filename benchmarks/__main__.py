"""``python -m benchmarks``: measure every profile in turn, several times, on one stack; ratios of medians count.

Absolute numbers say more about a machine than about a program. Each round measures all profiles one after the other, so
that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from attacks.against_stock import self_signed

from stack import Stack

from . import parts
from .chart import chart, markdown

ROOT = Path.cwd()
PROFILES = ("json", "auth", "signed", "guarded")
#: What the hardened worker never does.
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")
#: What is measured, in which unit, and whether more is better.
MEASURES = {
    "publish.per_second": ("publish, messages/s", True),
    "publish.cpu": ("publish, CPU µs", False),
    "consume.per_second": ("consume, messages/s", True),
    "consume.cpu": ("consume, CPU µs", False),
    "round-trips.p50": ("round trip p50, ms", False),
    "round-trips.p99": ("round trip p99, ms", False),
    "pss": ("PSS of a pool child, MiB", False),
}
#: What is to hold: profile, measure, against which profile, and at least which ratio (of costs: upside down).
GOALS = (
    ("signed", "publish.per_second", "json", 0.85),
    ("signed", "publish.cpu", "json", 0.85),
    ("signed", "publish.per_second", "auth", 1.5),
    ("signed", "publish.cpu", "auth", 1.5),
    ("signed", "consume.per_second", "json", 0.90),
    ("signed", "consume.cpu", "json", 0.90),
    ("guarded", "consume.per_second", "json", 0.75),
    ("guarded", "consume.cpu", "json", 0.75),
    ("guarded", "consume.per_second", "auth", 1.0),
    ("guarded", "consume.cpu", "auth", 1.0),
    ("guarded", "pss", "json", 1 / 1.3),
)


class Bench:
    """One stack, every profile on it."""

    def __init__(self, stack: Stack, package: str) -> None:
        self.stack = stack
        self.folder = stack.account.give(_folder(stack.folder / "bench"))
        self.package = package
        self.marks = [self.folder / name for name in ("begin", "end")]
        self.watched: dict[str, str] = {}
        _auth(self.folder / "auth", stack.account)

    def environment(self, role: str, profile: str) -> dict[str, str]:
        own = {"PROFILE": profile, "BENCH_PACKAGE": self.package, "BENCH_AUTH": str(self.folder / "auth")}
        return {**self.stack.environment(role), **own, **self.watched}

    def call(self, profile: str, *what: object) -> dict[str, float]:
        """Run a caller in a process of its own."""
        paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.caller", *map(str, what)],
            env={"PATH": os.defpath, "PYTHONPATH": paths, **self.environment("client", profile)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        measured: dict[str, float] = json.loads(done.stdout)
        return measured

    def worker(self, profile: str) -> Any:
        return self.stack.start_worker(
            "benchmarks.apps:app",
            self.environment("worker", profile),
            "bench",
            ("--concurrency", "1", "--queues", f"bench.{profile}", *QUIET),
        )

    @contextmanager
    def consuming(self, profile: str, count: int) -> Iterator[dict[str, float]]:
        """Fill a queue and let a worker empty it, which ends with the block; yields what the caller found."""
        self.stack.rabbitmqctl("purge_queue", "-p", "bench", f"bench.{profile}")
        for mark in self.marks:
            mark.unlink(missing_ok=True)
        found = self.call(profile, "fill", count, *self.marks)
        worker = self.worker(profile)
        try:
            worker.process.wait(lambda: self.marks[1].exists() and bool(self.marks[1].read_text()), 300)
            yield found
        finally:
            worker.stop()

    def round(self, profile: str, count: int) -> dict[str, float]:
        """Measure one profile once."""
        found = {f"publish.{name}": value for name, value in self.call(profile, "publish", count).items()}
        with self.consuming(profile, count):
            (since, used, _), (until, used_then, pss) = (map(float, mark.read_text().split()) for mark in self.marks)
            found["consume.per_second"] = count / (until - since)
            found["consume.cpu"] = (used_then - used) / count * 1e6
            found["pss"] = pss / 1024
            round_trips = self.call(profile, "round-trips", max(100, count // 10))
        return found | {f"round-trips.{name}": value for name, value in round_trips.items()}

    def parts(self, count: int) -> dict[str, float]:
        """Time the layer's parts, in a publisher and a worker that nothing else is measured of."""
        self.watched = {"BENCH_PARTS": str(self.folder)}
        with self.consuming("guarded", count) as published:
            pass
        return parts.collect(self.folder, published)


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def _auth(folder: Path, account: Any) -> None:
    """Make what Celery's guide asks for: an RSA key, its certificate, a store that holds it."""
    key, certificate = self_signed("bench")
    for path in (folder, folder / "store"):
        account.give(_folder(path))
    account.write(folder / "key.pem", key)
    for path in (folder / "certificate.pem", folder / "store" / "bench.pem"):
        account.write(path, certificate)


def ratio(medians: dict[str, dict[str, float]], profile: str, measure: str, other: str) -> float:
    """How much better one profile is than another: above 1 it is faster, or needs less."""
    ours, theirs = medians[profile][measure], medians[other][measure]
    return ours / theirs if MEASURES[measure][1] else theirs / ours


def main() -> int:
    """Measure, print a table, write the report and the chart."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="What each layer costs.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--messages", type=int, default=1500)
    parser.add_argument("--reports", type=Path, default=ROOT / "reports")
    options = parser.parse_args()
    package = next(path.parent.parent.name for path in ROOT.glob("src/*/hardening/harden.py"))
    stack = Stack(ROOT, ROOT / ".stack-bench", topology=Path(__file__).with_name("topology.toml"))
    rounds: dict[str, dict[str, list[float]]] = {profile: defaultdict(list) for profile in PROFILES}
    stack.up(worker=False)
    try:
        bench = Bench(stack, package)
        for number in range(options.rounds):
            for profile in PROFILES:
                print(f"round {number + 1} of {options.rounds}: {profile}", file=sys.stderr, flush=True)
                for measure, value in bench.round(profile, options.messages).items():
                    rounds[profile][measure].append(value)
        costs = bench.parts(options.messages)
    finally:
        stack.down()
    medians = {profile: {name: median(values) for name, values in found.items()} for profile, found in rounds.items()}
    goals = [
        {"profile": profile, "measure": measure, "against": other, "goal": round(goal, 3), "reached": round(got, 3)}
        for profile, measure, other, goal in GOALS
        for got in (ratio(medians, profile, measure, other),)
    ]
    report = {"messages": options.messages, "rounds": rounds, "medians": medians, "goals": goals, "parts": costs}
    options.reports.mkdir(exist_ok=True)
    (options.reports / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (options.reports / "benchmark.svg").write_text(chart(medians), encoding="utf-8")
    print(markdown(medians, goals, MEASURES, costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
