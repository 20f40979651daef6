"""Bake projects, in folders that the unprivileged user of their stack can reach."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cookiecutter.main import cookiecutter

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.project_slug}}"
HARDENING = TEMPLATE / "tests" / "hardening"
ENVIRONMENTS = (".venv", ".venv-tools")
LICENCES = ("MIT", "Apache-2.0", "BSD-3-Clause", "Proprietary")
LONG = {
    "project_name": "The quite remarkably long and winding name of a service 2026",
    "project_slug": "a-service-with-forty-characters-in-it-yo",
    "package_name": "a_service_with_forty_characters_in_it_yo",
}
# What working in the template leaves behind; it is in no clone and no zip.
LEFTOVERS = shutil.ignore_patterns(
    "__pycache__", ".*_cache", ".venv*", ".hypothesis", ".stack*", "reports", "build", ".git"
)


def bake(
    output: Path, template: Path | str = TEMPLATE, answers: Mapping[str, str] | None = None, own: Path | None = None
) -> Path:
    """Bake with these answers and otherwise the defaults; Cookiecutter keeps its own files in ``own``."""
    own = own or output.parent / f"{output.name}-cookiecutter"
    own.mkdir(exist_ok=True)
    configuration = own / "config.yaml"
    configuration.write_text(f"cookiecutters_dir: {own}/templates\nreplay_dir: {own}/replay\n", encoding="utf-8")
    return Path(
        cookiecutter(
            str(template),
            no_input=True,
            extra_context=answers and dict(answers),
            output_dir=str(output),
            config_file=str(configuration),
        )
    )


def reachable(folder: Path) -> bool:
    """Whether somebody who is neither owner nor group may enter this folder."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents) if path.exists())


@contextmanager
def workshop(name: str) -> Iterator[Path]:
    """Give a folder for a project with a running stack: ``build/``, so that a second run finds its ``.venv``.

    The stack cannot work where its unprivileged user cannot enter, nor under a name with a space: then the folder
    is a temporary one.
    """
    if not any(character.isspace() for character in str(TEMPLATE)) and (os.getuid() != 0 or reachable(TEMPLATE)):
        folder = TEMPLATE / "build" / name
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        yield folder
        return
    print(
        "This folder has a space in its name or is closed to the stack's unprivileged user: working in /var/tmp.",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix=f"secure-celery-{name}-", dir="/var/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        yield folder


def bake_again(workshop: Path, answers: Mapping[str, str] | None = None) -> Path:
    """Bake a project where an earlier one may be; end its stack and keep only its environments.

    Its tests get those of the hardening layer, which are the template's.
    """
    project = workshop / "my-service"
    if (project / ".stack").is_dir():
        subprocess.run(["make", "down"], cwd=project, check=True)
    for environment in ENVIRONMENTS:
        if (project / environment).is_dir():
            shutil.rmtree(workshop / environment, ignore_errors=True)
            (project / environment).rename(workshop / environment)
    shutil.rmtree(project, ignore_errors=True)
    project = bake(workshop, answers=answers, own=workshop / "cookiecutter")
    for environment in ENVIRONMENTS:
        if (workshop / environment).is_dir():
            (workshop / environment).rename(project / environment)
    shutil.copytree(HARDENING, project / "tests" / HARDENING.name, ignore=LEFTOVERS)
    shutil.copytree(TEMPLATE / "docs", project / "docs", dirs_exist_ok=True)  # tested to the letter
    return project


def environment(name: str) -> Path:
    """Make ``build/venv-NAME``, an environment with what ``requirements/tools/NAME.txt`` locks, unless it is there."""
    folder, lock = TEMPLATE / "build" / f"venv-{name}", TEMPLATE / "requirements" / "tools" / f"{name}.txt"
    folder.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, PROJECT / "tools" / "venv.py", folder, lock], cwd=TEMPLATE, check=True)
    return folder


def published(template: Path, folder: Path) -> dict[str, list[str]]:
    """Give the template as a zip, and as a tag of a bare repository in which it is broken since."""
    clean = Path(shutil.copytree(template, folder / "clean" / "secure-celery"))
    archive = shutil.make_archive(str(folder / "template"), "zip", clean.parent, clean.name)
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "Begin"], ["tag", "v1"]):
        subprocess.run(["git", *identity, *arguments], cwd=clean, check=True)
    (clean / "cookiecutter.json").unlink()
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "-m", "Break it"], cwd=clean, check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", clean, folder / "template.git"], check=True)
    return {"zip": [archive], "repository": [f"file://{folder}/template.git", "--checkout", "v1"]}
