"""A client that sends the example tasks over the real broker and shows who signed what; `make demo` runs it.

It is an ordinary process with a client's settings in its environment (.stack/client.env), nothing more.
"""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

from .app import app
from .hardening.envelope import Type
from .tasks import report, thumbnail

TIMEOUT = 30  # seconds


def show(label: str, text: object) -> None:
    """Print one line of the story."""
    print(f"  {label:<10}{text}", flush=True)


def send(task: Any, *arguments: Any) -> Any:
    """Send a task and say so."""
    result = task.delay(*arguments)
    print(f"\n{task.__name__}({', '.join(map(repr, arguments))})")
    show("sent", result.id)
    show("signed by", app.hardening.signer.identity)
    return result


def main() -> int:
    """Return 0 if each task ended as it should."""
    upload = app.hardening.settings.upload_folder / "sunset.png"
    Image.linear_gradient("L").resize((1600, 900)).save(upload)
    upload.chmod(0o644)  # the worker is another user, who may read it

    answer = send(thumbnail.thumbnail, upload.name)
    for name, value in answer.get(timeout=TIMEOUT).items():
        show(name, value)
    stored = app.backend.get(app.backend.get_key_for_task(answer.id))
    show("signed by", app.hardening.verifier.verify(Type.RESULT, stored).signer.identity)

    send(report.report)
    show("result", "none is stored, since nobody waits for it; beat sends this one every night")

    invalid = send(thumbnail.thumbnail, "../client.env")
    refusal = invalid.get(timeout=TIMEOUT, propagate=False)
    show("refused", refusal)
    return 0 if invalid.failed() else 1


if __name__ == "__main__":
    sys.exit(main())
