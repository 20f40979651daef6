"""What is locked is audited whole, and without a verdict nothing passes (SUP-2)."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path

import pytest

from .advisories import Service, advisories
from .baking import PROJECT, TEMPLATE
from .gates import pins, run, tools

__all__ = ["advisories", "tools"]

HASH = f" \\\n    --hash=sha256:{64 * '0'}\n"
LOCK = f"one==1.0{HASH}two==2.0 ; sys_platform == 'win32'{HASH}two==2.1 ; sys_platform == 'linux'{HASH}"


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """Give a lock with a pin for another platform, and two of one package."""
    (tmp_path / "requirements").mkdir()
    path = tmp_path / "requirements" / "run.txt"
    path.write_text(LOCK, encoding="utf-8")
    return path


def audit(lock: Path, tools: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the gate on one lock."""
    script = PROJECT / "tools" / "audit.py"
    return run(lock.parent.parent, tools / "python", script, lock.relative_to(lock.parent.parent), **environment)


def test_every_pin_of_every_platform_is_asked_about(locked: Path, tools: Path, advisories: Service) -> None:
    done = audit(locked, tools, advisories.environment)
    assert (done.returncode, done.stdout) == (0, "audit: 3 pins, 0 known vulnerabilities, 0 ignored\n")
    assert advisories.asked == pins(locked) == {("one", "1.0"), ("two", "2.0"), ("two", "2.1")}


@pytest.mark.parametrize("pin", [("one", "1.0"), ("two", "2.0"), ("two", "2.1")])
def test_a_planted_advisory_fails_the_gate_and_is_named(
    pin: tuple[str, str], locked: Path, tools: Path, advisories: Service
) -> None:
    advisories.plant(*pin, aliases=["CVE-2026-0001"])
    done = audit(locked, tools, advisories.environment)
    assert done.returncode == 1
    assert f"{pin[0]} {pin[1]}: CVE-2026-0001 GHSA-plan-ted1-0000: {pin[0]} is unsafe\n" in done.stdout
    assert "fixed in: 99.1" in done.stdout


def plain_pip_audit(lock: Path, tools: Path, advisories: Service) -> subprocess.CompletedProcess[str]:
    """Run pip-audit as its documentation says."""
    command: list[str | Path] = [
        tools / "pip-audit",
        "--strict",
        "--disable-pip",
        "-r",
        lock,
        "-s",
        "osv",
        "--osv-url",
        advisories.url,
    ]
    return run(lock.parent, *command)


def test_pip_audit_alone_passes_over_another_platform(locked: Path, tools: Path, advisories: Service) -> None:
    """Why markers are taken off."""
    advisories.plant("two", "2.0")
    assert plain_pip_audit(locked, tools, advisories).returncode == 0
    assert audit(locked, tools, advisories.environment).returncode == 1


def test_an_advisory_that_cannot_be_read_fails_the_gate(locked: Path, tools: Path, advisories: Service) -> None:
    """Pip-audit alone warns and passes."""
    advisories.plant("one", "1.0", schema_version="2.0.0")
    locked.write_text(f"one==1.0{HASH}", encoding="utf-8")
    assert plain_pip_audit(locked, tools, advisories).returncode == 0
    done = audit(locked, tools, advisories.environment)
    assert done.returncode == 1
    assert re.fullmatch("audit: an advisory could not be read, so nothing passes: .*schema version.*\n", done.stdout)


def test_a_pin_that_pip_audit_says_nothing_about_fails_the_gate(locked: Path, tools: Path, tmp_path: Path) -> None:
    """With a stand-in beside the Python that runs it, for pip-audit has no such silence that is known today."""
    stand_in = tmp_path / "bin" / "pip-audit"
    stand_in.parent.mkdir()
    script = 'shift 7\necho \'{"dependencies": [{"name": "one", "version": "1.0", "vulns": []}]}\' > $1'
    stand_in.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    stand_in.chmod(0o755)
    (stand_in.parent / "python").symlink_to(tools / "python")
    (packages,) = tools.parent.glob("lib/python3*/site-packages")
    done = audit(locked, stand_in.parent, {"PYTHONPATH": str(packages)})
    assert (done.returncode, done.stdout) == (1, "audit: pip-audit passed over two==2.0, two==2.1\n")


@pytest.mark.parametrize("failure", ["closed", "error", "unknown"])
def test_a_service_that_cannot_be_asked_fails_the_gate_in_one_sentence(
    failure: str, locked: Path, tools: Path, advisories: Service
) -> None:
    environment = advisories.environment
    if failure == "closed":
        environment["PIP_AUDIT_OSV_URL"] = "http://127.0.0.1:9/v1/query"
    advisories.status = 500 if failure == "error" else 404 if failure == "unknown" else 200
    done = audit(locked, tools, environment)
    assert done.returncode == 1
    assert re.fullmatch("audit: no verdict from the advisory service, so nothing passes: .+\n", done.stdout), (
        done.stdout
    )


TODAY = datetime.datetime.now(datetime.UTC).date()


def day(days: int) -> str:
    """Return a date so many days from now, as TOML has it."""
    return (TODAY + datetime.timedelta(days=days)).isoformat()


@pytest.mark.parametrize("name", ["GHSA-plan-ted1-0000", "CVE-2026-0001"])
def test_an_advisory_is_ignored_for_a_reason_and_a_time(
    name: str, locked: Path, tools: Path, advisories: Service
) -> None:
    advisories.plant("one", "1.0", aliases=["CVE-2026-0001"])
    ignored = locked.parent / "ignored.toml"
    ignored.write_text(f'[{name}]\nreason = "We never call it"\nuntil = {day(1)}\n', encoding="utf-8")
    done = audit(locked, tools, advisories.environment)
    assert (done.returncode, done.stdout) == (0, "audit: 3 pins, 0 known vulnerabilities, 1 ignored\n")
    advisories.plant("two", "2.0", id="GHSA-anot-her1-0000")
    done = audit(locked, tools, advisories.environment)
    assert done.returncode == 1
    assert "GHSA-anot-her1-0000" in done.stdout
    assert name not in done.stdout


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (f'reason = "x"\nuntil = {day(-1)}', f"X-1 was ignored until {day(-1)}"),
        (f'reason = "x"\nuntil = {day(200)}', "half a year is the longest"),
        (f'reason = ""\nuntil = {day(1)}', "needs a reason and a day"),
        (f"until = {day(1)}", "needs a reason and a day"),
        ('reason = "x"', "needs a reason and a day"),
        ('reason = "x"\nuntil = "some day"', "needs a reason and a day"),
    ],
)
def test_an_ignore_that_is_out_of_date_or_says_too_little_fails_the_gate(
    entry: str, sentence: str, locked: Path, tools: Path, advisories: Service
) -> None:
    (locked.parent / "ignored.toml").write_text(f"[X-1]\n{entry}\n", encoding="utf-8")
    done = audit(locked, tools, advisories.environment)
    assert done.returncode == 1
    assert sentence in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not advisories.asked


def test_the_template_s_and_the_project_s_locks_are_audited_whole(tools: Path, advisories: Service) -> None:
    """As the template's own ``make audit`` does; ``colorama`` is locked for Windows only."""
    locks = [TEMPLATE / "requirements" / "dev.txt", *sorted(PROJECT.glob("requirements/*.txt"))]
    command = [tools / "python", PROJECT / "tools" / "audit.py", *locks]
    done = run(TEMPLATE, *command, **advisories.environment)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stdout
    assert advisories.asked == pins(*locks)
    assert "colorama" in {name for name, _ in advisories.asked}


def test_the_bill_of_materials_holds_what_is_locked_with_its_hashes(default: Path, tools: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"cyclonedx-py (.*)", (default / "Makefile").read_text(encoding="utf-8"))
    done = run(default, tools / "cyclonedx-py", *command.replace("reports", str(tmp_path)).split())
    assert done.returncode == 0, done.stdout
    bill = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "my-service"
    assert {(part["name"], part["version"]) for part in bill["components"]} == pins(default / "requirements/run.txt")
    assert all(part["externalReferences"][0]["hashes"] for part in bill["components"])
