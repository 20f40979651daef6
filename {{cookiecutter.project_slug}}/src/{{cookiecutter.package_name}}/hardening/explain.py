"""``python -m <package>.hardening.explain CODE``: the cause of a refusal and how to end it.

Guards against: a code in a log that nobody can read.
Rests on: each class in ``errors`` documenting one code.
Controls: OPS-2.
"""

from __future__ import annotations

import inspect
import sys

from . import errors


def catalogue() -> dict[str, type[errors.Refused]]:
    """Return every refusal by its code."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.Refused)]
    return {c.code: c for c in classes}


def main(arguments: list[str]) -> int:
    """Print one code's cause and fix, or all codes; return the exit code."""
    known = catalogue()
    if not arguments:
        for code in sorted(known):
            print(f"{code:20} {inspect.getdoc(known[code])}".partition("\n")[0])
        return 0
    refusal = known.get(arguments[0])
    if refusal is None:
        print(f"{arguments[0]!r} is no code; run without an argument for the list", file=sys.stderr)
        return 1
    print(f"{inspect.getdoc(refusal)}\nFix: {refusal.fix}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
