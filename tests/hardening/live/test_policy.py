"""topology.toml changes while a worker runs, signers flood it, and what waits in it is looked at again.

What is counted are effects: how often a task ran, and how many messages the quarantine holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from ...project import Settings, errors
from . import brokers
from .everything import application, within
from .rotation import holder, refused, said, serial, settings_of
from .running import SOON, TASKS, Running
from .test_replay import replay
from .test_replay import send as captured

CONTROLS = '[callers.operator]\ncontrols = ["*"]'


class Rules:
    """The topology of a running stack, and a worker that has read it."""

    def __init__(self, running: Running) -> None:
        self.running, self.file = running, running.effects.parent / "topology.toml"
        self.text = self.file.read_text(encoding="utf-8")
        (self.sends,) = re.findall(r"\[callers\.shop\]\nqueues = .*\n(sends = \[[^]]*\])", self.text)
        self.allowed = f'sends = ["{TASKS}.counted"]'

    def write(self, text: str) -> None:
        """Replace the file, as a deployment does."""
        new = self.file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.file)

    def change(self, old: str, new: str, event: str = "policy.loaded") -> None:
        """Change what the file said at the start, and wait until the worker has noticed."""
        assert old in self.text
        self.notice(self.text.replace(old, new, 1), event)

    def notice(self, text: str, event: str = "policy.loaded") -> None:
        before = said(self.running, event)
        self.write(text)
        assert within(SOON, lambda: self.add() == 3 and said(self.running, event) > before)

    def allow(self, more: str = "") -> None:
        """Let the caller ``shop`` send `counted`."""
        self.change(self.sends, self.allowed + more)

    def add(self) -> int:
        """Let the worker add 1 and 2."""
        sum_: int = self.running.task("add").delay(1, 2).get(timeout=SOON)
        return sum_

    def count(self, result: Any) -> type[Exception] | None:
        """Wait for a result; return what was raised instead."""
        try:
            result.get(timeout=SOON)
        except Exception as error:
            return type(error)
        return None


@pytest.fixture(scope="module")
def running(temporary: Path) -> Iterator[Running]:
    """A stack of this module's own, whose rules it changes."""
    with Running(temporary / "policy") as running:
        yield running


@pytest.fixture
def rules(running: Running) -> Iterator[Rules]:
    """The rules as they were are in force again in the end, and the worker never ended."""
    rules, pid = Rules(running), running.worker.pid
    yield rules
    if rules.file.read_text(encoding="utf-8") != rules.text:
        rules.notice(rules.text)
    assert running.worker.alive()
    assert running.worker.pid == pid


@pytest.fixture
def shop(running: Running) -> Celery:
    """A signer of few rights."""
    return running.caller("shop")


# --- rights -----------------------------------------------------------------------------------------------------------


def test_a_signer_whose_rule_was_taken_out_calls_in_vain_and_again_when_it_is_back(
    running: Running, rules: Rules, shop: Celery, key: str
) -> None:
    task, before = running.task("counted", shop), refused(running)
    assert rules.count(task.delay(f"{key}.before")) is errors.NotAllowed
    rules.allow()
    assert rules.count(task.delay(key)) is None
    rules.notice(rules.text)
    results = [task.delay(f"{key}.bad") for _ in range(20)]
    assert {rules.count(result) for result in results} == {errors.NotAllowed}
    assert within(SOON, lambda: refused(running) == before + 1 + 20)
    rules.allow()
    assert rules.count(task.delay(key)) is None
    assert [running.count(name) for name in (key, f"{key}.before", f"{key}.bad")] == [2, 0, 0]


def test_a_wrong_file_changes_nothing_and_its_line_is_said(
    running: Running, rules: Rules, shop: Celery, key: str
) -> None:
    rules.allow()
    wrong = rules.text.replace(rules.sends, 'sends = ["*"]', 1)
    rules.notice(wrong, "policy.refused")
    line = wrong[: wrong.index('sends = ["*"]')].count("\n") + 1
    log = running.worker.log.read_text(encoding="utf-8", errors="replace")
    assert f"topology.toml, line {line}: callers.shop.sends" in log
    assert rules.count(running.task("counted", shop).delay(key)) is None
    assert running.count(key) == 1


def test_a_command_that_was_taken_from_the_operator_is_not_obeyed(
    running: Running, rules: Rules, tmp_path: Path
) -> None:
    old = tmp_path / "topology.toml"
    old.write_text(rules.text, encoding="utf-8")
    operator = application(Settings(**settings_of(running.stack, "operator") | {"topology": str(old)}))
    assert operator.control.inspect(timeout=SOON, limit=1).ping()
    before = said(running, "control.refused")
    rules.change(CONTROLS, '[callers.operator]\ncontrols = ["ping"]')
    assert operator.control.inspect(timeout=SOON, limit=1).ping()
    assert not operator.control.inspect(timeout=1, limit=1).stats()
    assert said(running, "control.refused") == before + 1
    with pytest.raises(PermissionError, match="may not give"):
        running.caller("operator").control.inspect(timeout=1).stats()


# --- rate -------------------------------------------------------------------------------------------------------------


def test_a_signer_that_floods_gets_its_rate_and_others_all_they_send(
    running: Running, rules: Rules, shop: Celery, key: str
) -> None:
    rules.allow('\nrate = "5/h"')
    before = refused(running)
    flood = [running.task("counted", shop).delay(f"{key}.flood") for _ in range(40)]
    others = [running.task("counted").delay(key) for _ in range(10)]
    assert {rules.count(result) for result in others} == {None}
    outcomes = [rules.count(result) for result in flood]
    assert outcomes.count(None) == 5
    assert outcomes.count(errors.RateExceeded) == 35
    assert [running.count(f"{key}.flood"), running.count(key)] == [5, 10]
    assert within(SOON, lambda: refused(running) == before + 35)


def test_copies_of_a_signers_message_do_not_use_up_its_rate(
    running: Running, rules: Rules, shop: Celery, key: str
) -> None:
    rules.change("[callers.client]", '[callers.client]\nrate = { "*.counted" = "2/h" }'.replace("*.", f"{TASKS}."))
    body = captured(running, "counted", key)
    assert running.happens(key)
    replay(running, body, 10)
    assert rules.count(running.task("counted").delay(key)) is None
    assert rules.count(running.task("counted").delay(key)) is errors.RateExceeded
    assert running.count(key) == 2


# --- what waits in a worker -------------------------------------------------------------------------------------------


def test_what_waits_for_its_time_is_refused_when_its_signers_right_has_gone(
    running: Running, rules: Rules, shop: Celery, key: str
) -> None:
    """With Redis the worker has it already, and had admitted it."""
    rules.allow()
    waiting = running.task("counted", shop).apply_async((key,), countdown=15)
    assert within(SOON, lambda: running.length("default") == 0)
    rules.notice(rules.text)
    assert running.count(key) == 0
    assert rules.count(waiting) is errors.NotAllowed
    assert running.count(key) == 0


@pytest.fixture
def limit(running: Running) -> Iterator[Callable[[str], None]]:
    """Set Celery's own rate limit of `counted`: one every fifteen seconds until told otherwise.

    What waits for one waits on when it is lifted.
    """
    operator = running.caller("operator")

    def set_limit(rate: str) -> None:
        [answer] = operator.control.rate_limit(f"{TASKS}.counted", rate, reply=True, timeout=SOON, limit=1)
        assert "ok" in next(iter(answer.values()))

    set_limit("4/m")
    yield set_limit
    set_limit("0")


def delivered(running: Running) -> bool:
    """Wait until a worker has all of the queue."""
    return bool(within(SOON, lambda: running.waiting("default") == 0))


@pytest.mark.parametrize("reason", ["right", "expiry", "revocation"])
def test_what_waits_for_a_rate_limit_is_looked_at_again(
    running: Running, rules: Rules, shop: Celery, key: str, tmp_path: Path, limit: Callable[[str], None], reason: str
) -> None:
    rules.allow()
    expected: dict[str, type[Exception]] = {"right": errors.NotAllowed, "expiry": TaskRevokedError}
    caller, pair = holder(running, "shop", f"shop-{key}", tmp_path) if reason == "revocation" else (shop, None)
    task = running.task("counted", caller)
    assert rules.count(task.delay(f"{key}.first")) is None
    waiting = task.apply_async((key,), expires=2 if reason == "expiry" else None)
    before = refused(running)
    assert delivered(running)
    if reason == "right":
        rules.notice(rules.text)
    elif pair is not None:
        running.stack.revoke(serial(pair))
        count = said(running, "credentials.loaded")
        assert within(SOON, lambda: rules.add() == 3 and said(running, "credentials.loaded") > count)
    assert running.count(key) == 0
    limit("0")
    assert rules.count(running.task("counted").delay(f"{key}.good")) is None
    if reason in expected:
        assert rules.count(waiting) is expected[reason]
    assert within(SOON, lambda: refused(running) == before + (reason != "expiry"))
    assert [running.count(key), running.count(f"{key}.good")] == [0, 1]


def test_copies_of_what_waits_for_a_rate_limit_do_not_run(
    running: Running, rules: Rules, key: str, limit: Callable[[str], None]
) -> None:
    assert rules.count(running.task("counted").delay(f"{key}.first")) is None
    body = captured(running, "counted", key)
    assert delivered(running)
    assert running.count(key) == 0
    replay(running, body, 10)
    assert running.happens(key)
    limit("0")
    assert rules.count(running.task("counted").delay(f"{key}.last")) is None
    assert within(SOON, lambda: brokers.of(running.stack).length("default") == 0)
    assert running.count(key) == 1
