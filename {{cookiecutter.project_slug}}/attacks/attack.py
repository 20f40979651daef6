"""What an attack is, what became of it on both targets, and the table of all.

An attack has an id, a goal, what the attacker must hold, and a function that looks for the effect. The function gets a
target and returns what it achieved as a sentence, or None when nothing happened. It never decides whether that is good:
a row compares it with what stock is known to allow and ours must not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BROKER

if TYPE_CHECKING:
    from .target import Target

# What the attacker must hold, from little to much. Who holds a key has a broker account too, which may publish.
NOTHING = "the broker's address"
NETWORK = "network + publish"
FILES = "a user on the host"
PUBLISH = "publish to the queue"
SEEN = "publish + one message seen"
RESULT_SEEN = "publish + one result seen"
SIGNER = "a client's signing key"
LOW_SIGNER = "a monitor's signing key"
BACKEND = "write to the backend"
BACKEND_AND_SIGNER = "backend + a client's key"
ANYWHERE = "all rights at the broker"
ANYWHERE_AND_SIGNER = "broker + a client's key"
WORKER = "a worker's broker account"
WORKER_KEY = "a worker's signing key"
ANYWHERE_AND_WORKER_KEY = "broker + a worker's key"

RABBITMQ, REDIS = "rabbitmq", "redis"
BROKERS = {RABBITMQ: "RabbitMQ", REDIS: "Redis"}

Program = Callable[["Target"], str | None]


class BrokenAttack(Exception):
    """The attack proved nothing: an honest message was not served, or the attack itself is at fault."""


class Outage(Exception):
    """An honest message was not served after an attack; the sentence says why."""


@dataclass(frozen=True)
class Attack:
    """One row of the table."""

    id: str
    title: str
    control: str
    assumes: str
    program: Program
    brokers: tuple[str, ...] = tuple(BROKERS)
    withstood: str = ""


CATALOGUE: dict[str, Attack] = {}


def attack(
    id: str, title: str, *, control: str, assumes: str, only: str = "", withstood: str = ""
) -> Callable[[Program], Program]:
    """Register an attack.

    Args:
        id: stable; what `--only` takes.
        title: the goal, in the words of the attacker.
        control: the control that must stop it.
        assumes: what the attacker must hold.
        only: the one broker on which there is such a thing.
        withstood: why stock withstands it, if it does. Such an attack is here because ours could fall.
    """

    def register(program: Program) -> Program:
        if id in CATALOGUE:
            raise ValueError(f"two attacks have the id {id}")
        brokers = (only,) if only else tuple(BROKERS)
        CATALOGUE[id] = Attack(id, title, control, assumes, program, brokers, withstood)
        return program

    return register


def catalogue(broker: str = BROKER) -> list[Attack]:
    """Every attack over a broker, in the order of the modules."""
    from . import control, no_key, outside, seen, signer  # they register themselves

    order = [module.__name__ for module in (no_key, seen, signer, control, outside)]
    attacks = (one for one in CATALOGUE.values() if broker in one.brokers)
    return sorted(attacks, key=lambda one: order.index(one.program.__module__))


# -- what became of it ------------------------------------------------------------------------------------------------

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
    broker: str = BROKER

    @property
    def complaint(self) -> str:
        """What is wrong with this row, if anything."""
        for trial in (self.stock, self.ours):
            if trial.outcome == ERROR:
                return f"{self.attack.id} proves nothing on {trial.target}: {trial.evidence}"
        if self.ours.outcome == SUCCEEDED:
            return f"{self.attack.id} succeeds on ours: {self.ours.evidence}"
        if self.stock.outcome == FAILED and not self.attack.withstood:
            return f"{self.attack.id} fails on stock, where it is known to work, so it proves nothing on ours"
        return ""

    def as_json(self) -> dict[str, Any]:
        """The report's form."""
        attack = self.attack
        return {
            "id": attack.id,
            "broker": self.broker,
            "title": attack.title,
            "control": attack.control,
            "assumes": attack.assumes,
            "stock": self.stock.outcome,
            "ours": self.ours.outcome,
            "evidence": {"stock": self.stock.evidence, "ours": self.ours.evidence},
            **({"withstood": attack.withstood} if attack.withstood else {}),
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
    over = f"{len(rows)} attacks over {BROKERS[BROKER]}"
    return f"{over}: {fallen['stock']} succeed on stock Celery, {fallen['ours']} on ours."


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the report."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
