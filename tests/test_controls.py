"""docs/controls.md says what is built and what proves it, and what it names exists and was run (TPL-6)."""

from __future__ import annotations

import re
import tomllib

import pytest

from .baking import PROJECT, TEMPLATE
from .controls.__main__ import PAGE, Control, file, page, proof, sections

CONTROLS = [control for _, controls in sections() for control in controls]
BUILT = [control for control in CONTROLS if not control.later]
#: Built of files that nothing runs here: manifests, pipelines, locks, lint. The template's tests read these, or give
#: their tools something to find; `make mutations` takes controls out of a project that runs.
FILES = {
    *(
        f"{family}-{number}"
        for family, most in (("K8S", 6), ("NET", 3), ("SUP", 8), ("TPL", 6))
        for number in range(1, most + 1)
    ),
    *("CMP-1", "IMG-2", "VAL-2"),
}


def test_the_page_is_what_the_sources_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/controls.md says something else: make table"


@pytest.mark.parametrize("control", BUILT, ids=lambda control: control.id)
def test_what_a_row_names_exists(control: Control) -> None:
    assert control.files, f"no file names {control.id} among its controls"
    assert control.tests, f"nothing proves {control.id}"
    assert [name for name in control.files if file(name) is None] == []
    assert [name for name in control.tests if proof(name) is None] == []


def test_every_control_is_in_the_table_and_what_is_built_is_not_called_unbuilt() -> None:
    known = {control.id for control in CONTROLS}
    assert len(known) == len(CONTROLS)
    removals = tomllib.loads((TEMPLATE / "tests" / "mutations" / "removals.toml").read_text(encoding="utf-8"))
    assert {control.id for control in BUILT} - {removal["control"] for removal in removals["removal"]} == FILES
    for path in (*PROJECT.rglob("*.py"), *TEMPLATE.glob("*.py")):
        for line in re.findall(r"^Controls: (.+)\.$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert {*re.findall(r"[A-Z0-9]+-\d+", line)} <= known, path
