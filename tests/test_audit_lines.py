"""The audit reads every line of a lock, or refuses it: nobody would ask about one that is passed over (SUP-2)."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from .baking import PROJECT

AUDIT = PROJECT / "tools" / "audit.py"
HASH = f" \\\n    --hash=sha256:{64 * '0'}"
FIX = "pin it as name==version: by requirements/*.in and `make lock`"
UNREADABLE = {
    "address": "evil @ https://example.org/evil-1.0.zip",
    "bare-address": "https://example.org/evil-1.0.zip",
    "range": "celery>=5",
    "two": "celery==5.0,!=5.1",
    "wildcard": "celery==5.*",
    "any": "celery",
    "arbitrary": "celery===5.0",
    "folder": "-e ./vendored",
    "other-file": "-r other.txt",
    "index": "--extra-index-url https://example.org/simple",
    "indented": "  evil @ https://example.org/evil-1.0.zip",
    "after-a-continuation": f"one==1.0{HASH} \\\n    evil @ https://example.org/evil-1.0.zip",
    "words": "what is this",
}


def locked(folder: Path, text: str) -> Path:
    path = folder / "run.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_line_that_is_no_pin_is_refused(kind: str, tmp_path: Path) -> None:
    path = locked(tmp_path, f"# what is locked\none==1.0{HASH}\n\n{UNREADABLE[kind]}{HASH}\ntwo==2.0{HASH}\n")
    done = subprocess.run([sys.executable, AUDIT, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"audit: {path}:5: "), done.stderr
    assert done.stderr.endswith(f": {FIX}\n")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_extras_markers_and_comments_do_not_hide_a_pin(tmp_path: Path) -> None:
    text = f"# one\n\nredis[hiredis]==5.0{HASH}\nOne.Two==1.0.0  # why\ntwo==2.0 ; sys_platform == 'win32'{HASH}{HASH}"
    found = runpy.run_path(str(AUDIT))["pins"]([locked(tmp_path, text)])
    digest = f"--hash=sha256:{64 * '0'}"
    assert found == {
        ("redis", "5.0"): f"redis==5.0 {digest}",
        ("one-two", "1.0.0"): "One.Two==1.0.0",
        ("two", "2.0"): f"two==2.0 {digest} {digest}",
    }


def test_a_file_that_ends_in_the_middle_of_a_line_is_read_to_its_end(tmp_path: Path) -> None:
    path = locked(tmp_path, f"one==1.0{HASH}\nevil @ https://example.org/evil-1.0.zip \\")
    done = subprocess.run([sys.executable, AUDIT, path], capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f"audit: {path}:3: ")
