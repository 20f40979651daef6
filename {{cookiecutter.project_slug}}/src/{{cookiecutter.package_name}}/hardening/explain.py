"""``python -m <package>.hardening.explain CODE``: the cause of a refusal and how to end it.

``--settings`` says what the settings in the environment give up. ``--signer`` says whether somebody may send a
``--task`` (to a ``--queue``) or give the command ``--method``, and which line of topology.toml decides that.

Guards against: a code in a log that nobody can read, a weakening that nobody sees, and a right that nobody can find.
Rests on: each class in ``errors`` documenting one code; and on asking the policy itself.
Controls: AUT-1, OPS-2, BRK-7.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path

from . import errors
from .identity import Identity, Role
from .policy import Policy
from .settings import PREFIX, Settings
from .topology import Topology, line_of


def catalogue() -> dict[str, tuple[str, str]]:
    """Return cause and fix of every refusal by its code."""
    fix = errors.ConfigurationRefused.fix
    configuration = {code: (cause, fix) for code, cause in errors.CONFIGURATION_CODES.items()}
    leaves = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.Refused)]
    return {c.code: (inspect.getdoc(c) or "", c.fix) for c in leaves} | configuration


def settings() -> list[str]:
    """Return, line by line, what the settings in the environment give up.

    Raises:
        ConfigurationRefused: a process with these settings would not start.
    """
    return [f"weaker: {each}" for each in Settings().weakenings] or ["no setting weakens anything"]


def decision(file: Path, signer: str, task: str | None, queue: str | None, method: str | None) -> tuple[bool, str]:
    """Return whether a signer may send a task, or give a command, and a sentence that names the deciding line.

    Args:
        file: topology.toml.
        signer: a SPIFFE ID; or a name in the file, or a role and a name: ``client/web``.
        task: its name.
        queue: where to; any of the signer's if None.
        method: a command of remote control, instead of a task.

    Raises:
        ConfigurationRefused: the file is refused.
        InvalidIdentity: nobody can be called that.
    """
    topology = Topology.load(file)
    who = _identity(signer, topology)
    domain = topology.trust_domain or who.trust_domain
    policy = Policy(topology, Identity(domain, who.environment, topology.application, Role.WORKER))
    queue = queue and topology.broker_name(queue)
    allowed, where = policy.decide(who, task, queue) if task else policy.decide_command(who, str(method))
    text, said = file.read_text(encoding="utf-8"), "allowed" if allowed else "refused"
    line = f"line {line_of(text, where)}: {where}" if where else "which has no stanza for it"
    return allowed, f"{who} is {said} by {file}, {line}"


def _identity(signer: str, topology: Topology) -> Identity:
    if "://" in signer:
        return Identity.parse(signer)
    caller = topology.callers.get(signer)
    if caller and caller.identity:
        return replace(caller.identity, environment="any")
    if signer.partition("/")[0] not in set(Role):
        signer = f"{Role.WORKER if signer in topology.pools else Role.CLIENT}/{signer}"
    return Identity.parse(f"spiffe://{topology.trust_domain or 'any'}/any/{topology.application}/{signer}")


def main(arguments: list[str]) -> int:
    """Print what was asked for; return the exit code, which is 0 for what is known or allowed."""
    parser = argparse.ArgumentParser(prog="explain", description="Explain a code of a refusal, or a right.")
    parser.add_argument("code", nargs="?", help="without anything, all codes are listed")
    parser.add_argument("--settings", action="store_true", help="what the settings in the environment weaken")
    parser.add_argument("--signer", help="a SPIFFE ID, or a name in topology.toml")
    parser.add_argument("--task", help="may the signer send it?")
    parser.add_argument("--queue", help="where to; else to any of the signer's")
    parser.add_argument("--method", help="or may it give this command to workers?")
    parser.add_argument("--topology", type=Path, default=os.environ.get(PREFIX + "TOPOLOGY", "topology.toml"))
    asked = parser.parse_args(arguments)
    if bool(asked.signer) != (bool(asked.task) != bool(asked.method)):
        parser.error("--signer goes with one of --task and --method")
    known, code = catalogue(), 0
    try:
        if asked.signer:
            allowed, said = decision(asked.topology, asked.signer, asked.task, asked.queue, asked.method)
            code = 0 if allowed else 1
        elif asked.settings:
            said = "\n".join(settings())
        elif asked.code:
            said = "{}\n\nFix: {}".format(*known[asked.code])
        else:
            said = "\n".join(f"{each:24} {known[each][0]}".partition("\n")[0] for each in sorted(known))
    except errors.Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    except KeyError:
        print(f"{asked.code!r} is no code; run without an argument for the list", file=sys.stderr)
        return 1
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
