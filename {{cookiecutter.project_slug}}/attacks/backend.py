"""Attacks by someone who may write to the result backend: a stolen worker account, or Redis left open.

What `.get()` returns becomes the caller's truth. It must be the result of this task, said by a worker.
"""

from __future__ import annotations

import json

from .attack import BACKEND, BACKEND_AND_SIGNER, BrokenAttack, attack
from .target import Target, within


def paid(target: Target, amount: int) -> str:
    """Have an honest payment made; its id."""
    result = target.app.tasks["attacks.pay"].delay(amount)
    if not within(5.0, lambda: target.answer(result.id) == amount):
        raise BrokenAttack("an honest payment has no result")
    return str(result.id)


@attack("X16", "Give a caller the result of another task", control="RES-1", assumes=BACKEND)
def swapped_result(target: Target) -> str | None:
    """Both values are genuine."""
    small, large = paid(target, 1), paid(target, 1000)
    target.results.set(target.result_key(small), target.results.get(target.result_key(large)))
    answer = target.answer(small)
    return f"the caller who paid 1 is told {answer}" if answer == 1000 else None


@attack("X17", "Forge a result with a client's key", control="RES-1", assumes=BACKEND_AND_SIGNER)
def forged_result(target: Target) -> str | None:
    pending = target.capture("attacks.pay", 5)
    target.results.set(target.result_key(pending.task_id), target.forged_result("client", pending.task_id, 999))
    answer = target.answer(pending.task_id)
    return f"the caller is told {answer} of a payment never made" if answer == 999 else None


@attack(
    "X18",
    "Forge a result without any key",
    control="RES-1",
    assumes=BACKEND,
    withstood="its results have to be signed as well",
)
def unsigned_result(target: Target) -> str | None:
    pending = target.capture("attacks.pay", 5)
    meta = {"status": "SUCCESS", "result": 999, "traceback": None, "children": [], "task_id": pending.task_id}
    target.results.set(target.result_key(pending.task_id), json.dumps(meta))
    answer = target.answer(pending.task_id)
    return f"the caller is told {answer} of a payment never made" if answer == 999 else None
