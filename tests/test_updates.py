"""A project is brought up to date by cruft, and a copy of ``hardening/`` knows that it is behind (TPL-4, TPL-5)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .baking import LEFTOVERS, PROJECT
from .test_project import make

GATE = "src/my_service/hardening/gate.py"
IDENTITY = "-c user.name=Test -c user.email=test@example.org -c commit.gpgsign=false".split()


def git(folder: Path, *arguments: str) -> str:
    """Run Git as somebody."""
    command = ["git", *IDENTITY, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "Change")


def edit(path: Path, old: str, new: str) -> None:
    """Replace what is there once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old} in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


class Upstream:
    """The template in a repository, released twice: the second time with a fix and what makes an update hard."""

    def __init__(self, template: Path, folder: Path) -> None:
        self.work = Path(shutil.copytree(template, folder / "work", ignore=LEFTOVERS))
        self.project = self.work / PROJECT.name
        self.hardening = next(self.project.glob("src/*/hardening"))
        git(self.work, "init", "--quiet", "--initial-branch", "main")
        self.release("1.0.0")

    def release(self, version: str) -> None:
        """Commit and tag what is there, under a version."""
        path = self.hardening / "__init__.py"
        path.write_text(re.sub('(?m)^__version__ = ".+"$', f'__version__ = "{version}"', path.read_text()))
        git(self.work, "add", "--all")
        git(self.work, "commit", "--quiet", "--allow-empty", "-m", version)
        git(self.work, "tag", f"v{version}")

    def mend(self) -> None:
        """Release a fix in the hardening layer, and with it a question, a filter, a file and a dependency."""
        gate = self.hardening / "gate.py"
        gate.write_text(gate.read_text() + "\n\n#: Mended.\nMENDED = True\n")
        (self.hardening / "mended.py").write_text('"""New."""\n')
        edit(self.work / "cookiecutter.json", '  "licence": [', '  "motto": "safe",\n  "licence": [')
        edit(self.work / "cookiecutter.json", '    "licence": {', '    "motto": "What it says",\n    "licence": {')
        answers = self.work / "secure_celery_answers.py"
        edit(answers, "checked=checked, toml=toml", "checked=checked, loud=str.upper, toml=toml")
        edit(
            self.project / "pyproject.toml",
            'version = "0.1.0"',
            'version = "0.1.0"\nkeywords = [{{ "mended" | loud | toml }}]',
        )
        requirements = self.project / "requirements" / "run.in"
        requirements.write_text(f"iniconfig\n{requirements.read_text()}")
        locked = self.project / "requirements" / "run.txt"
        locked.write_text(f"# locked again\n{locked.read_text()}")
        example = self.hardening.with_name("tasks") / "report.py"
        example.write_text(f"# The template's.\n{example.read_text()}")
        rules = self.project / "topology.toml"
        rules.write_text(f"# The template's.\n{rules.read_text()}")
        self.release("1.1.0")


@pytest.fixture
def upstream(template: Path, tmp_path: Path) -> Upstream:
    return Upstream(template, tmp_path)


def cruft(tools: Path, folder: Path, *arguments: str) -> str:
    """Run cruft with nothing of this process but what it needs; return what it says."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    settings = {"HOME": str(home), "PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull}
    command = [str(tools / "cruft"), *arguments]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def linked(upstream: Upstream, tools: Path, tmp_path: Path) -> Path:
    """Create a project by cruft from the first release, and work on it as its owner does."""
    cruft(tools, tmp_path, "create", f"file://{upstream.work}", "--no-input", "--checkout", "v1.0.0")
    project = tmp_path / "my-service"
    git(project, "init", "--quiet", "--initial-branch", "main")
    commit(project)
    (project / "src/my_service/tasks/notify.py").unlink()
    edit(project / "src/my_service/tasks/__init__.py", "notify, ", "")
    (project / "src/my_service/tasks/report.py").write_text("# rewritten\n")
    edit(project / "topology.toml", "[queues.default]", "[queues.default]\n\n[queues.slow]")
    (project / "README.md").write_text("# Ours\n")
    (project / "requirements/run.in").write_text((project / "requirements/run.in").read_text() + "tabulate\n")
    (project / "requirements/run.txt").write_text("# ours\n" + (project / "requirements/run.txt").read_text())
    settings = project / "src/my_service/settings.py"
    settings.write_text(settings.read_text() + "\n# ours\n")
    commit(project)
    return project


OWN = ("src/my_service/tasks", "topology.toml", "README.md", "requirements/run.txt", "LICENSE", ".github/CODEOWNERS")


@pytest.mark.slow
def test_an_update_brings_the_fix_and_keeps_what_its_owner_changed(
    linked: Path, upstream: Upstream, tools: Path
) -> None:
    upstream.mend()
    said = cruft(tools, linked, "update", "--skip-apply-ask", "--checkout", "v1.1.0")
    assert "as clean as possible" in said
    assert not [*linked.rglob("*.rej")]
    assert "MENDED = True" in (linked / GATE).read_text()
    assert (linked / GATE).with_name("mended.py").is_file()
    # The new release's own filter, which the old release's module of filters does not have.
    assert 'keywords = ["MENDED"]' in (linked / "pyproject.toml").read_text()
    assert git(linked, "diff", "HEAD", "--name-only", "--", *OWN) == ""
    assert not (linked / "src/my_service/tasks/notify.py").exists()
    assert (linked / "src/my_service/settings.py").read_text().endswith("# ours\n")
    required = (linked / "requirements/run.in").read_text()
    assert required.startswith("iniconfig\n")
    assert required.endswith("tabulate\n")
    assert '"motto": "safe"' in (linked / ".cruft.json").read_text()
    assert "<<<<<<<" not in git(linked, "diff", "HEAD")
    cruft(tools, linked, "check", "--checkout", "v1.1.0")


@pytest.mark.exhaustive
def test_after_an_update_locks_follow_and_the_tests_pass(upstream: Upstream, tools: Path, tmp_path: Path) -> None:
    cruft(tools, tmp_path, "create", f"file://{upstream.work}", "--no-input", "--checkout", "v1.0.0")
    project = tmp_path / "my-service"
    git(project, "init", "--quiet")
    commit(project)
    upstream.mend()
    cruft(tools, project, "update", "--skip-apply-ask", "--checkout", "v1.1.0")
    locked = (project / "requirements/run.txt").read_text()
    assert not re.search("(?m)^iniconfig==", locked)
    make(project, "lock")
    assert re.search("(?m)^iniconfig==", (project / "requirements/run.txt").read_text())
    make(project, "topology")
    make(project, "test")


def test_what_is_skipped_is_in_a_project(default: Path, redis: Path) -> None:
    """A path that is mistyped would be merged, and overwritten."""
    skipped = tomllib.loads((default / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cruft"]["skip"]
    for pattern in skipped:
        found = [*default.glob(pattern), *redis.glob(pattern), *PROJECT.glob(pattern)]
        assert found, pattern
    readme = (default / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in ("topology.toml", "tasks/", "tests/unit/test_tasks.py", "app.py"))


def outdated(project: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run the project's command; return its status and its lines, the folder's own name left out."""
    command = [sys.executable, "tools/outdated.py", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    return done.returncode, [line.strip() for line in (done.stdout + done.stderr).splitlines()]


@pytest.fixture
def copy(default: Path, upstream: Upstream, tmp_path: Path) -> Path:
    """Copy ``hardening/`` into another repository."""
    return Path(shutil.copytree(upstream.hardening, tmp_path / "shop" / "hardening"))


def test_a_copy_says_what_is_newer_and_what_was_changed(default: Path, upstream: Upstream, copy: Path) -> None:
    ask = ("--folder", str(copy), str(upstream.work))
    assert outdated(default, *ask) == (0, [f"{copy} is from v1.0.0; the newest is v1.0.0"])
    upstream.mend()
    newer = [f"newer in the template: {name}" for name in ("__init__.py", "gate.py", "mended.py")]
    heading = f"{copy} is from v1.0.0; the newest is v1.1.0"
    assert outdated(default, *ask) == (1, [heading, *newer])
    (copy / "audit.py").write_text("# ours\n")
    (copy / "tls.py").unlink()
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__/x.pyc").touch()
    edited = [f"changed here: {name}" for name in ("audit.py", "tls.py")]
    assert outdated(default, *ask) == (1, [heading, *newer, *edited])
    shutil.rmtree(copy)
    shutil.copytree(upstream.hardening, copy)
    assert outdated(default, *ask) == (0, [f"{copy} is from v1.1.0; the newest is v1.1.0"])


def test_a_copy_of_an_unknown_release_is_behind_in_all_that_differs(
    default: Path, upstream: Upstream, copy: Path
) -> None:
    edit(copy / "__init__.py", '__version__ = "1.0.0"', '__version__ = "0.9.0"')
    status, lines = outdated(default, "--folder", str(copy), str(upstream.work))
    assert (status, lines[1:]) == (1, ["newer in the template: __init__.py"])


def test_the_project_asks_where_cruft_has_made_it_from(default: Path, upstream: Upstream, tmp_path: Path) -> None:
    project = Path(shutil.copytree(default, tmp_path / "project"))
    assert outdated(project) == (
        1,
        ["Where is the template? make outdated TEMPLATE=https://... (or the path of a checkout)"],
    )
    (project / ".cruft.json").write_text(f'{{"template": "{upstream.work}"}}')
    assert outdated(project)[0] == 0


@pytest.mark.parametrize(
    ("version", "source", "sentence"),
    [
        ("", "{upstream}", "has no __version__: it is no copy of hardening/"),
        ("1.0.0", "{nothing}", "git clone: fatal:"),
        ("1.0.0", "--upload-pack=touch CANARY", "git clone: fatal:"),
        ("1.0.0", "ext::touch CANARY", "git clone: fatal:"),
        ("1.0.0", "{other}", "has no hardening/ at HEAD: name the template's repository"),
    ],
)
def test_what_cannot_be_compared_gets_a_sentence(
    version: str, source: str, sentence: str, default: Path, upstream: Upstream, copy: Path, tmp_path: Path
) -> None:
    if not version:
        edit(copy / "__init__.py", '__version__ = "1.0.0"\n', "")
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    git(other, "init", "--quiet")
    commit(other)
    source = source.format(upstream=upstream.work, nothing=tmp_path / "nothing", other=other)
    status, lines = outdated(default, "--folder", str(copy), "--", source)
    assert status == 1
    assert sentence in lines[0]
    assert not [*tmp_path.rglob("CANARY"), *default.rglob("CANARY")]
