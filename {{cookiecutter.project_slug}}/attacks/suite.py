"""Runs the attacks: one broker and one backend for both targets, a process for each target, one verdict.

Guards against a green table that means nothing. Honest messages must be served before and after each attack on the same
target; whatever goes wrong in between is an error, never a failed attack.
Assumes that two Celery applications of different setups cannot live in one process (serializers are process-global),
hence a process for each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from stack import Stack
from stack.account import write_own
from stack.pki import Pair

from . import BROKER, PROJECT, against_stock
from .against_ours import Ours
from .against_stock import Stock
from .attack import ERROR, FAILED, SUCCEEDED, Attack, BrokenAttack, Outage, Row, Trial
from .target import OBSERVER, Target

LIMIT = 120.0
"""Seconds that one attack may take, restarts included; most take less than one."""
TARGETS: dict[str, Callable[[Stack, Pair], Target]] = {"stock": Stock, "ours": Ours}
RULES = (against_stock.RULE, f"user {OBSERVER} on resetpass ~* &* +@all")
"""On Redis: stock's account, and the harness's own."""


def definitions(document: dict[str, Any]) -> dict[str, Any]:
    """Add stock's accounts, and the harness's own, which counts and empties queues and is no attacker's."""
    document = against_stock.definitions(document)
    document["users"].append({"name": OBSERVER, "password_hash": "", "tags": ""})
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    document["permissions"] += [{"user": OBSERVER, "vhost": one["name"], **everything} for one in document["vhosts"]]
    return document


@contextmanager
def servers(folder: Path) -> Iterator[Stack]:
    """Broker and backend for both targets, gone afterwards."""
    topology = Path(__file__).with_name("topology.toml").read_text(encoding="utf-8")
    file = write_own(folder.with_name(f"{folder.name}.toml"), f'broker = "{BROKER}"\n{topology}', 0o644)
    stack = Stack(PROJECT, folder, topology=file, definitions=definitions, acl=RULES)
    stack.down()  # what a killed run has left
    try:
        stack.up(worker=False)
        yield stack
    finally:
        stack.down()


def run(attacks: list[Attack], folder: Path, progress: Callable[[Trial], None]) -> list[Row]:
    """Run the attacks on both targets at the same time."""
    fork = multiprocessing.get_context("fork")  # the children need the authorities' keys, which only the parent has
    trials: dict[tuple[str, str], Trial] = {}
    with servers(folder) as stack:
        observer = stack.pki.tls.client(OBSERVER)
        children = []
        for name in TARGETS:
            receiving, sending = fork.Pipe(duplex=False)
            child = fork.Process(target=_run_on, args=(name, stack, observer, attacks, sending), name=name)
            child.start()
            sending.close()
            children.append((child, receiving))
        try:
            for trial in _received([receiving for _, receiving in children]):
                trials[trial.id, trial.target] = trial
                progress(trial)
        except BaseException:
            for child, _ in children:
                child.terminate()
            raise
        finally:
            for child, _ in children:
                _end(child)
    return [Row(one, _trial(trials, one, "stock"), _trial(trials, one, "ours")) for one in attacks]


def _end(child: BaseProcess) -> None:
    child.join(10)
    if child.is_alive():  # it stood still
        child.terminate()
        child.join(30)


def _received(pipes: list[Connection]) -> Iterator[Trial]:
    """What the children send, until each has ended or none has sent anything for `LIMIT` seconds."""
    pipes = list(pipes)
    while pipes and (ready := wait(pipes, LIMIT)):
        for pipe in cast("list[Connection]", ready):
            try:
                yield pipe.recv()
            except EOFError:
                pipes.remove(pipe)


def _trial(trials: dict[tuple[str, str], Trial], attack: Attack, target: str) -> Trial:
    missing = Trial(attack.id, target, ERROR, f"the process for {target} ended, or stood still, before it", 0.0)
    return trials.get((attack.id, target), missing)


def _run_on(name: str, stack: Stack, observer: Pair, attacks: list[Attack], pipe: Connection) -> None:
    """A child process: all attacks on one target."""
    logging.disable()  # what libraries say about attacks is no evidence
    target: Target | None = None
    try:
        target = TARGETS[name](stack, observer)
        os.environ.update(target.environment("client"))
        target.load()
        target.restart()
        target.check()
        for attack in attacks:
            pipe.send(_attempt(attack, target))
    except Exception as error:
        why = str(error) or type(error).__name__
        for attack in attacks:
            pipe.send(Trial(attack.id, name, ERROR, f"the target cannot be attacked: {why}", 0.0))
    finally:
        if target is not None:
            target.close()
        pipe.close()


def _attempt(attack: Attack, target: Target) -> Trial:
    started = time.monotonic()
    try:
        outcome, evidence = _judged(attack, target)
    except BrokenAttack as error:
        outcome, evidence = ERROR, str(error)
    except Exception as error:
        outcome, evidence = ERROR, f"{type(error).__name__}: {error}"
    return Trial(attack.id, target.name, outcome, evidence, time.monotonic() - started)


def _judged(attack: Attack, target: Target) -> tuple[str, str]:
    target.prepare()
    try:
        effect = attack.program(target) or target.unaccounted()
    except Outage as outage:
        # On ours the service stopping is bad enough. On stock it is not what this attack is known to do.
        if target.name == "stock":
            raise BrokenAttack(f"the attack did not come to its effect: {outage}") from None
        effect = str(outage)
    evidence = effect or target.defence()
    target.prepare()  # the honest message behind it; with a new worker if the attack has cost the old one
    return (SUCCEEDED if effect else FAILED), evidence
