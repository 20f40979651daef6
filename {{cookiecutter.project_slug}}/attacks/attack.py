"""What an attack is: an id, a goal, what the attacker must hold, and a function that looks for the effect.

The function gets a target and returns what it achieved as a sentence, or None when nothing happened. It never decides
whether that is good: `suite.py` compares it with what stock is known to allow and ours must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .target import Target

# What the attacker must hold, from little to much. Everyone here has a broker account that may publish to the queue.
PUBLISH = "publish to the queue"
SEEN = "publish + one message seen"
RESULT_SEEN = "publish + one result seen"
SIGNER = "a client's signing key"
LOW_SIGNER = "a monitor's signing key"
BACKEND = "write to the backend"
BACKEND_AND_SIGNER = "backend + a client's key"

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
    works_on_stock: bool = True
    pending: str = ""


CATALOGUE: dict[str, Attack] = {}


def attack(
    id: str, title: str, *, control: str, assumes: str, works_on_stock: bool = True, pending: str = ""
) -> Callable[[Program], Program]:
    """Register an attack.

    Args:
        id: stable; what `--only` takes.
        title: the goal, in the words of the attacker.
        control: the control that must stop it.
        assumes: what the attacker must hold.
        works_on_stock: whether stock is known to fall. One that does not is here because ours could.
        pending: the defence that does not exist yet; keeps the attack out of a run unless it is asked for by id.
    """

    def register(program: Program) -> Program:
        if id in CATALOGUE:
            raise ValueError(f"two attacks have the id {id}")
        CATALOGUE[id] = Attack(id, title, control, assumes, program, works_on_stock, pending)
        return program

    return register


def catalogue() -> list[Attack]:
    """Every attack, in the order of the modules: the less the attacker needs, the earlier."""
    from . import backend, no_key, seen, signer  # they register themselves

    order = [module.__name__ for module in (no_key, seen, signer, backend)]
    return sorted(CATALOGUE.values(), key=lambda one: order.index(one.program.__module__))
