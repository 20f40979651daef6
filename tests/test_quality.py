"""A baked tree is formatted, linted, type-checked, within its budget and ready for a first commit (TPL-1)."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL, generate_tokens

import pytest

from .baking import LICENCES, PROJECT, TEMPLATE, bake

FILES, HARDENING_LINES, MODULE_LINES = 153, 4000, 400


def check(folder: Path, *command: str) -> None:
    """Run a tool of the locked environment in a folder; its output is the failure's message."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def files(folder: Path) -> list[Path]:
    """List what would be committed."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not set(path.parts) & CACHES)


CACHES = {
    "__pycache__",
    ".git",
    ".venv",
    ".venv-tools",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "build",
}


@pytest.fixture(params=["default", "long", "redis"])
def tree(request: pytest.FixtureRequest) -> Path:
    """Give a baked tree: names decide how long lines are and how imports sort."""
    baked: Path = request.getfixturevalue(request.param)
    return baked


def test_tree_is_formatted(tree: Path) -> None:
    check(tree, "ruff", "format", "--check", "--no-cache", ".")


def test_tree_passes_the_linter(tree: Path) -> None:
    check(tree, "ruff", "check", "--no-cache", ".")


def test_tree_passes_the_type_checker(tree: Path, tmp_path: Path) -> None:
    check(tree, "mypy", "--cache-dir", str(tmp_path))


def test_rendered_permissions_fit_the_topology(tree: Path) -> None:
    package = next((tree / "src").iterdir()).name
    done = subprocess.run(
        [sys.executable, "-B", "-m", f"{package}.hardening.render", "--check"],
        cwd=tree,
        env={"PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_template_syntax_is_left(tree: Path) -> None:
    for path in files(tree):
        assert not re.search(r"\{%|cookiecutter", path.read_text(encoding="utf-8")), path


def code_lines(path: Path) -> int:
    """Count the lines of a module that hold code: no blank ones, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    layout = {COMMENT, NL, NEWLINE, INDENT, DEDENT, ENDMARKER}
    tokens = (token for token in generate_tokens(io.StringIO(text).readline) if token.type not in layout)
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_tree_keeps_its_budget(default: Path) -> None:
    """Files in all, lines of code in the hardening layer, lines in a module."""
    assert len(files(default)) <= FILES
    assert sum(code_lines(path) for path in default.glob("src/*/hardening/**/*.py")) <= HARDENING_LINES
    long = {path for path in default.rglob("*.py") if path.read_text().count("\n") > MODULE_LINES}
    assert not long


def test_baking_takes_about_a_second(template: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    bake(tmp_path / "out", template)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("licence", LICENCES)
def test_licence_is_the_chosen_one(licence: str, template: Path, tmp_path: Path) -> None:
    project = bake(tmp_path / "out", template, {"licence": licence, "author": "Zoë Ünal"})
    text = (project / "LICENSE").read_text(encoding="utf-8")
    assert list(project.glob("LICEN[CS]E*")) == [project / "LICENSE"]
    titles = {"Apache-2.0": "Apache License", "Proprietary": "All rights reserved"}
    assert titles.get(licence, f"{licence.replace('-', ' ', 1)}") in text or "BSD 3-Clause License" in text
    assert licence == "Apache-2.0" or "Copyright (c) Zoë Ünal" in text
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["license"].removeprefix("LicenseRef-") == licence


def test_first_commit_holds_no_secret_and_ignores_what_a_run_makes(default: Path) -> None:
    names = re.compile(r"\.(key|pem|p12|pfx|env|crt|kdbx)$|^\.env|id_rsa|\.erlang\.cookie")
    content = re.compile(
        r"-----BEGIN [A-Z ]*(PRIVATE KEY|CERTIFICATE)-----\s+[A-Za-z0-9+/]{32}|AKIA[0-9A-Z]{16}|ghp_[0-9A-Za-z]{36}"
    )
    for path in files(default):
        assert not names.search(path.name), path
        assert not content.search(path.read_text(encoding="utf-8")), path
    made = [
        ".venv/bin/python",
        ".stack-attacks/x",
        ".stack/client.env",
        ".stack/pki/worker.key",
        "reports/attacks.json",
    ]
    made += [".mypy_cache/x", ".ruff_cache/x", ".pytest_cache/x", ".hypothesis/x", "src/my_service/a.pyc"]
    subprocess.run(["git", "init", "--quiet", "--bare", "git"], cwd=default.parent, check=True)
    git = ["git", "--git-dir", str(default.parent / "git"), "--work-tree", "."]
    ignored = subprocess.run([*git, "check-ignore", *made], cwd=default, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == made


# Spelt so that this file does not name them.
REGISTRIES = re.compile(r"p[y]pi\.org|pythonh[o]sted\.org|registry\.np[m]js|(deb|security)\.deb[i]an\.org")
WITH_ADDRESSES = {
    "uv.lock",
    "poetry.lock",
    "pdm.lock",
    "Pipfile.lock",
    "pylock.toml",
    "package-lock.json",
    "yarn.lock",
}


@pytest.mark.parametrize("where", ["template", "default"])
def test_no_download_address_is_recorded(where: str, request: pytest.FixtureRequest) -> None:
    for path in files(request.getfixturevalue(where)):
        assert path.name not in WITH_ADDRESSES, path
        assert not REGISTRIES.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("folder", [TEMPLATE, PROJECT], ids=["template", "project"])
def test_requirements_are_pins_with_hashes(folder: Path) -> None:
    for lock in folder.glob("requirements/**/*.txt"):
        requirement = re.compile(r"[a-z0-9-]+==[^ ]+( ; [^\\]+)?(\n    --hash=sha256:[0-9a-f]{64})+")
        logical = lock.read_text(encoding="utf-8").replace(" \\\n", "\n")
        for entry in re.split(r"\n(?! )", logical.strip()):
            assert requirement.fullmatch(entry), entry
