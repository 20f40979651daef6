"""``python -m stack up|down|status`` and ``issue|rotate|revoke NAME``: the local stack from the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from . import compose
from .account import StackFailed
from .pki import Pair
from .stack import Stack


def main() -> int:
    """The command: 0, or 1 after saying what went wrong; ``status`` says 3 when nothing is up."""
    parser = argparse.ArgumentParser(
        prog="stack", description="Broker, backend, worker, beat and Flower on loopback, over TLS."
    )
    parser.add_argument("command", choices=["up", "down", "status", *_KEYS])
    parser.add_argument("name", nargs="?", default="", help="issue, rotate, revoke: a role; revoke: or a serial number")
    parser.add_argument("--folder", type=Path, help="where everything goes (default: .stack)")
    parser.add_argument("--call", type=Path, action="append", default=[], help="what another stack wrote for us")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, _terminate)
    sys.unraisablehook = _terminate_again
    try:
        stack = Stack(Path.cwd(), options.folder)
        if os.environ.get("STACK", "local") != "local":
            return compose.run(stack, options.command)
        if options.command == "down":
            stack.down()
            return 0
        if options.command in _KEYS:
            print(_KEYS[options.command](stack, options.name))
            return 0
        if options.command == "up":
            stack.up(calls=options.call)
        return _print_status(stack)
    except Exception as error:
        if not isinstance(error, StackFailed) and type(error).__name__ != "ConfigurationRefused":
            raise
        print(error, file=sys.stderr)
        return 1


def _issue(stack: Stack, role: str) -> str:
    pair = stack.issue(role)
    return f"{pair.certificate} and its key sign as {role}; the serial number is {pair.serial:x}"


def _rotate(stack: Stack, role: str) -> str:
    file = stack.pki.signing.folder / f"{role}.pem"
    before = f"{Pair(file, file).serial:x}" if file.exists() else ""
    return f"{role} signs with {stack.rotate(role).serial:x} from now on; `make revoke ROLE={before}` ends what it had"


def _revoke(stack: Stack, name: str) -> str:
    return f"{stack.revoke(name):x} is revoked; workers and callers refuse it within seconds"


_KEYS = {"issue": _issue, "rotate": _rotate, "revoke": _revoke}


def _print_status(stack: Stack) -> int:
    rows = stack.status()
    lines = [
        f"{process.name:12} {'up' if process.alive() else 'ENDED':6} {process.pid:>8}  "
        f"{f'127.0.0.1:{port}' if port else '':16} {process.log}"
        for process, port in rows
    ]
    if rows:
        files = sorted(stack.folder.glob("*.env"))
        lines += [f"{file.stem:12} settings                          {file}" for file in files]
        for process, port in rows:
            if process.name == "flower":
                password = stack.folder / "flower.password"
                lines += [f"flower       https://127.0.0.1:{port} any name, password in       {password}"]
    else:
        lines += [f"nothing is up in {stack.folder}; `make up` starts the servers and a worker for each pool"]
        lines += [f"logs of the last time: {stack.folder / 'logs'}"] if (stack.folder / "logs").is_dir() else []
    _print(lines)
    if "SECURE_CELERY_BROKER_URL" in os.environ:
        _print([f"settings of this shell: {line}" for line in stack.explain.settings()])
    return 3 if not rows else 0 if all(process.alive() for process, _ in rows) else 1


def _print(lines: list[str]) -> None:
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # as `| head -1` does; Python would try once more in the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that what is half started is ended


def _terminate_again(swallowed: sys.UnraisableHookArgs) -> None:
    """End what a signal found in a finalizer, out of which Python raises nothing."""
    if isinstance(swallowed.exc_value, SystemExit):
        code = swallowed.exc_value.code
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(code))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(swallowed)


if __name__ == "__main__":
    sys.exit(main())
