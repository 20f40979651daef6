"""Attacks by insiders: someone who holds a genuine signing key, a client's, a worker's or one that may do nothing.

A signature says who, not what they may. A key must give its holder the rights of its role, and no way into the worker.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from .attack import LOW_SIGNER, SIGNER, WORKER_KEY, attack
from .target import Target

FLOOD = 40
WIPE: dict[str, Any] = {
    "task": "attacks.wipe",
    "args": ["everything"],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": True,
}


class Touch:
    """Makes a file when it is unpickled: code execution, as harmless as it gets."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@attack("F4", "Run code in the worker by a pickle", control="SER-2", assumes=SIGNER)
def inner_pickle(target: Target) -> str | None:
    """Stock lets the signer choose the inner format and forces it past `accept_content`."""
    for message in target.pickled("client", pickle.dumps([[1], {}, Touch(target.effects / "pickle-ran")])):
        target.inject(message)
    target.settle()
    return "the insider's code ran inside the worker" if (target.effects / "pickle-ran").exists() else None


@attack("F5.1", "Stop the fleet: a signed number", control="INT-1", assumes=SIGNER)
def signed_scalar(target: Target) -> str | None:
    for message in target.signed_body("client", 1):
        target.inject(message)
    return target.outage()


@attack("F5.2", "Stop the fleet: a signed list of two", control="INT-1", assumes=SIGNER)
def signed_pair(target: Target) -> str | None:
    for message in target.signed_body("client", [[], {}]):
        target.inject(message)
    return target.outage()


@attack("F9", "Have the worker send what one may not", control="AUT-3", assumes=SIGNER)
def confused_deputy(target: Target) -> str | None:
    """A task named in a message is sent by the worker, signed with the worker's key, and may name more."""
    nested = {**WIPE, "task": "attacks.pay", "args": [1], "options": {"link": [WIPE]}}
    group = {**WIPE, "task": "celery.group", "args": [], "kwargs": {"tasks": [WIPE]}, "subtask_type": "group"}
    for embed in ({"callbacks": [WIPE]}, {"chain": [WIPE]}, {"callbacks": [nested]}, {"callbacks": [group]}):
        target.inject(target.signed("client", "attacks.pay", 1, embed=embed))
    target.settle()
    return "the worker sent the client's forbidden task" if target.ran("wipe") else None


@attack("F10", "Smuggle a forbidden task inside celery.map", control="AUT-3", assumes=SIGNER)
def inside_map(target: Target) -> str | None:
    target.inject(target.signed("client", "celery.map", WIPE, ["everything"]))
    target.settle()
    return "the forbidden task ran inside celery.map" if target.ran("wipe") else None


@attack("F21", "Have the worker send a retry elsewhere", control="SIG-3", assumes=SIGNER)
def redirected_retry(target: Target) -> str | None:
    """Keys in `embed` are spread over the request after every check."""
    away = {"exchange": target.capture("attacks.pay", 1).exchange, "routing_key": target.other_queue}
    target.observer.purge(target.other_queue)
    target.inject(target.signed("client", "attacks.flaky", "order", embed={"delivery_info": away}))
    target.settle()
    stolen = target.observer.drain(target.other_queue)
    return "the worker sent its retry to the attacker's queue" if stolen else None


@attack("F22.1", "Have another caller's task dropped", control="AUT-6", assumes=SIGNER)
def drop_by_id(target: Target) -> str | None:
    """An expired message is remembered as revoked, by id: the victim's id."""
    victim = target.capture("attacks.pay", 7)
    for guise in target.guises("client"):
        expired = {"id": victim.task_id, "expires": "2001-01-01T00:00:00+00:00", **guise}
        target.inject(target.signed("shop", "attacks.pay", 1, **expired))
    target.settle()
    told = target.state(victim.task_id)
    target.inject(victim)
    target.settle()
    if 7 not in [one["amount"] for one in target.ran("pay")]:
        return "the victim's payment was dropped"
    return f"the victim is told {told} of a payment on its way" if told != "PENDING" else None


@attack("F22.2", "Answer for another caller's task", control="AUT-6", assumes=SIGNER)
def squat_on_id(target: Target) -> str | None:
    """A task of one's own under the victim's id: its result is stored first, and stays."""
    victim = target.capture("attacks.pay", 7)
    for guise in target.guises("client"):
        target.inject(target.signed("shop", "attacks.pay", 1, id=victim.task_id, **guise))
    target.settle()
    target.inject(victim)
    target.settle()
    answer = target.answer(victim.task_id)
    return f"the victim paid 7 and is told {answer!r}" if answer != 7 else None


@attack("F22.3", "Fail another caller's pending task", control="AUT-6", assumes=SIGNER)
def fail_by_id(target: Target) -> str | None:
    """F8 by one who has a key: what is refused is answered, and must not be answered to the victim."""
    victim = target.capture("attacks.pay", 7)
    for guise in target.guises("client"):
        target.inject(target.signed("shop", "attacks.no-such-task", 1, id=victim.task_id, **guise))
    target.settle()
    state = target.state(victim.task_id)
    return f"the caller is told {state} of a task that never ran" if state != "PENDING" else None


@attack("F23", "Have an errback run in the main process", control="AUT-3", assumes=SIGNER)
def inline_errback(target: Target) -> str | None:
    """A task that is killed by its time limit fails in the main process, where the keys are and consuming happens."""
    errback = {**WIPE, "task": "attacks.notify", "args": [], "immutable": False}
    target.inject(target.signed("client", "attacks.work", 5.0, embed={"errbacks": [errback]}, timelimit=[0.6, 0.3]))
    target.settle()
    here = [one for one in target.ran("notify") if one["pid"] == target.worker.pid]
    return "the errback ran in the worker's main process" if here else None


@attack("X14", "Make a payment with a monitor's key", control="AUT-1", assumes=LOW_SIGNER)
def low_privilege(target: Target) -> str | None:
    target.inject(target.signed("monitor", "attacks.pay", 1))
    target.settle()
    return "a key that may only watch made a payment" if target.ran("pay") else None


@attack("X15", "Send a task one may not send", control="AUT-1", assumes=SIGNER)
def forbidden_task(target: Target) -> str | None:
    target.inject(target.signed("client", "attacks.wipe", "everything"))
    target.settle()
    return "the client's forbidden task ran" if target.ran("wipe") else None


@attack("X23", "Have a costly task run again and again", control="AUT-1", assumes=SIGNER)
def flood(target: Target) -> str | None:
    """Each message is genuine, and of a task that its signer may send."""
    for number in range(FLOOD):
        target.inject(target.signed("client", "attacks.report", number))
    target.settle()
    ran = len(target.ran("report"))
    return f"{ran} of {FLOOD} ran, one after the other" if ran > FLOOD // 2 else None


# -- with the key of a worker that was broken into: its pool is `reporter`, and the attacked one is another ------------


@attack("X24", "Send another pool what one may not", control="AUT-1", assumes=WORKER_KEY)
def other_pool(target: Target) -> str | None:
    target.inject(target.signed("reporter", "attacks.wipe", "everything"))
    target.settle()
    return "a worker that may send nothing had another pool's task run" if target.ran("wipe") else None


@attack("X25", "Pass on a payment in a client's name", control="AUT-3", assumes=WORKER_KEY)
def in_anothers_name(target: Target) -> str | None:
    """Workers do send for others: retries, and what a canvas goes on with. The client itself may make payments."""
    for guise in target.guises("client"):
        target.inject(target.signed("reporter", "attacks.pay", 1, **guise))
    target.settle()
    return "a worker that may send nothing made a payment for a client" if target.ran("pay") else None
