"""``python -m <package>.hardening.refused``: the operator's way to what lies in the quarantine.

``list`` shows a line for each message, ``inspect`` all that is known of it. ``release`` puts it back into its queue and
``drop`` deletes it. A message is named by its ID, or many by a code, task or signer that they have in common.

Guards against: hostile messages that are looked at with what decodes or prints them, or that are put back by hand.
Rests on: the broker letting operators alone read the quarantine, workers signing its records, and the gate, which
judges again what was released. Shown is what a worker or a genuine signer has signed, in ASCII; bodies never are.
Controls: AUT-5.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from . import audit, codec, errors
from .claims import TaskClaims
from .consumer import preflight
from .envelope import Type
from .harden import Hardening, harden
from .identity import Role
from .quarantine import MARK, countersign, put
from .replay import late
from .settings import Settings

_REASONS = {leaf.code: leaf for leaf in errors.MessageRefused.__subclasses__()}


class Refused:
    """A record of the quarantine: ``shown`` is what can be said of it, ``problem`` why not more."""

    def __init__(self, hardening: Hardening, signed: bytes, remove: Callable[[], Any]) -> None:
        self.remove, self.shown = remove, dict.fromkeys(("id", "at", "code", "size", "signer", "task"), "-")
        self.shown["id"] = hashlib.sha256(signed).hexdigest()[:12]
        self.problem: errors.MessageRefused | None = None
        try:
            self._read(hardening, signed)
        except Exception as error:  # a worker that was taken over signs anything, and the message may be anything
            self.problem = error if isinstance(error, errors.MessageRefused) else errors.BadShape()
            self.shown["problem"] = str(self.problem)

    def _read(self, hardening: Hardening, signed: bytes) -> None:
        record = hardening.verify(Type.QUARANTINE, signed)
        if not record.signer.identity.works_for(hardening.audience):
            raise errors.ControlDenied("no worker's record")
        fields = codec.decode(record.payload)
        self.shown |= {name: str(fields[name])[: audit.FIELD_MAX] for name in ("code", "detail", "size", "sha256")}
        self.shown |= {"at": datetime.fromtimestamp(fields["iat"], UTC).isoformat(), "by": str(record.signer.identity)}
        self.envelope = base64.b64decode(fields["body"]).partition(MARK)[0]
        message = hardening.verify(Type.TASK, self.envelope)
        self.claims = TaskClaims.parse(message.payload)
        self.shown |= {"signer": str(message.signer.identity), "task": self.claims.task.name}
        self.shown |= {"task_id": self.claims.task.id, "origin": self.claims.origin, "owner": self.claims.owner}

    def __str__(self) -> str:
        """Return one line of what every record has."""
        return "  ".join(ascii(self.shown[name])[1:-1] for name in ("id", "at", "code", "size", "signer", "task"))


def release(app: Any, refused: Refused) -> None:
    """Put a message back into its queue, countersigned; out of the quarantine when the broker has it.

    Raises:
        MessageRefused: for the reason it has had, if nothing cures that; or for what its gate would say now.
    """
    hardening, topology = app.hardening, app.hardening.topology
    reason = _REASONS.get(refused.shown["code"], errors.MessageRefused)
    if refused.problem or not reason.curable:
        raise refused.problem or reason
    if refused.claims.exp + late(hardening.settings) < time.time():
        raise errors.Expired("so long ago that nobody knows whether it has run")
    if not hardening.policy.decide_command(hardening.signer.identity, "release").allowed:
        raise errors.ControlDenied("this operator may not release messages")
    operator = topology.accounts[hardening.signer.identity.account]
    if refused.claims.queue not in map(topology.broker_name, operator.publishes_to):
        raise errors.WrongQueue("nor may the operator send to it")
    put(app, countersign(hardening, refused.envelope), hardening.broker.exchange, refused.claims.queue)
    refused.remove()


def drop(_: Any, refused: Refused) -> None:
    """Delete a message; what is known of it stays in the log."""
    audit.record(audit.Event.DROPPED, **refused.shown)
    refused.remove()


def _do(app: Celery, action: str, refused: Refused) -> bool:
    if action in {"list", "inspect"}:
        print(refused if action == "list" else json.dumps(refused.shown, indent=2))
        return True
    try:
        {"release": release, "drop": drop}[action](app, refused)
        print(f"{refused.shown['id']}: {action}")
    except errors.MessageRefused as refusal:
        print(f"{refused.shown['id']}: {refusal}. {refusal.fix}", file=sys.stderr)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when all was done, 1 when some was not or nothing was found, 2 when it cannot start."""
    parser = argparse.ArgumentParser(description="Look at what was refused, release it or drop it.")
    parser.add_argument("action", choices=("list", "inspect", "release", "drop"))
    parser.add_argument("which", nargs="*", metavar="VALUE", help="an ID; or a code, task or signer, for all of it")
    options = parser.parse_args(arguments)
    app: Any = Celery(set_as_current=False)
    try:
        harden(app, Settings())
        broker = preflight(app, Role.OPERATOR, app.hardening.topology.callers).broker
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1)
            records = (Refused(app.hardening, *record) for record in broker.quarantined(connection))
            lists, which = options.action == "list", {*options.which}
            done = [_do(app, options.action, each) for each in records if lists or {*each.shown.values()} & which]
    except (errors.ConfigurationRefused, OperationalError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(done) and (done or lists) else 1


if __name__ == "__main__":
    sys.exit(main())
