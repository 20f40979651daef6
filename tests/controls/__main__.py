"""``make table`` also writes docs/controls.md: each control with its files, tests and removals.

What a control is, and tests beyond those of its removals, come from ``controls.toml``; files from the ``Controls:``
lines of the sources' docstrings; removals from ``tests/mutations/removals.toml``.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..baking import HARDENING, PROJECT, TEMPLATE

PAGE = TEMPLATE / "docs" / "controls.md"
_TABLE = Path(__file__).with_name("controls.toml")
_REMOVALS = TEMPLATE / "tests" / "mutations" / "removals.toml"
_LINE = re.compile(r"^Controls: ([A-Z0-9, \n-]+)\.$", re.MULTILINE)
_PACKAGE = "src/{{cookiecutter.package_name}}/"
_HEAD = """\
# Controls

What each control is, the files that build it, the tests that prove it, and how many ways there are in which
`make mutations` takes it out, one at a time, to see that one of these tests fails. Files are those of a generated
project, unless they are the template's own. `unit/`, `live/` and `fuzz/` are in `tests/hardening/`. `make table` writes
this page, and a test compares it and sees that every module named here exists and was run.
"""


@dataclass(frozen=True)
class Control:
    """One row: built if ``later`` is False; ``removals`` counts the ways to take it out."""

    id: str
    says: str
    files: tuple[str, ...]
    tests: tuple[str, ...]
    removals: int
    later: bool

    def row(self) -> str:
        """Return the row as Markdown."""
        if self.later:
            return f"| {self.id} | {self.says} | *not built yet* | | |"
        files, tests = (" ".join(f"`{name}`" for name in names) for names in (self.files, self.tests))
        return f"| {self.id} | {self.says} | {files} | {tests} | {self.removals or ''} |"


def sections() -> Iterator[tuple[str, list[Control]]]:
    """Yield each section's title and its controls."""
    sources, removals = _sources(), tomllib.loads(_REMOVALS.read_text(encoding="utf-8"))["removal"]
    for section in tomllib.loads(_TABLE.read_text(encoding="utf-8"))["section"]:
        yield section["title"], [_control(each, sources, removals) for each in section["control"]]


def _control(written: dict[str, Any], sources: dict[str, list[str]], removals: list[dict[str, Any]]) -> Control:
    own = [removal for removal in removals if removal["control"] == written["id"]]
    tests = {_short(test) for removal in own for test in removal["tests"]} | set(written.get("tests", ()))
    files = {*written.get("files", ()), *sources.get(written["id"], ())}
    return Control(
        written["id"],
        written["says"],
        tuple(sorted(files)),
        tuple(sorted(tests)),
        len(own),
        written.get("later", False),
    )


def _short(test: str) -> str:
    return test.partition("::")[0].removeprefix("tests/hardening/")


@cache
def _sources() -> dict[str, list[str]]:
    """Return the files that name each control in their docstring."""
    found: dict[str, list[str]] = {}
    places = [*PROJECT.rglob("*.py"), *TEMPLATE.glob("*.py"), *(TEMPLATE / "hooks").glob("*.py")]
    for path in sorted(places):
        for line in _LINE.findall(path.read_text(encoding="utf-8")):
            root = PROJECT if path.is_relative_to(PROJECT) else TEMPLATE
            name = path.relative_to(root).as_posix().removeprefix(_PACKAGE)
            for control in re.findall(r"[A-Z0-9]+-\d+", line):
                found.setdefault(control, []).append(name)
    return found


def file(name: str) -> Path | None:
    """Return the file that the page names, or None."""
    roots: Iterable[Path] = (PROJECT / _PACKAGE, PROJECT, TEMPLATE)
    return next((root / name for root in roots if (root / name).exists()), None)


def proof(name: str) -> Path | None:
    """Return the module, or the folder of modules, that the page names as a proof, or None."""
    return next((root / name for root in (HARDENING, PROJECT, TEMPLATE) if (root / name).exists()), None)


def page() -> str:
    """Return docs/controls.md."""
    parts = [_HEAD]
    for title, controls in sections():
        rows = (
            "| id | control | files | tests | removals |",
            "|---|---|---|---|---|",
            *(each.row() for each in controls),
        )
        parts.append(f"## {title}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page(), encoding="utf-8") == 0)
