"""Hostile answers end in one clear sentence that leaves nothing, or in a correct project (TPL-2)."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from cookiecutter.cli import main as command
from cookiecutter.exceptions import FailedHookException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from secure_celery_answers import PACKAGE, SLUG, TAKEN, markdown

from .baking import PROJECT, bake, published

SENTENCE = re.compile(r"[a-z_]+: it .+; .+\.|package_name: .+; .+\.|An answer holds template syntax .+; leave it out\.")
FREE_TEXT = ("project_name", "description", "author")

CANARY = "CANARY"
PAYLOADS = (
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ cookiecutter.__init__.__globals__ }}",
    "{{cookiecutter.author}}",
    "{{{cookiecutter.project_slug}}}",
    "{% raw %}",
    "{# comment",
    "$(touch CANARY)",
    "`touch CANARY`",
    "'; touch CANARY; '",
    '"; import os; os.system("touch CANARY") #',
    '"""; import os; os.system("touch CANARY"); """',
    "\\",
    'a"b',
    "it's",
    "a\nb",
    "a\rb",
    "a\x00b",
    "a\x1b[2Jb",
    "a\x7fb",
    "a\u2028b",
    "a\u202eb",
    "\ud800",
    "😀 naïve Ω",
    "..",
    "../../CANARY",
    "/CANARY",
    "a/b",
    ".",
    "-rf",
    "<script>touch</script>",
    "}}",
    "%}",
    "${{ github.token }}",
    "```",
    "x" * 10_000,
    "",
    " ",
)
hostile = st.one_of(
    st.sampled_from(PAYLOADS),
    st.lists(st.one_of(st.sampled_from(PAYLOADS), st.text(max_size=8)), max_size=4).map("".join),
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=120),
)

# The only Python that an answer can break. All other modules are copied as they are.
WITH_ANSWERS = [
    str(path.relative_to(PROJECT))
    for path in PROJECT.rglob("*.py")
    if ".venv" not in path.parts and "cookiecutter" in path.read_text(encoding="utf-8")
]


@contextmanager
def sandbox() -> Iterator[Path]:
    """Work in a new folder three levels down, so that a path out of it is seen; put it all away at the end."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder, "one", "two")
        inner.mkdir(parents=True)
        os.chdir(inner)
        try:
            yield inner
        finally:
            os.chdir(before)


def bake_or_refuse(template: Path, answers: dict[str, str]) -> None:
    """Bake in a sandbox and check whichever end it comes to."""
    with sandbox() as folder:
        root = folder.parent.parent
        own = root / "own"
        own.mkdir()
        refusal = ""
        try:
            project = bake(folder / "out", template, answers, own)
        except FailedHookException as refused:
            refusal = str(refused)
        if refusal:
            assert all(SENTENCE.fullmatch(line) for line in refusal.splitlines()), refusal
            assert not any(len(text) > 12 and text in refusal for text in answers.values())
        else:
            check(project, answers)
            assert project.parent == folder / "out"
            shutil.rmtree(folder / "out")
        shutil.rmtree(own)
        assert [*root.rglob("*")] == [folder.parent, folder]


def check(project: Path, answers: dict[str, str]) -> None:
    """Check that the answers are in the project, word for word, as data."""
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    slug = answers.get("project_slug", metadata["name"])
    package = answers.get("package_name", slug.replace("-", "_"))
    assert SLUG.fullmatch(slug)
    assert PACKAGE.fullmatch(package)
    assert project.name == metadata["name"] == slug
    assert [path.name for path in (project / "src").iterdir()] == [package]
    assert metadata["description"] == answers.get("description", metadata["description"])
    assert metadata["authors"] == [{"name": answers.get("author", metadata["authors"][0]["name"])}]
    assert metadata["authors"][0]["name"] in (project / "LICENSE").read_text(encoding="utf-8")
    readme = (project / "README.md").read_text(encoding="utf-8").splitlines()
    assert readme[0] == f"# {markdown(answers.get('project_name', 'My Service'))}"
    assert readme[2] == markdown(metadata["description"])
    for path in WITH_ANSWERS:
        ast.parse((project / path.replace("{{cookiecutter.package_name}}", package)).read_bytes())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=st.sampled_from([*FREE_TEXT, "project_slug", "package_name"]), answer=hostile)
def test_a_hostile_answer_is_refused_or_is_data(template: Path, question: str, answer: str) -> None:
    bake_or_refuse(template, {question: answer})


@pytest.mark.parametrize("question", [*FREE_TEXT, "project_slug", "package_name"])
def test_each_payload_in_each_answer(template: Path, question: str) -> None:
    for payload in PAYLOADS:
        bake_or_refuse(template, {question: payload})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    description=st.text(st.characters(categories=["L", "M", "N", "P", "S"]), min_size=1, max_size=200),
    author=st.text(st.characters(categories=["L", "M", "N", "P", "S"]), min_size=1, max_size=100),
)
@example(description='"\\', author="'''\\")
def test_printable_text_is_accepted(template: Path, description: str, author: str) -> None:
    bake_or_refuse(template, {"description": description, "author": author})


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"project_name": "!!!"}, "project_slug: it must begin with a letter out of a-z"),
        ({"project_name": ""}, "project_name: it is empty"),
        ({"project_name": "x" * 61}, "project_name: it has 61 characters; 60 is the limit"),
        ({"project_name": "Test"}, "package_name: Python or a dependency has a module of that name"),
        ({"package_name": "celery"}, "package_name: Python or a dependency has a module of that name"),
        ({"package_name": "stack"}, "package_name: Python or a dependency has a module of that name"),
        ({"package_name": "class"}, "package_name: it is a word of the Python language"),
        ({"package_name": "match"}, "package_name: it is a word of the Python language"),
        ({"package_name": "My_Service"}, "package_name: it must begin with a letter out of a-z"),
        ({"package_name": "a" * 41}, "package_name: it must begin with a letter out of a-z"),
        ({"project_slug": "a" * 41}, "project_slug: it must begin with a letter out of a-z"),
        ({"project_slug": "a" * 300}, "project_slug: it must begin with a letter out of a-z"),
        ({"project_slug": "a--b"}, "project_slug: it must begin with a letter out of a-z"),
        ({"project_slug": "../a"}, "project_slug: it must begin with a letter out of a-z"),
        ({"description": "a\nb"}, "description: it holds a control or invisible character"),
        ({"description": "a\u202eb"}, "description: it holds a control or invisible character"),
        ({"description": " a"}, "description: it begins or ends with white space"),
        ({"author": "x" * 101}, "author: it has 101 characters; 100 is the limit"),
        ({"author": "{{ 7 * 7 }}"}, "An answer holds template syntax"),
    ],
)
def test_a_refusal_says_what_and_why(template: Path, answers: dict[str, str], sentence: str) -> None:
    with sandbox() as folder, pytest.raises(FailedHookException, match=re.escape(sentence)):
        bake(folder / "out", template, answers)


def test_the_command_prints_the_sentence_and_nothing_else(template: Path) -> None:
    with sandbox():
        arguments = [str(template), "--no-input", "--default-config", "package_name=stack", "author=x\x1b[2J"]
        done = CliRunner().invoke(command, arguments)
        lines = done.output.splitlines()
        assert (done.exit_code, len(lines)) == (1, 2), done.output
        assert all(SENTENCE.fullmatch(line) for line in lines)
        assert not [*Path.cwd().iterdir()]


def test_template_syntax_that_was_typed_is_refused_too(template: Path, tmp_path: Path) -> None:
    """Cookiecutter leaves what was typed alone, but ``cruft update`` would render it."""
    with sandbox() as folder:
        configuration = tmp_path / "config.yaml"
        configuration.write_text(f"replay_dir: {tmp_path}/replay\ncookiecutters_dir: {tmp_path}/templates\n")
        typed = "\n\n\n{{ 7 * 7 }}\n\n" + "1\n" * 5
        arguments = [str(template), "--config-file", str(configuration)]
        done = CliRunner().invoke(command, arguments, input=typed)
        assert done.exit_code == 1
        assert "description: it holds template syntax" in done.output.splitlines()[-1], done.output
        assert not [*folder.iterdir()]


def test_a_replayed_answer_is_refused_too(template: Path, tmp_path: Path) -> None:
    with sandbox() as folder:
        project = bake(folder / "out", template, own=tmp_path)
        shutil.rmtree(project)
        replay = next((tmp_path / "replay").iterdir())
        context = json.loads(replay.read_text(encoding="utf-8"))
        context["cookiecutter"]["package_name"] = "stack"
        replay.write_text(json.dumps(context), encoding="utf-8")
        done = CliRunner().invoke(command, [str(template), "--replay-file", str(replay), "-o", str(folder / "out")])
        assert done.exit_code == 1
        assert "package_name: Python or a dependency has a module of that name" in done.output
        assert not [*(folder / "out").iterdir()]


def test_every_module_that_is_installed_is_taken(template: Path) -> None:
    locks = [path for path in template.glob("{{*/requirements/*.txt") if path.stem != "tools"]  # they import none of it
    lock = "".join(path.read_text() for path in locks)
    locked = {re.sub("[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    for module, distributions in importlib.metadata.packages_distributions().items():
        installed = {re.sub("[-_.]+", "-", name).lower() for name in distributions}
        if installed & locked and PACKAGE.fullmatch(module):
            assert module in TAKEN | sys.stdlib_module_names, f"{module} of {distributions}"


def test_the_project_s_own_top_level_names_are_taken(default: Path) -> None:
    own = {path.name for path in default.iterdir() if path.is_dir() and PACKAGE.fullmatch(path.name)}
    assert own <= TAKEN | {"deploy", "requirements", "reports", "docs"}


@pytest.mark.parametrize("form", ["zip", "repository"])
def test_a_project_comes_from_a_zip_and_from_a_tag_of_a_repository(form: str, template: Path, tmp_path: Path) -> None:
    """In a process of its own, which has nothing of the template but what it is given."""
    command = [sys.executable, "-m", "cookiecutter", *published(template, tmp_path)[form]]
    command += ["--no-input", "project_name=Parcel Desk"]
    output = tmp_path / "out"
    output.mkdir()
    done = subprocess.run(
        command, cwd=output, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "parcel-desk" / "src" / "parcel_desk").is_dir()
