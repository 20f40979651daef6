"""What the attack suite says of its own findings."""

from __future__ import annotations

import json

import pytest

from attacks import report
from attacks.attack import Attack, catalogue
from attacks.report import ERROR, FAILED, SUCCEEDED, Row, Trial


def row(stock: str, ours: str, *, works_on_stock: bool = True) -> Row:
    attack = Attack("F0", "Do harm", "SIG-1", "nothing", lambda target: None, works_on_stock)
    return Row(attack, Trial("F0", "stock", stock, "seen there", 0.1), Trial("F0", "ours", ours, "seen here", 0.1))


@pytest.mark.parametrize(
    ("stock", "ours", "words"),
    [
        (SUCCEEDED, FAILED, ""),
        (SUCCEEDED, SUCCEEDED, "F0 succeeds on ours: seen here"),
        (FAILED, FAILED, "F0 fails on stock, where it is known to work, so it proves nothing on ours"),
        (SUCCEEDED, ERROR, "F0 proves nothing on ours: seen here"),
        (ERROR, FAILED, "F0 proves nothing on stock: seen there"),
    ],
)
def test_only_a_real_attack_that_fails_on_ours_is_no_complaint(stock, ours, words):
    assert row(stock, ours).complaint == words


def test_attack_that_stock_withstands_may_fail_there():
    assert row(FAILED, FAILED, works_on_stock=False).complaint == ""


def test_table_fits_a_terminal():
    trial = Trial("", "", SUCCEEDED, "", 0.0)
    rows = [Row(attack, trial, trial) for attack in catalogue()]
    assert max(len(line) for line in report.table(rows, colour=False).splitlines()) <= 100


def test_table_has_colour_only_when_asked():
    assert "\x1b" not in report.table([row(SUCCEEDED, FAILED)], colour=False)
    assert "\x1b[32mfailed" in report.table([row(SUCCEEDED, FAILED)], colour=True)


def test_report_has_what_was_agreed(tmp_path):
    report.write([row(SUCCEEDED, FAILED)], tmp_path / "reports" / "attacks.json")
    assert json.loads((tmp_path / "reports" / "attacks.json").read_text()) == [
        {
            "id": "F0",
            "title": "Do harm",
            "control": "SIG-1",
            "assumes": "nothing",
            "stock": "succeeded",
            "ours": "failed",
            "evidence": {"stock": "seen there", "ours": "seen here"},
        }
    ]
