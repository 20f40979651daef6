"""Look for known vulnerabilities in what is locked: ``python tools/audit.py REQUIREMENTS ...``.

Guards against: pip-audit's silences. It passes over pins whose marker is about another platform, over packages that
the service does not know, and over advisories that it cannot read.
Rests on: its report, in which every pin of every file must be. A line that is no pin ends the audit. An advisory is
passed over if ``ignored.toml`` beside one of the files says why, and until when, at most half a year ahead. Another
service is asked as pip-audit has it: ``PIP_AUDIT_VULNERABILITY_SERVICE=osv PIP_AUDIT_OSV_URL=...``.
Controls: SUP-2.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HASH = re.compile(r"--hash=[a-z0-9]+:[0-9a-f]+")
LONGEST = datetime.timedelta(days=183)


def lines(lock: Path) -> Iterator[tuple[int, str]]:
    """Give each line with its number: continued ones as one, without comments."""
    begins, whole = 0, ""
    for number, line in enumerate([*lock.read_text(encoding="utf-8").splitlines(), ""], 1):
        part = re.sub(r"(^|\s)#.*", "", line).rstrip()
        begins = begins if whole else number
        whole += part.removesuffix("\\") + " "
        if not part.endswith("\\"):
            if whole.strip():
                yield begins, whole.strip()
            whole = ""


def pins(locks: list[Path]) -> dict[tuple[str, str], str]:
    """Return each name and version with its hashes, whichever platform it is for, or end with what is no pin."""
    found: dict[tuple[str, str], str] = {}
    for lock in locks:
        for number, line in lines(lock):
            requirement, *hashes = re.split(r"\s+(?=--hash=)", line)
            try:
                read = Requirement(requirement)
                (pin,) = read.specifier
                if pin.operator != "==" or not all(map(HASH.fullmatch, hashes)):
                    raise ValueError(line)
                key = canonicalize_name(read.name), str(Version(pin.version))
            except ValueError:
                fix = "pin it as name==version: by requirements/*.in and `make lock`"
                raise SystemExit(f"audit: {lock}:{number}: {line[:80]!r} is no pin to ask about: {fix}") from None
            found[key] = " ".join([f"{read.name}=={pin.version}", *hashes])
    if not found:
        raise SystemExit("audit: these files lock nothing, so there is nothing to ask about")
    return found


def ignored(path: Path) -> list[str]:
    """Return the advisories that are passed over today, or end with what is wrong about one."""
    today = datetime.datetime.now(datetime.UTC).date()
    entries = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, entry in entries.items():
        reason, until = entry.get("reason"), entry.get("until")
        if not reason or not isinstance(until, datetime.date) or entry.keys() != {"reason", "until"}:
            raise SystemExit(f"audit: {path}: {name} needs a reason and a day, such as until = {today}, and no more")
        if until < today:
            raise SystemExit(f"audit: {path}: {name} was ignored until {until}: update the package, or say why not yet")
        if until - today > LONGEST:
            raise SystemExit(f"audit: {path}: {name} is ignored until {until}: half a year is the longest")
    return list(entries)


def files(pinned: dict[tuple[str, str], str], folder: Path) -> list[Path]:
    """Write requirements without markers; a second version of a package goes into another file."""
    layers: list[dict[str, str]] = []
    for (name, _), line in pinned.items():
        layer = next((layer for layer in layers if name not in layer), None)
        if layer is None:
            layers.append(layer := {})
        layer[name] = line
    paths = [folder / f"{number}.txt" for number, _ in enumerate(layers)]
    for path, layer in zip(paths, layers, strict=True):
        path.write_text("\n".join(layer.values()) + "\n", encoding="utf-8")
    return paths


def report(pinned: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """Return what pip-audit says of every pin, or end with why it could not."""
    audited: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in files(pinned, Path(folder)):
            output = path.with_suffix(".json")
            command = [str(Path(sys.executable).parent / "pip-audit"), "--strict", "--disable-pip", "--requirement"]
            command += [str(path), "--format", "json", "--output", str(output), "--progress-spinner", "off"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            if not output.exists():
                reason = next((line for line in said if line.startswith("ERROR")), said[-1])
                raise SystemExit(f"audit: no verdict from the advisory service, so nothing passes: {reason[-300:]}")
            if unread := [line for line in said if line.startswith("WARNING")]:
                raise SystemExit(f"audit: an advisory could not be read, so nothing passes: {unread[0][-300:]}")
            audited += json.loads(output.read_text(encoding="utf-8"))["dependencies"]
    if missing := pinned.keys() - {(str(item["name"]), str(item.get("version"))) for item in audited}:
        raise SystemExit(f"audit: pip-audit passed over {', '.join('=='.join(pin) for pin in sorted(missing))}")
    return audited


def main() -> int:
    """Return 0 if nothing is known about any pin, 1 after a line for each advisory or one sentence."""
    locks = [Path(name) for name in sys.argv[1:]]
    passed_over = [name for folder in {lock.parent for lock in locks} for name in ignored(folder / "ignored.toml")]
    pinned = pins(locks)
    vulnerable = 0
    for item in report(pinned):
        for advisory in item["vulns"]:
            names = sorted([advisory["id"], *advisory["aliases"]])
            if not set(names) & set(passed_over):
                vulnerable += 1
                fix = ", ".join(advisory["fix_versions"]) or "no version yet"
                print(f"{item['name']} {item['version']}: {' '.join(names)}: {advisory['description'][:200]}")
                print(f"    fixed in: {fix}")
    print(f"audit: {len(pinned)} pins, {vulnerable} known vulnerabilities, {len(passed_over)} ignored")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
