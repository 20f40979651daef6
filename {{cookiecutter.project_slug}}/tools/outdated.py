"""Say whether a copy of ``hardening/`` is behind the template's: tools/outdated.py [--folder FOLDER] [TEMPLATE].

Guards against: a copy in another repository that nobody mends any more, and one that was changed unnoticed.
Rests on: the folder having the same bytes everywhere; ``__version__`` in it; the template's tags, ``v`` before it.
Controls: TPL-4, TPL-5.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(folder: Path | str, *arguments: str) -> str:
    """Return what a Git command prints, or end with what it says."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit("git %s: %s" % (arguments[0], done.stderr.strip() or "failed"))
    return done.stdout


def theirs(clone: str, revision: str) -> dict[str, str]:
    """Return the folder's files, and their Git objects, at a revision of the template."""
    found = {}
    for line in git(clone, "ls-tree", "-r", "-z", revision).split("\0")[:-1]:
        fields, _, path = line.partition("\t")
        if inside := re.fullmatch(r"[^/]+/src/[^/]+/hardening/(.+)", path):
            found[inside[1]] = fields.split()[2]
    return found


def mine(clone: str, folder: Path) -> dict[str, str]:
    """Return the same of a folder here."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    objects = git(clone, "hash-object", "--no-filters", "--", *map(str, paths)).split()
    return {str(path.relative_to(folder)): name for path, name in zip(paths, objects, strict=True)}


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """Return the files that one has and the other has not, or not in this form."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def compare(folder: Path, template: str) -> int:
    """Print what is newer in the template and what was changed here.

    Returns:
        1 if the template has newer files, else 0.
    """
    version = re.search(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if version is None:
        sys.exit("%s/__init__.py has no __version__: it is no copy of hardening/, or older than 1.0.0" % folder)
    with tempfile.TemporaryDirectory() as clone:
        git(".", "clone", "--quiet", "--bare", "--", template, clone)
        tags = git(clone, "tag", "--list", "v*", "--sort=-version:refname").split()
        newest = tags[0] if tags else "HEAD"
        ours, new = mine(clone, folder), theirs(clone, newest)
        # Without the tag nobody can tell who has changed what: then every difference is the template's.
        origin = "v" + version[1]
        old = theirs(clone, origin) if origin in tags else ours
    if not new:
        sys.exit("%s has no hardening/ at %s: name the template's repository" % (template, newest))
    pending = differing(ours, new)
    behind = sorted(differing(old, new) & pending)
    edited = sorted(differing(old, ours) & pending)
    print("%s is from %s; the newest is %s" % (folder, origin, newest))
    for title, names in (("newer in the template", behind), ("changed here", edited)):
        for name in names:
            print("  %s: %s" % (title, name))
    return int(bool(behind))


def main() -> int:
    """Read the arguments; a project that cruft made knows where its template is."""
    parser = argparse.ArgumentParser(prog="make outdated", description=str(__doc__).split(":", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, default=next(ROOT.glob("src/*/hardening")))
    parser.add_argument("template", nargs="?", help="address of the template's Git repository, or a checkout of it")
    options = parser.parse_args()
    state = ROOT / ".cruft.json"
    template = options.template or (json.loads(state.read_text(encoding="utf-8"))["template"] if state.exists() else "")
    if not template:
        sys.exit("Where is the template? make outdated TEMPLATE=https://... (or the path of a checkout)")
    return compare(options.folder.resolve(), template)


if __name__ == "__main__":
    sys.exit(main())
