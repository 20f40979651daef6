"""A client that sends the example tasks over the real broker and shows who signed what; `make demo` runs it.

It is an ordinary process with a client's settings in its environment (.stack/client.env), nothing more.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from .app import app
from .hardening.envelope import Type
from .tasks import documents

TIMEOUT = 30  # seconds


def show(label: str, text: object) -> None:
    """Print one line of the story."""
    print(f"  {label:<10}{text}", flush=True)


def send(task: Any, *arguments: Any) -> Any:
    """Send a task and say so."""
    result = task.delay(*arguments)
    print(f"\n{task.__name__}({', '.join(map(str, arguments))})")
    show("sent", result.id)
    show("signed by", app.hardening.signer.identity)
    return result


def main() -> int:
    """Return 0 if each task ended as it should."""
    answer = send(documents.checksum, "a document")
    show("result", answer.get(timeout=TIMEOUT))
    stored = app.backend.get(app.backend.get_key_for_task(answer.id))
    show("signed by", app.hardening.verifier.verify(Type.RESULT, stored).signer.identity)

    send(documents.record_receipt, uuid4(), datetime.now(UTC))
    show("result", "none is stored, since nobody waits for it")

    invalid = send(documents.checksum, "a document", "md5")
    refusal = invalid.get(timeout=TIMEOUT, propagate=False)
    show("refused", refusal)
    return 0 if invalid.failed() else 1


if __name__ == "__main__":
    sys.exit(main())
