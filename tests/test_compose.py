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
            variables["STACK_USER"] = "10001:10001"
            printed = call("podman-compose", "--profile", "client", "run", "--rm", "--no-deps", "client")
            for role in ("client", "worker"):
                assert f"signed by spiffe://my-service.test/development/my-service/{role}" in printed
            reached = engine("exec", "my-service_worker_1", "python3", "-I", "-c", REACH).stdout.split()
            assert reached == [f"broker:{5671 if broker == 'rabbitmq' else 6379}", "backend:6379"]
            assert healthy("my-service_beat_1")
        finally:
            call("make", "down")
        assert not (project / ".stack-compose").exists()
