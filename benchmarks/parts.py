"""What one message costs in each part of the layer, measured in a worker's process: CPU microseconds, as JSON.

This is the profile behind the ratios: a goal that is missed is missed because of one of these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from uuid import uuid4

from .apps import app, package
from .caller import TEXT

ROUNDS, CALLS = 15, 200


def cost(call: Callable[[], object]) -> float:
    """Return the CPU time of one call: the median of several rounds."""
    found = []
    for _ in range(ROUNDS):
        since = time.process_time()
        for _ in range(CALLS):
            call()
        found.append((time.process_time() - since) / CALLS * 1e6)
    return median(found)


def main() -> dict[str, float]:
    """Sign a message by hand, and take each step that a publisher and a worker take."""
    modules = __import__(f"{package}.hardening", fromlist=["codec", "envelope", "gate", "claims"])
    ours, own, now = app.hardening, str(app.hardening.signer.identity), int(time.time())
    queue = ours.topology.broker_name("guarded")
    claims = {
        "iss": own,
        "aud": ours.audience,
        "iat": now,
        "exp": now + 3600,
        "jti": str(uuid4()),
        "origin": own,
        "owner": own,
        "queue": queue,
        "task": {"name": "benchmarks.nothing", "id": str(uuid4())},
        "args": [1, TEXT],
        "kwargs": {},
        "embed": {},
    }
    kind, payload = modules.envelope.Type.TASK, modules.codec.encode(claims)
    token = ours.signer.sign(kind, payload)
    gate = modules.gate.Gate(app, ours)
    message = SimpleNamespace(
        body=token,
        content_type=modules.envelope.CONTENT_TYPE,
        content_encoding="utf-8",
        headers={},
        properties={},
        delivery_info={},
        refusal=None,
    )

    def guarded() -> None:
        name = str(uuid4())
        ours.replay_store.claim(name, "bench", 60)
        ours.replay_store.done(name, 60)

    return {
        "sign": cost(lambda: ours.signer.sign(kind, payload)),
        "verify the signature": cost(lambda: ours.verify(kind, token)),
        "parse the claims": cost(lambda: modules.claims.TaskClaims.parse(payload)),
        "all of the gate": cost(lambda: gate.admit(message)),
        "replay guard": cost(guarded),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
