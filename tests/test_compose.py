"""compose.yaml: hardened, of the accounts and services that the stack has, and really brought up (CMP-1, NET-3)."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from .baking import bake, bake_again, environment, workshop
from .containers import Engine, until

SERVERS = {"broker", "backend"}
# Of a project: what its stack tells each account, without anything that runs.
DESCRIBE = """
import json
from pathlib import Path
from stack import Stack, compose
stack = Stack(Path.cwd())
accounts = {compose.service(role): stack.topology.account(role) for role in stack.topology.accounts}
pools = [compose.service(pool) for pool in stack.topology.pools]
print(json.dumps({"accounts": accounts, "pools": pools, "vhost": stack.topology.vhost}))
"""
ISSUE = "from pathlib import Path; from stack import Stack, compose; compose.issue(Stack(Path.cwd()))"


@pytest.fixture(params=["default", "redis"])
def tree(request: pytest.FixtureRequest) -> Path:
    baked: Path = request.getfixturevalue(request.param)
    return baked


@pytest.fixture
def document(tree: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((tree / "compose.yaml").read_text(encoding="utf-8")))


def run(tree: Path, code: str) -> str:
    """Run code in a project, with the template's environment."""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def described(tree: Path) -> dict[str, Any]:
    return dict(json.loads(run(tree, DESCRIBE)))


@pytest.mark.slow
def test_it_is_what_the_specification_says(tree: Path) -> None:
    check = [
        str(environment("image") / "bin/check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        str(tree / "compose.yaml"),
    ]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_each_container_is_hardened(document: dict[str, Any]) -> None:
    for name, service in document["services"].items():
        assert (service["read_only"], service["cap_drop"], service["init"]) == (True, ["ALL"], True), name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(service[limit] for limit in ("mem_limit", "cpus", "pids_limit", "ulimits"))
        assert service["user"].startswith("${STACK_USER:-10001:")
        assert not service.keys() & {
            "cap_add",
            "devices",
            "ipc",
            "network_mode",
            "pid",
            "ports",
            "privileged",
            "userns_mode",
        }
        for mount in service.get("tmpfs", ()):
            assert {"noexec", "nosuid", "nodev"} <= set(mount.split(":")[1].split(","))


def test_images_are_pinned_or_built_here_and_are_watched(document: dict[str, Any]) -> None:
    for name, service in document["services"].items():
        assert ("build" in service) != bool(re.search(r":\S+@sha256:[0-9a-f]{64}$", service["image"]))
        # The application's image brings its own check.
        assert name not in SERVERS or service["healthcheck"]["test"][0] == "CMD"


def test_only_two_meet_on_a_network_and_none_leads_out(document: dict[str, Any]) -> None:
    for name, network in document["networks"].items():
        assert network == {"internal": True}
        joined = {service for service, described in document["services"].items() if name in described["networks"]}
        client, _, server = name.rpartition("-")
        assert joined == {client, server}
        assert server in SERVERS


def test_services_are_those_of_the_topology_and_the_local_stack(
    document: dict[str, Any], described: dict[str, Any]
) -> None:
    assert document["services"].keys() == {*SERVERS, *described["pools"], "beat", "client"}
    for name in document["services"].keys() - SERVERS:
        settings = document["services"][name]["environment"]
        broker, backend = (
            urlsplit(settings["SECURE_CELERY_BROKER_URL"]),
            urlsplit(settings["SECURE_CELERY_RESULT_BACKEND"]),
        )
        assert (backend.scheme, backend.username, backend.hostname) == (
            "rediss",
            described["accounts"][name],
            "backend",
        )
        assert broker.hostname == "broker"
        if broker.scheme == "amqps":
            assert broker.path == f"/{described['vhost']}"
        else:
            assert (broker.scheme, broker.username) == ("rediss", described["accounts"][name])
        assert ("SECURE_CELERY_REPLAY_STORE" in settings) == (name in described["pools"])


def test_no_secret_is_a_value(document: dict[str, Any]) -> None:
    for service in document["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|PASSWORD|CERTIFICATE", name):
                assert value.startswith("/run/secrets/")
            assert not urlsplit(value).password


def mounted(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Give what is mounted: what it is by where it is, and whether it can be written to."""
    mounts = [entry.split(":") for entry in service["volumes"]]
    return {target: (source, options != ["ro"]) for source, target, *options in mounts}


def test_what_is_issued_is_what_is_mounted(tmp_path: Path, document: dict[str, Any], tree: Path) -> None:
    """Each service finds its files, all private ones of its own user, and no other service's."""
    broker = "rabbitmq" if (tree / "deploy/rabbitmq").exists() else "redis"
    project = bake(tmp_path, answers={"broker": broker})
    run(project, ISSUE)
    owner = 10001 if os.geteuid() == 0 else os.geteuid()
    folders: dict[str, str] = {}
    for name, service in document["services"].items():
        for target, (source, writable) in mounted(service).items():
            path = project / source
            assert path.exists(), source
            assert writable == (
                source.rpartition("/")[2] in {"broker-data", "beat-data", "output"}
                or (name, target) == ("client", "/srv/uploads")
            )
            assert not writable or path.stat().st_uid == owner
            if target in ("/run/secrets", "/etc/rabbitmq/tls", "/etc/redis/tls"):
                assert folders.setdefault(source, name) == name, "two services share keys"
                keys = [key for key in path.iterdir() if "key" in key.name or key.suffix in (".password", ".acl")]
                assert keys
                assert {(key.stat().st_uid, stat.S_IMODE(key.stat().st_mode)) for key in keys} == {(owner, 0o600)}
        inside = mounted(service)
        for value in service.get("environment", {}).values():
            folder, _, file = str(value).rpartition("/")
            if folder == "/run/secrets":
                assert (project / inside[folder][0] / file).is_file(), value
    authorities = {str(key.relative_to(project)) for key in (project / ".stack-compose").rglob("ca-key.pem")}
    assert authorities
    assert not [source for source in folders if any(key.startswith(f"{source[2:]}/") for key in authorities)]


# -- its user ---------------------------------------------------------------------------------------------------------

OWN_USER = "4711:4712"
#: As a person who is not root.
AS_A_PERSON = """
import os, sys
from pathlib import Path
from stack import Stack, compose
os.geteuid, os.getegid = lambda: 4711, lambda: 4712
compose.run(Stack(Path.cwd()), sys.argv[1])
"""
#: Docker, which does nothing but to write down for whom and what.
DOCKER = """#!/bin/sh
echo "$STACK_USER $*" >>"$0.log"
test "$*" != "compose config --services" || echo worker
test "$*" != info || cat "$0.info"
"""


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    program = tmp_path / "programs" / "docker"
    program.parent.mkdir()
    program.write_text(DOCKER, encoding="ascii")
    program.chmod(0o755)
    program.with_name("docker.info").write_text("Security Options:\n  seccomp\n   Profile: builtin\n", encoding="ascii")
    return program


def compose(project: Path, docker: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Do what ``STACK=compose make`` does."""
    variables = {"PATH": f"{docker.parent}:{os.defpath}"}
    arguments = [sys.executable, "-B", "-c", AS_A_PERSON, command]
    return subprocess.run(arguments, cwd=project, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("own", ["", "COLOUR=blue\n# mine\nSTACK_USERS=two"])
def test_compose_s_own_commands_know_whose_the_keys_are(own: str, tmp_path: Path, docker: Path) -> None:
    """It reads ``.env``, which git ignores; what a person has written there stays."""
    project = bake(tmp_path / "out")
    file = project / ".env"
    if own:
        file.write_text(own, encoding="ascii")
        file.chmod(0o640)
    for _ in range(2):
        done = compose(project, docker, "up")
        assert done.returncode == 0, done.stderr
        assert file.read_text(encoding="ascii") == (own and own + "\n") + f"STACK_USER={OWN_USER}\n"
    assert f"{OWN_USER} compose up --detach\n" in docker.with_name("docker.log").read_text(encoding="ascii")
    assert ".env" in (project / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert compose(project, docker, "down").returncode == 0
    assert file.exists() == bool(own)
    if own:
        assert file.read_text(encoding="ascii") == own + "\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.slow
def test_every_service_is_run_as_the_user_whose_the_keys_are(tmp_path: Path, docker: Path) -> None:
    project = bake(tmp_path / "out")
    assert compose(project, docker, "up").returncode == 0
    docker.with_name("podman").write_text("#!/bin/sh\necho podman version 5.0.0\n", encoding="ascii")
    docker.with_name("podman").chmod(0o755)
    done = subprocess.run(
        [environment("image") / "bin/podman-compose", "--profile", "client", "config"],
        cwd=project,
        env={"PATH": f"{docker.parent}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=False,
    )
    services = yaml.safe_load(done.stdout)["services"]
    assert "client" in services
    assert {service["user"] for service in services.values()} == {OWN_USER}


@pytest.mark.parametrize(
    "said",
    [
        "Security Options:\n  seccomp\n  rootless\n",
        "Security Options:\n  userns\n",
        "  security:\n    rootless: true\n",
    ],
    ids=["docker", "remapped", "podman"],
)
def test_an_engine_that_maps_users_is_refused_before_anything_is_issued(
    said: str, tmp_path: Path, docker: Path
) -> None:
    project = bake(tmp_path / "out")
    docker.with_name("docker.info").write_text(said, encoding="ascii")
    done = compose(project, docker, "up")
    assert done.returncode == 1
    assert re.search(
        "StackFailed: .* maps users, .* could not read their keys: .+, or unset STACK$", done.stderr.strip()
    )
    assert not (project / ".stack-compose").exists()
    assert not (project / ".env").exists()


# -- at work ----------------------------------------------------------------------------------------------------------

SOON = 90  # seconds
STANDS_IN = "localhost/servers:test"
LIMITED = {"ulimits": {"nproc": 4096}}  # what a machine that is a container itself may set
OVERRIDE = {
    "services": {
        "broker": {"image": STANDS_IN, **LIMITED},
        "backend": {"image": STANDS_IN, **LIMITED},
        **dict.fromkeys(("worker", "beat", "client"), LIMITED),
    }
}
RABBITMQ = {
    "command": ["/usr/lib/rabbitmq/bin/rabbitmq-server"],
    "environment": {"PATH": "/usr/lib/rabbitmq/bin:/usr/bin:/bin"},
}
# From inside a worker: what answers, and what is not even there.
REACH = """
import socket
for place in ("broker:5671", "broker:6379", "backend:6379", "beat:1", "client:1", "192.0.2.1:443", "1.1.1.1:53"):
    host, port = place.split(":")
    try:
        socket.create_connection((host, port), 3).close()
        print(place)
    except OSError:
        pass
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_it_comes_up_and_works_and_its_worker_reaches_nothing_else(broker: str) -> None:
    """With Debian's servers of the same generation in place of the images."""
    engine, tools = Engine(), environment("image") / "bin"
    engine.base(STANDS_IN, ("rabbitmq-server", "redis-server", "netcat-openbsd"))
    with workshop(f"compose-{broker}") as folder:
        project = bake_again(folder, {"broker": broker})
        engine("tag", engine.build(project, f"localhost/compose:{broker}"), "localhost/my-service:latest")
        override = json.loads(json.dumps(OVERRIDE))
        override["services"]["broker"] |= RABBITMQ if broker == "rabbitmq" else {}
        (project / "compose.override.yaml").write_text(yaml.safe_dump(override))
        variables = {
            **engine.environment,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "STACK": "compose",
            "DOCKER_HOST": "unix:///none",
        }

        def call(*command: str) -> str:
            done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        def healthy(container: str) -> bool:
            return engine("healthcheck", "run", container, check=False).returncode == 0

        try:
            call("make", "up")
            for name in ("my-service_broker_1", "my-service_backend_1"):  # Docker's Compose waits for them itself
                until(partial(healthy, name), SOON)
            until(lambda: " ready." in engine("logs", "my-service_worker_1").stderr, SOON)
            printed = call("podman-compose", "--profile", "client", "run", "--rm", "--no-deps", "client")
            for role in ("client", "worker"):
                assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed
            reached = engine("exec", "my-service_worker_1", "python3", "-I", "-c", REACH).stdout.split()
            assert reached == [f"broker:{5671 if broker == 'rabbitmq' else 6379}", "backend:6379"]
            assert healthy("my-service_beat_1")
        finally:
            call("make", "down")
        assert not (project / ".stack-compose").exists()
