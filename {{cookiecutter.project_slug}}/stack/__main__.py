"""``python -m stack up|down|status``: the local stack from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from .account import StackFailed
from .stack import Stack


def main() -> int:
    """The command: 0, or 1 after saying what went wrong; ``status`` says 3 when something is not running."""
    parser = argparse.ArgumentParser(prog="stack", description="Broker, backend and worker on loopback, over TLS.")
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--folder", type=Path, help="where everything goes (default: .stack)")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, _terminate)
    try:
        stack = Stack(Path.cwd(), options.folder)
        if options.command == "down":
            stack.down()
            return 0
        if options.command == "up":
            stack.up()
        return _print_status(stack)
    except Exception as error:
        if not isinstance(error, StackFailed) and type(error).__name__ != "ConfigurationRefused":
            raise
        print(error, file=sys.stderr)
        return 1


def _print_status(stack: Stack) -> int:
    rows = stack.status()
    if not rows:
        print("nothing is up; `make up` starts it")
        return 3
    for process, port in rows:
        where = f"127.0.0.1:{port}" if port else ""
        print(f"{process.name:12} {'up' if process.alive() else 'ENDED':6} {process.pid:>8}  {where:16} {process.log}")
    for file in sorted(stack.folder.glob("*.env")):
        print(f"{file.stem:12} settings                          {file}")
    return 0 if all(process.alive() for process, _ in rows) else 3


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that what is half started is ended


if __name__ == "__main__":
    sys.exit(main())
