"""``python -m <package>.hardening.explain CODE``: the cause of a refusal and how to end it.

Guards against: a code in a log that nobody can read.
Rests on: each class in ``errors`` documenting one code.
Controls: OPS-2.
"""

from __future__ import annotations

import inspect
import sys

from . import errors


def catalogue() -> dict[str, tuple[str, str]]:
    """Return cause and fix of every refusal by its code."""
    configuration = {
        code: (cause, errors.ConfigurationRefused.fix) for code, cause in errors.CONFIGURATION_CODES.items()
    }
    leaves = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.Refused)]
    return {c.code: (inspect.getdoc(c) or "", c.fix) for c in leaves} | configuration


def main(arguments: list[str]) -> int:
    """Print one code's cause and fix, or all codes; return the exit code."""
    known = catalogue()
    if not arguments:
        for code in sorted(known):
            print(f"{code:24} {known[code][0]}".partition("\n")[0])
        return 0
    if arguments[0] not in known:
        print(f"{arguments[0]!r} is no code; run without an argument for the list", file=sys.stderr)
        return 1
    cause, fix = known[arguments[0]]
    print(f"{cause}\n\nFix: {fix}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
