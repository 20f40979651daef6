"""The attack suite as a whole: everything it reports, on servers of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..project import topology
from ..service import ROOT

BROKER = topology.Topology.load(ROOT / "topology.toml").broker
#: Attacks that stock Celery withstands too; they are there because ours might not.
WITHSTOOD_BY_STOCK = {"X4", "X5", "X6", "X18", "X27", "X28", *(["X29.2"] if BROKER == "redis" else [])}


@pytest.fixture(scope="module")
def run(temporary: Path) -> subprocess.CompletedProcess[str]:
    """One run of all attacks."""
    command = [sys.executable, "-m", "attacks", "--json", "--folder", temporary / "attacks"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)


@pytest.fixture(scope="module")
def report(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What it printed."""
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


@pytest.mark.timeout(600)
def test_no_attack_succeeds_on_ours(report):
    assert {row["id"]: row["evidence"]["ours"] for row in report if row["ours"] != "failed"} == {}


def test_each_attack_is_a_real_one(report):
    failed = {row["id"]: row["evidence"]["stock"] for row in report if row["stock"] != "succeeded"}
    assert failed.keys() == WITHSTOOD_BY_STOCK, failed
    assert {row["id"] for row in report if "withstood" in row} == WITHSTOOD_BY_STOCK


def test_the_report_names_the_broker(report):
    assert {row["broker"] for row in report} == {BROKER}


def test_the_run_says_that_all_is_well(run):
    assert (run.returncode, run.stderr) == (0, "")


def test_the_report_is_kept(report):
    assert json.loads((ROOT / "reports" / "attacks.json").read_text()) == report
