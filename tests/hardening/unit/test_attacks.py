"""What the attack suite says of its own findings."""

from __future__ import annotations

import json

import pytest

from attacks import attack
from attacks.attack import BROKERS, ERROR, FAILED, SUCCEEDED, Attack, Row, Trial, catalogue, table, write


def row(stock: str, ours: str, withstood: str = "") -> Row:
    attack = Attack("F0", "Do harm", "SIG-1", "nothing", lambda target: None, ("rabbitmq",), withstood)
    trials = (Trial("F0", "stock", stock, "seen there", 0.1), Trial("F0", "ours", ours, "seen here", 0.1))
    return Row(attack, *trials, broker="rabbitmq")


CAPABILITIES = {
    "none": {attack.NOTHING},
    "broker write": {attack.PUBLISH, attack.ANYWHERE},
    "low-privilege signer": {attack.LOW_SIGNER},
    "stolen client key": {attack.SIGNER},
    "compromised low-trust worker": {attack.WORKER_KEY, attack.ANYWHERE_AND_WORKER_KEY},
    "backend write": {attack.BACKEND},
    "network": {attack.NETWORK},
    "file system": {attack.FILES},
}


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
    assert row(FAILED, FAILED, "it knows better").complaint == ""


def test_table_fits_a_terminal():
    trial = Trial("", "", SUCCEEDED, "", 0.0)
    rows = [Row(attack, trial, trial) for broker in BROKERS for attack in catalogue(broker)]
    assert max(len(line) for line in table(rows, colour=False).splitlines()) <= 100


def test_table_has_colour_only_when_asked():
    assert "\x1b" not in table([row(SUCCEEDED, FAILED)], colour=False)
    assert "\x1b[32mfailed" in table([row(SUCCEEDED, FAILED)], colour=True)


def test_report_has_what_was_agreed(tmp_path):
    write([row(SUCCEEDED, FAILED)], tmp_path / "reports" / "attacks.json")
    assert json.loads((tmp_path / "reports" / "attacks.json").read_text()) == [
        {
            "id": "F0",
            "broker": "rabbitmq",
            "title": "Do harm",
            "control": "SIG-1",
            "assumes": "nothing",
            "stock": "succeeded",
            "ours": "failed",
            "evidence": {"stock": "seen there", "ours": "seen here"},
        }
    ]


def test_report_says_why_stock_withstands_an_attack(tmp_path):
    write([row(FAILED, FAILED, "it knows better")], tmp_path / "attacks.json")
    [reported] = json.loads((tmp_path / "attacks.json").read_text())
    assert reported["withstood"] == "it knows better"


@pytest.mark.parametrize("broker", BROKERS)
def test_each_finding_about_stock_has_its_attack_where_it_exists(broker):
    """F24 is about a backend that this project does not have; F25 and F26 are no attacks of their own."""
    findings = {f"F{number}" for number in range(1, 24)}
    elsewhere = {"rabbitmq": {"F17", "F20"}, "redis": {"F18"}}[broker]
    assert {one.id.partition(".")[0] for one in catalogue(broker) if one.id.startswith("F")} == findings - elsewhere


def test_attacks_are_as_many_as_were_agreed():
    assert len({one.id for broker in BROKERS for one in catalogue(broker)}) >= 45


@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_attacker_is_tried_over_each_broker(capability, broker):
    assert CAPABILITIES[capability] <= {one.assumes for one in catalogue(broker)}
