"""Each control is proven: taken out, a test fails (see ``tests/mutations/``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .mutations import __main__ as mutations

HARMLESS = """
[[removal]]
control = "SIG-4"
removal = "nothing"
file = "src/PACKAGE/hardening/gate.py"
old = "if claims.exp + grace < now - skew:"
new = "if claims.exp + grace + skew < now:"
tests = ["tests/hardening/unit/test_audit.py"]

[[removal]]
control = "SIG-4"
removal = "what is not there"
file = "src/PACKAGE/hardening/gate.py"
old = "if claims.exp <= 0:"
new = ""
tests = ["tests/hardening/unit/test_audit.py"]

[[removal]]
control = "SIG-1"
removal = "the module itself"
file = "src/PACKAGE/hardening/audit.py"
old = "from __future__ import annotations"
new = "raise ImportError"
tests = ["tests/hardening/unit/test_audit.py"]
"""


@pytest.mark.parametrize("removal", mutations.removals(mutations.REMOVALS), ids=lambda each: each.removal)
def test_a_removal_can_still_be_made(removal: mutations.Removal, request: pytest.FixtureRequest) -> None:
    tree = request.getfixturevalue({"rabbitmq": "default", "redis": "redis"}[removal.broker])
    _, text = mutations.found(tree, removal)
    assert text.count(removal.old) == 1
    assert removal.old != removal.new
    files = [Path(test.partition("::")[0]) for test in removal.tests]
    assert all((Path(__file__).parents[1] / file).exists() for file in files if "hardening" in file.parts)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_no_removal_goes_unnoticed() -> None:
    assert mutations.main([]) == 0


@pytest.mark.exhaustive
def test_a_removal_that_nobody_notices_is_reported(tmp_path: Path) -> None:
    table, report = tmp_path / "removals.toml", tmp_path / "report.json"
    table.write_text(HARMLESS, encoding="utf-8")
    assert mutations.main(["--table", str(table), "--report", str(report)]) == 1
    unnoticed, gone, broken = json.loads(report.read_text(encoding="utf-8"))
    assert [each["caught_by"] for each in (unnoticed, gone, broken)] == [[], [], []]
    assert unnoticed["error"] == ""
    assert "0 times" in gone["error"]
    assert "ImportError" in broken["error"]
