"""A fresh project passes every gate, and each gate refuses what it is there for (SUP-2 to SUP-5)."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .advisories import Service, serve
from .baking import LONG, PROJECT, TEMPLATE, bake, bake_again, workshop
from .test_celery_rules import RULES

TOOLS = TEMPLATE / ".venv-tools"
GATES = ("lint", "bandit", "secrets", "workflows", "container")
GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="session")
def tools() -> Path:
    """Make the gates' environment, as ``make hooks`` in the template does; a second run finds it."""
    venv, lock = PROJECT / "tools" / "venv.py", PROJECT / "requirements" / "tools.txt"
    subprocess.run([sys.executable, venv, TOOLS, lock], cwd=TEMPLATE, check=True, capture_output=True)
    return TOOLS / "bin"


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment without what an outer make, pytest or git hook passes on."""
    own = ("MAKE", "PYTEST", "MFLAGS", "GIT_", "PIP_AUDIT")
    return {name: text for name, text in os.environ.items() if not name.startswith(own)} | more


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a project; its lines of both kinds are in ``stdout``."""
    return subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def repository(folder: Path) -> Path:
    """Make a project a repository with everything in it added."""
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        assert run(folder, *GIT, *arguments).returncode == 0
    return folder


#: Words that go before secrets. An answer that is a password in quotes, or a plain URL, is refused like any other.
AWKWARD = {
    "project_name": "Secret Password Key",
    "author": "Password & Token Ltd",
    "description": "api_key: a secret",
}
ANSWERS: dict[str, dict[str, str]] = {"default": {}, "redis": {"broker": "redis"}, "long": LONG, "awkward": AWKWARD}


@pytest.fixture(
    scope="session",
    params=[name if name == "default" else pytest.param(name, marks=pytest.mark.slow) for name in ANSWERS],
)
def fresh(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake and ``git init``, which is all that a person does before the first commit."""
    answers = ANSWERS[request.param]
    return repository(bake(tmp_path_factory.mktemp(request.param), template, answers))


@pytest.mark.parametrize("gate", GATES)
def test_a_fresh_project_passes(gate: str, fresh: Path, tools: Path) -> None:
    done = run(fresh, tools / "python", "tools/gate.py", gate)
    assert done.returncode == 0, done.stdout
    assert run(fresh, *GIT, "diff", "--exit-code").returncode == 0, "a gate changes nothing"


# Spelt so that this file holds none of it.
AWS_KEY = "AKIA" + "IOSFODNN7EXAMPLQ"
PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n"
PASSWORD = "pass" + 'word = "J3k9-fW2x-Qp8z"'
WORKFLOW = """name: x
on: push
permissions: {}
jobs:
  x:
    name: x
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    steps:
      - uses: actions/checkout@v4
"""
# gate, what its output must name, file, content. No two of a turn (see below) have the same file.
PLANTED = [
    ("format", "would be reformatted", "src/untidy.py", "x  =  1\n"),
    ("lint", "S102", "src/ruff.py", 'exec("x")\n'),
    ("lint", "yamllint", "deploy/lint.yaml", "a: 1\na: 2\n"),
    ("lint", "shellcheck", "deploy/lint.sh", "#!/bin/sh\nrm -rf $1/*\n"),
    ("types", "arg-type", "src/types_.py", "len(1)\n"),
    ("bandit", "bandit", "src/bandit_.py", 'import hashlib\n\nhashlib.md5(b"")\n'),
    ("bandit", "celery_rules.py", "src/rules.py", 'task_serializer = "pickle"\n'),
    ("bandit", "celery_rules.py", "deploy/worker.service", "[Service]\nEnvironment=C_FORCE_ROOT=1\n"),
    ("secrets", "detect-secrets-hook", "src/secret.py", f'KEY = "{AWS_KEY}"\n'),
    ("secrets", "detect-secrets-hook", "deploy/secret.toml", f"{PASSWORD}\n"),
    ("secrets", "Private Key", "deploy/secret.txt", PRIVATE_KEY),
    ("secrets", "check-added-large-files", "secret.bin", "x" * 600_000),
    ("secrets", "check-merge-conflict", "secret.md", "a\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> other\n"),
    ("workflows", "check-jsonschema", ".github/workflows/a.yml", WORKFLOW.replace("runs-on", "runs-in")),
    ("workflows", "zizmor", ".github/workflows/b.yml", WORKFLOW),
    ("workflows", "check-jsonschema", ".github/dependabot.yml", "version: 2\nupdates: [{}]\n"),
    ("workflows", "check-jsonschema", ".gitlab-ci.yml", "x: {script: [make], when: sometimes}\n"),
    ("container", "hadolint", "Dockerfile", "FROM python:latest\nRUN cd / && sudo x\n"),
    ("container", "hadolint", "deploy/Dockerfile.worker", "FROM python\n"),
    ("container", "check-jsonschema", "compose.yaml", "services: {x: {imagge: y}}\n"),
]


@pytest.mark.parametrize("where", ["nowhere", "ignored"])
def test_a_gate_with_no_files_to_look_at_is_refused(where: str, template: Path, tools: Path, tmp_path: Path) -> None:
    """No repository, or a folder that one ignores: a gate that passes there proves nothing."""
    project = bake(tmp_path / "out", template)
    if where == "ignored":
        (project.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        repository(project.parent)
    done = run(project, tools / "python", "tools/gate.py", "secrets")
    assert done.returncode == 1
    assert re.fullmatch(r"The gates look at the files that git would commit, and .*: git init\n", done.stdout), (
        done.stdout
    )


def test_a_gate_says_when_nothing_is_its_business(template: Path, tools: Path, tmp_path: Path) -> None:
    project = repository(bake(tmp_path / "out", template))
    done = run(project, tools / "python", "tools/gate.py", "workflows", "README.md")
    assert (done.returncode, done.stdout) == (0, "workflows: no such files here, so nothing to look at\n")


# --- what is locked


def pins(*locks: Path) -> set[tuple[str, str]]:
    """Return what locks hold, for any platform."""
    text = "".join(lock.read_text(encoding="utf-8") for lock in locks)
    return {(name, version) for name, version in re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.MULTILINE)}


@pytest.fixture
def advisories() -> Iterator[Service]:
    """Run an advisory service that knows nothing yet."""
    with serve() as service:
        yield service


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


# --- one set of gates


def targets(makefile: Path) -> list[str]:
    """Return the gates that ``make gates`` runs."""
    (names,) = re.findall(r"^GATES := (.*)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    return list(names.split())


@pytest.mark.parametrize("root", [TEMPLATE, PROJECT], ids=["template", "project"])
def test_hooks_run_gates_and_nothing_else(root: Path) -> None:
    gates = targets(root / "Makefile")
    hooks = re.findall(r"^ +entry: (.*)$", (root / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    called = [entry.removeprefix("make --no-print-directory ") for entry in hooks]
    assert sorted(called) == sorted({*gates} - {"test", "sbom"})


def test_gates_are_the_same_in_the_template_and_in_a_project() -> None:
    assert targets(TEMPLATE / "Makefile") == targets(PROJECT / "Makefile")
    hooks = ".pre-commit-config.yaml"
    assert (TEMPLATE / hooks).read_bytes() == (PROJECT / hooks).read_bytes()


def test_the_baseline_holds_no_secret_that_somebody_accepted(default: Path) -> None:
    baseline = json.loads((default / ".secrets.baseline").read_text(encoding="utf-8"))
    assert baseline["results"] == {}
    locked = dict(pins(default / "requirements/tools.txt"))
    assert baseline["version"] == locked["detect-secrets"], "run make secrets, which writes the new version into it"


def test_the_rules_are_the_ones_that_the_gate_runs(default: Path) -> None:
    assert (default / "tools/celery_rules.py").read_bytes() == RULES.read_bytes()


def test_ruff_has_all_its_security_rules_on(default: Path) -> None:
    for folder in (TEMPLATE, default):
        lint = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
        assert "S" in lint["select"]
        assert not [rule for rule in lint["ignore"] if rule.startswith("S") and not rule.startswith("SIM")]


def test_sonarqube_is_told_where_code_and_tests_are(default: Path) -> None:
    text = (default / "sonar-project.properties").read_text(encoding="utf-8")
    properties = dict(line.split("=", 1) for line in text.splitlines() if line and line[0] != "#")
    assert properties["sonar.projectKey"] == "my-service"
    for name in ("sonar.sources", "sonar.tests"):
        assert all((default / folder).is_dir() for folder in properties[name].split(","))
    assert properties["sonar.qualitygate.wait"] == "true"


# --- hooks, for real


@pytest.fixture(scope="module")
def hooked(tools: Path) -> Iterator[Path]:
    """Generate, ``git init``, ``make hooks``: what the README says, and nothing more."""
    with workshop("gates") as folder:
        project = bake_again(folder)
        for extra in ("tests/hardening", "docs"):  # the template's
            subprocess.run(["rm", "-r", project / extra], check=True)
        for command in (["git", "init", "--quiet"], ["make", "hooks"]):
            done = run(project, *command)
            assert done.returncode == 0, done.stdout
        for name, text in (("user.name", "Test"), ("user.email", "t@example.org"), ("commit.gpgsign", "false")):
            assert run(project, "git", "config", name, text).returncode == 0
        yield project


def commit(project: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Add and commit as a person would."""
    assert run(project, "git", "add", *names).returncode == 0
    return run(project, "git", "commit", "-m", "Try")


@pytest.fixture(scope="module")
def first_commit(hooked: Path) -> Path:
    """Commit a fresh project, which every hook must let pass."""
    done = commit(hooked, "--all")
    assert done.returncode == 0, done.stdout
    assert not run(hooked, "git", "status", "--porcelain").stdout
    return hooked


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("turn", range(max(Counter(gate for gate, *_ in PLANTED).values())))
def test_hooks_stop_a_commit(turn: int, first_commit: Path) -> None:
    """In each turn, one violation for each gate that has another: each hook must find its own."""
    planted = {gate: [row for row in PLANTED if row[0] == gate][turn : turn + 1] for gate, *_ in PLANTED}
    rows = [row for rows in planted.values() for row in rows]
    for _, _, name, text in rows:
        (first_commit / name).parent.mkdir(parents=True, exist_ok=True)
        (first_commit / name).write_text(text, encoding="utf-8")
    names = [row[2] for row in rows]
    done = commit(first_commit, "--force", *names)
    assert run(first_commit, "git", "reset", "--quiet", "--hard").returncode == 0  # some stood there before
    assert done.returncode == 1, done.stdout
    assert run(first_commit, "git", "rev-list", "--count", "HEAD").stdout == "1\n"
    for gate, said, name, _ in rows:
        (output,) = re.findall(rf"^- hook id: {gate}\n((?:(?!- hook id).*\n?)*)", done.stdout, re.MULTILINE) or [""]
        assert said in output, f"{gate} let {name} pass:\n{done.stdout}"
        assert Path(name).name in output


@pytest.mark.slow
def test_a_hook_stops_the_push_of_what_is_known_to_be_vulnerable(
    first_commit: Path, advisories: Service, tmp_path: Path
) -> None:
    run(tmp_path, "git", "init", "--quiet", "--bare", "remote.git")
    push = ["git", "push", str(tmp_path / "remote.git"), "HEAD:main"]
    pin = next(pin for pin in pins(first_commit / "requirements/run.txt") if pin[0] == "celery")
    advisories.plant(*pin)
    done = run(first_commit, *push, **advisories.environment)
    assert done.returncode == 1
    assert f"celery {pin[1]}: GHSA-plan-ted1-0000" in done.stdout
    assert not run(tmp_path / "remote.git", "git", "branch").stdout
    advisories.known.clear()
    done = run(first_commit, *push, **advisories.environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_gates_pass_in_a_fresh_project(first_commit: Path, advisories: Service) -> None:
    done = run(first_commit, "make", "--no-print-directory", "gates", **advisories.environment)
    assert done.returncode == 0, done.stdout
    assert (first_commit / "reports" / "sbom.json").is_file()
    assert not run(first_commit, "git", "status", "--porcelain").stdout
