"""The image: really built, without anything an intruder could use, and at work against a stack over TLS (IMG-1)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .baking import PROJECT, bake, environment
from .containers import HARDENED, Engine, until
from .test_project import make

IMAGE, NAME, USER = "localhost/my-service:test", "secure-celery-worker", "10001:10001"
#: Beside what is to go in; none of it may.
PLANTED = (".stack/planted.env", "worker.key", ".git/planted", "src/worker-key.pem")
LIMIT = 150  # MB
HANGS = 90  # seconds
UPLOADS = [f"{number}.png" for number in range(40)]

# Runs inside; what it finds is printed as JSON.
PROBE = """
import json, os, stat
def tried(action):
    try:
        return repr(action())
    except OSError as error:
        return error.strerror
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
files = {}
for folder, names, others in os.walk("/"):
    if folder in ("/proc", "/sys", "/dev"):
        names.clear()
        continue
    for path in (os.path.join(folder, name) for name in names + others):
        files[path] = os.lstat(path)
kept = {path: each for path, each in files.items() if not stat.S_ISLNK(each.st_mode)}
open("/tmp/program", "w").write("#!" + os.path.realpath("/proc/self/exe") + "\\n")
os.chmod("/tmp/program", 0o755)
print(json.dumps({
    "status": status,
    "environment": dict(os.environ),
    "paths": sorted(files),
    "programs": [path for path, each in kept.items() if stat.S_ISREG(each.st_mode) and each.st_mode & 0o111],
    "privileged": [path for path, each in kept.items() if each.st_mode & 0o6000],
    "own": [path for path, each in kept.items() if each.st_uid == os.getuid()],
    "writable": [path for path in kept if os.access(path, os.W_OK)],
    "packages": open("/var/lib/dpkg/status").read(),
    "write": tried(lambda: open("/app/src/x", "w")),
    "execute": tried(lambda: os.execv("/tmp/program", ["/tmp/program"])),
    "root": tried(lambda: os.setuid(0)),
}))
"""


def test_nothing_but_what_the_image_needs_goes_into_a_build(default: Path) -> None:
    lines = [line for line in (default / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (default / "Dockerfile").read_text(), re.MULTILINE)
    assert {line[1:] for line in lines if line.startswith("!")} == set(" ".join(copied).split())


def test_the_base_is_pinned_by_digest_in_one_place(default: Path) -> None:
    text = (default / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE_IMAGE=\S+:\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE_IMAGE}", "scratch"]


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["", "USER 0\n", "RUN sudo true\n"])
def test_linters_find_nothing_but_what_is_planted(planted: str, template: Path, tmp_path: Path) -> None:
    tools, project = environment("image") / "bin", bake(tmp_path / "out", template)
    with (project / "Dockerfile").open("a") as file:
        file.write(planted)
    hadolint = [tools / "hadolint", "--failure-threshold", "style", project / "Dockerfile"]
    trivy = [
        tools / "trivy",
        "config",
        "--quiet",
        "--skip-check-update",
        "--exit-code",
        "1",
        "--cache-dir",
        tmp_path,
        "--skip-dirs",
        project / "deploy" / "kubernetes",  # has tests of its own
        project,
    ]
    found = [
        subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        for command in (hadolint, trivy)
    ]
    printed = "".join(done.stdout + done.stderr for done in found)
    assert any(done.returncode for done in found) == bool(planted), printed


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def image(engine: Engine, project: Path) -> str:
    """Build it, from a tree that has keys, history and environments beside what is to go in."""
    make(project, "setup")
    made = [folder for folder in (project / ".stack", project / ".git") if not folder.exists()]
    for planted in PLANTED:
        (project / planted).parent.mkdir(exist_ok=True)
        (project / planted).write_text("PLANTED-SECRET")
    try:
        return engine.build(project, IMAGE)
    finally:
        for planted in PLANTED:
            (project / planted).unlink()
        for folder in made:
            folder.rmdir()


@pytest.fixture(scope="module")
def inside(engine: Engine, image: str) -> dict[str, Any]:
    """What a process in the container sees."""
    done = engine("run", "--rm", "--network", "none", *HARDENED, "--entrypoint", "python3", image, "-c", PROBE)
    return dict(json.loads(done.stdout))


@pytest.mark.exhaustive
def test_the_process_has_no_rights(inside: dict[str, Any]) -> None:
    status = inside["status"]
    assert status["Uid"].split() == ["10001"] * 4
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert inside["root"] == "Operation not permitted"


@pytest.mark.exhaustive
def test_the_image_has_nothing_to_run_but_python(inside: dict[str, Any]) -> None:
    linker, python = sorted(inside["programs"], key=lambda path: Path(path).name)
    assert Path(linker).name.startswith("ld-linux")
    assert re.fullmatch(r"/usr/(local/)?bin/python3\.\d+", python)
    assert not inside["privileged"]
    names = {Path(path).name for path in inside["paths"]}
    assert not names & set("sh bash dash busybox apt-get gcc cc perl pip ensurepip curl".split())


@pytest.mark.exhaustive
def test_the_process_can_change_nothing(inside: dict[str, Any]) -> None:
    assert not inside["own"]
    assert inside["writable"] == ["/tmp"]
    assert inside["write"] == "Read-only file system"
    assert inside["execute"] == "Permission denied"


@pytest.mark.exhaustive
def test_scanners_find_the_packages_that_are_there(inside: dict[str, Any]) -> None:
    packages = set(re.findall(r"^Package: (\S+)$", inside["packages"], re.MULTILINE))
    assert {"libc6", "libssl3t64"} <= packages
    assert not packages & {"dash", "perl-base", "python3-pip", "apt", "dpkg", "coreutils"}
    assert any(re.search(r"/celery-[0-9.]+\.dist-info/METADATA$", path) for path in inside["paths"])


@pytest.mark.exhaustive
def test_no_secret_is_in_a_layer_or_the_environment(
    engine: Engine, image: str, inside: dict[str, Any], tmp_path: Path
) -> None:
    described = json.loads(engine("image", "inspect", image).stdout)[0]
    assert described["User"] == USER
    for variables in (dict(each.split("=", 1) for each in described["Config"]["Env"]), inside["environment"]):
        assert not [
            name
            for name in variables
            if re.search(r"KEY|PASSWORD|TOKEN|SECRET(?!_?URE)", name.replace("SECURE_CELERY", ""))
        ]
    engine("save", "--output", tmp_path / "image.tar", image)
    found = []
    with tarfile.open(tmp_path / "image.tar") as saved:
        for layer in (member for member in saved if member.name.endswith(".tar") and member.isfile()):
            with tarfile.open(fileobj=saved.extractfile(layer)) as files:
                for file in filter(tarfile.TarInfo.isfile, files):
                    content = files.extractfile(file)
                    assert content is not None
                    if re.search(
                        rb"PLANTED-SECRET|-----BEGIN [A-Z ]*PRIVATE KEY-----\n[A-Za-z0-9+/=]{40}", content.read()
                    ):
                        found.append(file.name)
    assert not found


@pytest.mark.exhaustive
def test_the_image_is_small(engine: Engine, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = json.loads(engine("image", "inspect", image).stdout)[0]["Size"] / 1e6
    with capsys.disabled():
        print(f"\nthe image has {size:.0f} MB")
    assert size < LIMIT


# -- at work ----------------------------------------------------------------------------------------------------------

CLIENT = """
import json, sys
from my_service.app import app
from my_service.tasks.thumbnail import thumbnail
from PIL import Image
names = sys.argv[1:]
for number, name in enumerate(names):
    path = app.hardening.settings.upload_folder / name
    Image.linear_gradient("L").resize((2000 + number, 2000)).save(path)
    path.chmod(0o644)
sent = [thumbnail.delay(name) for name in names]
print("sent", flush=True)
for result in sent:
    print(json.dumps(result.get(timeout=180)), flush=True)
"""


class Worker:
    """The containerised worker of a stack whose servers are on this machine."""

    def __init__(self, engine: Engine, project: Path, image: str) -> None:
        self.engine, self.stack = engine, project / ".stack"
        self.options: list[str] = []
        lines = (self.stack / "worker.env").read_text().splitlines()
        for name, value in (line.split("=", 1) for line in lines if "TOPOLOGY" not in line):
            self.options += ["--env", f"{name}={value}"]
        secrets = project.parent / "secrets"  # a copy that belongs to the container's user
        shutil.rmtree(secrets, ignore_errors=True)
        secrets.mkdir(mode=0o711)
        for name, mode in (("pki", "ro"), ("redis", "ro"), ("uploads", "ro"), ("output", "rw")):
            source = self.stack / name
            if name in ("pki", "redis"):
                source = shutil.copytree(source, secrets / name)
            for path in (source, *source.rglob("*")):
                os.chown(path, *map(int, USER.split(":")))
            self.options += ["--volume", f"{source}:{self.stack / name}:{mode}"]
        self.image = image

    def start(self) -> None:
        self.engine("rm", "--force", NAME, check=False)
        command = ["worker", "--loglevel", "INFO", "--concurrency", "2"]
        self.engine(
            "run", "--detach", "--name", NAME, "--network", "host", *HARDENED, *self.options, self.image, *command
        )
        until(lambda: " ready." in self.log())

    def log(self) -> str:
        done = self.engine("logs", NAME)
        return done.stdout + done.stderr

    def healthy(self) -> bool:
        return self.engine("healthcheck", "run", NAME, check=False).returncode == 0

    def inside(self, code: str) -> str:
        return self.engine("exec", NAME, "python3", "-I", "-c", code).stdout.strip()

    def ended(self) -> bool:
        return self.state("Running") == "false"

    def state(self, what: str) -> str:
        return self.engine("inspect", "--format", f"{{{{.State.{what}}}}}", NAME).stdout.strip()


@pytest.fixture
def worker(engine: Engine, image: str, project: Path) -> Iterator[Worker]:
    up = "from pathlib import Path; from stack import Stack; Stack(Path.cwd()).up(worker=False)"
    subprocess.run([".venv/bin/python", "-c", up], cwd=project, check=True)
    try:
        started = Worker(engine, project, image)
        started.start()
        yield started
    finally:
        engine("rm", "--force", NAME, check=False)
        make(project, "down")


def client(project: Path, *names: str) -> subprocess.Popen[str]:
    """Send a task for each upload, from outside."""
    lines = (project / ".stack/client.env").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in lines)
    command = [".venv/bin/python", "-c", CLIENT, *names]
    return subprocess.Popen(
        command, cwd=project, env={**variables, "PYTHONPATH": "src"}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_a_worker_that_ends_loses_nothing(worker: Worker, project: Path, number: str) -> None:
    """Neither when it is asked to end nor when it is killed, with tasks that run and tasks that wait."""
    sender = client(project, *UPLOADS)
    assert sender.stdout is not None
    assert sender.stdout.readline() == "sent\n"
    first = json.loads(sender.stdout.readline())
    assert (project / ".stack/output" / first["thumbnail"]).exists()
    worker.engine("kill", "--signal", number, NAME)
    until(worker.ended)
    assert worker.state("ExitCode") == {"TERM": "0", "KILL": "137"}[number]
    before = worker.log().count("succeeded in")
    assert before < len(UPLOADS), "it had done everything when it was to end"
    worker.start()
    others = [json.loads(line) for line in sender.stdout]
    assert sender.wait() == 0
    assert len(others) == len(UPLOADS) - 1
    assert "succeeded in" in worker.log()


@pytest.mark.exhaustive
def test_health_goes_bad_when_the_worker_hangs_and_not_when_its_broker_is_away(worker: Worker, project: Path) -> None:
    assert worker.healthy()
    away = "import os; print(os.stat('/tmp/heartbeat').st_mtime)"
    up = "from pathlib import Path; from stack import Stack\nwith Stack(Path.cwd()).without('rabbitmq'): input()"
    without = subprocess.Popen([".venv/bin/python", "-c", up], cwd=project, stdin=subprocess.PIPE)
    try:
        until(lambda: worker.inside(away) == "0.0")  # it says that it waits, for however long it will take
        assert worker.healthy()
    finally:
        without.communicate(b"\n")
    until(lambda: worker.inside(away) != "0.0", HANGS)
    assert worker.healthy()
    worker.engine("kill", "--signal", "STOP", NAME)
    until(lambda: not worker.healthy(), HANGS)
    worker.engine("kill", "--signal", "CONT", NAME)
    until(worker.healthy)
    worker.inside("import os; os.remove('/tmp/heartbeat')")
    assert not worker.healthy()


def test_the_projects_documentation_runs_it_as_it_is_tested() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    for option in ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs /tmp:rw,noexec"):
        assert option in text
