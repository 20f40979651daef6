"""``tools/venv.py``: only what was locked is installed, and each thing that is missing gets one sentence (SUP-1)."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .baking import PROJECT, TEMPLATE

VENV = PROJECT / "tools" / "venv.py"
# One small package with a pure wheel, so that an installation takes a second.
SMALL = "iniconfig"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a project that needs one small package."""
    lock = (PROJECT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    pin = re.search(rf"^{SMALL}==.*\n( .*\n)+", lock, re.MULTILINE)
    assert pin
    (tmp_path / "src").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "run.txt").write_text(pin[0], encoding="utf-8")
    (tmp_path / "requirements" / "dev.txt").write_text("", encoding="utf-8")
    shutil.copy(VENV, tmp_path / "tools")
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    (tmp_path / "Makefile").write_text(makefile.replace("{{ cookiecutter.package_name }}", "package"), encoding="utf-8")
    return tmp_path


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``make setup``."""
    # An outer make would pass its own variables on.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "setup", *arguments],
        cwd=folder,
        env={**outer, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def python(folder: Path, name: str, script: str) -> Path:
    """Make something that is found as a Python."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_setup_installs_what_is_locked_once(folder: Path) -> None:
    first = setup(folder)
    assert first.returncode == 0, first.stderr
    imported = subprocess.run(
        [folder / ".venv/bin/python", "-c", f"import {SMALL}, sys; print(sys.path)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(folder / "src") in imported.stdout
    again = setup(folder)
    assert "Making" in first.stdout
    assert "Making" not in again.stdout
    (folder / "requirements" / "dev.txt").write_text("# changed\n", encoding="utf-8")
    assert "Making" in setup(folder).stdout


@pytest.mark.slow
@pytest.mark.parametrize("tampering", ["hash", "no-hash", "second-package"])
def test_setup_stops_at_what_is_not_locked(folder: Path, tampering: str) -> None:
    lock = folder / "requirements" / "run.txt"
    text = lock.read_text(encoding="utf-8")
    changed = {
        "hash": re.sub("sha256:[0-9a-f]{64}", "sha256:" + 64 * "0", text),
        "no-hash": re.sub(r" \\\n.*", "", text),
        "second-package": text + "six==1.17.0\n",
    }[tampering]
    assert changed != text
    lock.write_text(changed, encoding="utf-8")
    done = setup(folder)
    assert done.returncode != 0
    assert "The locked requirements could not be installed, see above." in done.stderr
    assert "hash" in done.stderr.lower()
    packages = {path.name for path in folder.glob(".venv/lib/python3*/site-packages/*")}
    assert not packages & {SMALL, "six.py", "project.pth"}
    assert setup(folder).returncode != 0, "a failed setup must not count as done"


@pytest.mark.slow
def test_a_source_distribution_is_not_built(folder: Path, tmp_path: Path) -> None:
    """A build would run code, and fetch a build backend that no hash covers."""
    source = tmp_path / "dist" / "planted-1.0"
    source.mkdir(parents=True)
    (source / "setup.py").write_text("open('/dev/null'); raise SystemExit('built')", encoding="utf-8")
    archive = Path(shutil.make_archive(str(source), "gztar", source.parent, source.name))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (folder / "requirements" / "run.txt").write_text(f"planted==1.0 --hash=sha256:{digest}\n", encoding="utf-8")
    done = setup(folder, PIP_FIND_LINKS=str(archive.parent))
    assert done.returncode != 0
    assert "built" not in done.stderr
    assert "could not be installed" in done.stderr


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (3, r"Python 3\.11 or newer is needed and none was found: install one, or make setup PYTHON=/path/to/python3"),
        (4, r"/\S+ has no venv module: sudo apt-get install --yes --no-install-recommends python3-venv"),
        (126, r"No Python here can be run by an unprivileged user, .*"),
    ],
    ids=["too-old", "no-venv", "closed"],
)
def test_a_python_that_cannot_be_used_gets_one_sentence(folder: Path, status: int, sentence: str) -> None:
    """No Python but the stand-in answers the probe; apt-get is not on the path."""
    stand_in = python(folder, "python3", f"exit {status}")
    script = f"""
import os, runpy, sys
sys.argv = ["tools/venv.py", ".venv", "requirements/run.txt"]
os.environ["PATH"] = {str(folder)!r}
os.environ.pop("PYTHON", None)
module = runpy.run_path("tools/venv.py")
module["main"].__globals__["candidates"] = lambda: [{str(stand_in)!r}]
module["main"](*sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(sentence, done.stderr.strip()), done.stderr
    assert not (folder / ".venv").exists()


def test_no_python_at_all_gets_one_sentence(folder: Path) -> None:
    done = setup(folder, "PYTHON=no-such-python")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "Python 3.11 or newer is needed: install python3 and python3-venv"


def test_root_passes_over_a_python_behind_a_closed_folder() -> None:
    """The stack's unprivileged user could not execute it. For anybody else it is as good as any."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:  # pytest's own folders are closed already
        real = shutil.copy2(Path("/usr/bin/python3").resolve(), Path(closed, "python3"))
        script = f"import runpy; print(runpy.run_path({str(VENV)!r})['probe']({str(real)!r}))"
        usable = {}
        for mode in (0o755, 0o700):
            Path(closed).chmod(mode)
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            usable[mode] = done.stdout.strip() == "0"
        assert usable == {0o755: True, 0o700: os.getuid() != 0}


@pytest.mark.slow
def test_the_environment_can_be_read_by_others(folder: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", "umask 077; make setup"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv").stat().st_mode & stat.S_IXOTH
    assert all(path.stat().st_mode & stat.S_IROTH for path in folder.glob(".venv/lib/python3*/site-packages/*"))


PYTHONS = sorted(
    {path.resolve() for path in Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python3")} | {Path("/usr/bin/python3")}
)


#: The tools of the gates have an environment of their own.
TOGETHER = {"service": ("run", "dev", "flower"), "gates": ("tools",)}


def test_every_lock_of_a_project_is_installed_somewhere() -> None:
    locks = {lock.stem for lock in PROJECT.glob("requirements/*.txt")}
    assert locks == {name for names in TOGETHER.values() for name in names}


@pytest.mark.exhaustive
@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize("interpreter", PYTHONS, ids=str)
def test_locks_install_on_every_python(interpreter: Path, together: tuple[str, ...], tmp_path: Path) -> None:
    subprocess.run([interpreter, "-m", "venv", tmp_path / "venv"], check=True)
    locks = [argument for name in together for argument in ("-r", str(PROJECT / "requirements" / f"{name}.txt"))]
    pip = [f"{tmp_path}/venv/bin/pip", "install", "--require-hashes", "--only-binary=:all:", *locks]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_service_needs_no_more_than_what_it_runs_with(default: Path, tmp_path: Path) -> None:
    """What only a developer's environment has is not there in an image."""
    environment = tmp_path / "venv"
    lock = default / "requirements" / "run.txt"
    subprocess.run([sys.executable, default / "tools" / "venv.py", environment, lock], check=True, capture_output=True)
    package = next((default / "src").iterdir())
    # The application reads its settings when it is imported, which the others need not.
    modules = [path for path in package.rglob("*.py") if path.parent.name == "hardening"]
    names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in modules]
    imports = "".join(f"import {name}\n" for name in names)
    done = subprocess.run(
        [environment / "bin/python", "-B", "-c", imports],
        cwd=tmp_path,
        env={"PYTHONPATH": str(default / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert names
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
def test_locks_are_what_their_sources_say(template: Path) -> None:
    """``make lock`` keeps pins that fit, so without a change of a source it changes nothing."""
    (template / ".venv").symlink_to(TEMPLATE / ".venv")
    locks = {path: path.read_text() for path in template.rglob("requirements/**/*.txt")}
    try:
        subprocess.run(["make", "lock"], cwd=template, check=True)
    finally:
        (template / ".venv").unlink()
    assert {path: path.read_text() for path in locks} == locks
    locked = subprocess.run(["make", "--dry-run", "lock"], cwd=template, capture_output=True, text=True, check=True)
    names = {path.relative_to(template).as_posix().removesuffix(".txt") for path in locks}
    assert names <= {word.strip("\";'") for word in locked.stdout.split()}
    assert len(names) == 10
