"""The manifests at work: who reaches whom, accounts, certificates, what starts with them, the page (K8S-1, K8S-4)."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import AuthenticationError

from .kubernetes import (
    BROKERS,
    OVERLAYS,
    Build,
    Manifests,
    Object,
    config_map,
    reachability,
    run,
)
from .kubernetes.redis_pod import RedisPod

# Network


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tree"), [("RabbitMQ", "default"), ("Redis", "redis"), ("managed", "default")])
def test_who_reaches_whom_is_what_was_agreed(
    name: str, tree: str, request: pytest.FixtureRequest, kubernetes_tools: Path, tmp_path: Path
) -> None:
    manifests = reachability.built(name, request.getfixturevalue(tree), tmp_path / "built")
    computed = reachability.edges(kubernetes_tools / "nca", manifests.objects)
    assert reachability.table(computed) == reachability.golden(name), f"now:\n{reachability.table(computed)}"
    own = {name for name, _ in manifests.pods}
    # Said once more in words: who leaves for anywhere, who is reached from elsewhere.
    assert not [pair for pair in computed if reachability.OUTSIDE in pair or {"stranger", "neighbour"} & {*pair}]
    callers = {"worker", "beat", "flower", "client"}
    entered = {(a, b) for a, b in computed if b in own | {"broker-0", "broker-1"}}
    assert {a for a, b in entered if b == "results"} <= callers
    assert {b for _, b in entered} <= {"broker", "broker-0", "broker-1", "results", "flower"}


@pytest.mark.slow
@pytest.mark.parametrize("tree", BROKERS.values())
def test_every_policy_is_needed(
    tree: str, request: pytest.FixtureRequest, kubernetes_tools: Path, tmp_path: Path
) -> None:
    manifests = reachability.built("", request.getfixturevalue(tree), tmp_path / "built")
    before = reachability.edges(kubernetes_tools / "nca", manifests.objects)
    policies = manifests.of("NetworkPolicy")
    assert len(policies) >= 7
    for policy in policies:
        rest = [each for each in manifests.objects if each is not policy]
        assert reachability.edges(kubernetes_tools / "nca", rest) != before, policy["metadata"]["name"]


@pytest.mark.slow
def test_with_cilium_workers_ask_for_names_through_it_alone(
    default: Path, kubernetes_tools: Path, tmp_path: Path
) -> None:
    """A rule for port 53 without names would allow every name: the policy that Cilium filters would have no effect."""
    before, after = (
        reachability.edges(
            kubernetes_tools / "nca", Manifests(default, tmp_path / str(len(more)), "prod", *more).objects
        )
        for more in ((), ("cilium",))
    )
    assert before.pop(("worker", "dns")) == "TCP+UDP 53"
    assert after == before


@pytest.fixture
def listener() -> Iterator[int]:
    """Listen on loopback; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def dropping() -> Iterator[int]:
    """Give a port of loopback that answers nobody, as one behind a firewall: its queue is full."""
    with socket.socket() as server, ExitStack() as waiting:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            caller = waiting.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def test_the_probe_fails_when_what_is_forbidden_works(build: Build, listener: int) -> None:
    for tree, broker in (("default", "broker:5671"), ("redis", "broker:6379")):
        manifests = build(tree, "prod")
        job = manifests.one("CronJob", "firewall-probe")["spec"]["jobTemplate"]["spec"]
        assert job["backoffLimit"] == 0
        (container,) = job["template"]["spec"]["containers"]
        assert container["args"] == ["kubernetes.default.svc:443", broker, "results:6379"]
        program = [sys.executable, *(part.replace("sleep(5)", "sleep(0.1)") for part in container["command"][1:])]
        with socket.create_server(("127.0.0.1", 0)) as other:
            refused = other.getsockname()[1]
        with dropping() as dropped:
            assert run(*program, f"127.0.0.1:{dropped}").returncode == 0
            opened = run(*program, f"127.0.0.1:{dropped}", f"127.0.0.1:{listener}")
        assert (opened.returncode, opened.stderr.count("FORBIDDEN")) == (1, 1), opened
        # Who refuses has been reached: a server that is down says nothing about the network's rules.
        answered = run(*program, f"127.0.0.1:{refused}")
        assert (answered.returncode, answered.stderr.count("FORBIDDEN")) == (1, 1), answered
        assert "cannot tell" in run(*program, "nowhere.invalid:443").stderr
    managed = build("default", "prod", "managed").one("CronJob", "firewall-probe")
    assert len(managed["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]) == 1


# Accounts


def test_cluster_and_local_stack_have_the_same_accounts_and_rights(
    build: Build, default: Path, redis: Path, library: Callable[[str], Any]
) -> None:
    render = library("my_service.hardening.render")
    for tree, project in (("default", default), ("redis", redis)):
        topology = render.Topology.load(project / "topology.toml")
        for overlay in OVERLAYS:
            manifests = build(tree, overlay)
            assert config_map(manifests, "results") == {
                "redis.conf": (project / "deploy/redis/redis.conf").read_text(encoding="utf-8"),
                "users.acl": render.acl_text(topology),
            }
            if tree == "redis":
                assert config_map(manifests, "broker") == {
                    "redis.conf": (project / "deploy/redis/broker.conf").read_text(encoding="utf-8"),
                    "broker.acl": render.broker_acl_text(topology),
                }
            else:
                assert config_map(manifests, "broker") == {
                    "rabbitmq.conf": (project / "deploy/rabbitmq/rabbitmq.conf").read_text(encoding="utf-8"),
                    "definitions.json": render.definitions_text(topology),
                }
            clients = [each for each in manifests.of("Certificate") if "-" in each["metadata"]["name"]]
            names = {each["spec"]["commonName"] for each in clients if each["metadata"]["name"].startswith("tls-")}
            assert names == {"tls CA"} | {topology.account(role) for role in topology.accounts}


def test_the_broker_differs_from_the_local_one_in_addresses_and_paths_alone(build: Build, default: Path) -> None:
    manifests = build("default", "prod")
    changed = dict(line.split(" = ") for line in config_map(manifests, "broker-cluster")["cluster.conf"].splitlines())
    ours = dict(
        re.split(r"\s*=\s*", line, maxsplit=1)
        for line in (default / "deploy/rabbitmq/rabbitmq.conf").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert changed.keys() <= ours.keys()
    assert changed.keys() == {
        *("listeners.ssl.default", "distribution.listener.interface"),
        *("ssl_options.cacertfile", "ssl_options.certfile", "ssl_options.keyfile"),
    }
    spec = manifests.one("RabbitmqCluster", "broker")["spec"]
    assert spec["tls"]["disableNonTLSListeners"] is True
    assert spec["rabbitmq"]["additionalConfig"].strip() == "auth_mechanisms.1 = EXTERNAL"  # of the operator's own two
    mounts = spec["override"]["statefulSet"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    files = {mount["mountPath"]: mount["subPath"] for mount in mounts}
    assert files["/etc/rabbitmq/definitions.json"] == "definitions.json" == ours["load_definitions"].split("/")[-1]
    # Later files win: the operator's end with 90.
    assert sorted(path.split("/")[-1] for path in files if "conf.d" in path) == ["95-service.conf", "96-cluster.conf"]
    plugins = (default / "deploy/rabbitmq/enabled_plugins").read_text(encoding="utf-8")
    assert plugins.strip() == f"[{','.join(spec['rabbitmq']['additionalPlugins'])}]."
    advanced = (default / "deploy/rabbitmq/advanced.config").read_text(encoding="utf-8")
    lines = [line for line in advanced.splitlines() if not line.startswith("%%")]
    assert "".join("".join(lines).split()) == "".join(spec["rabbitmq"]["advancedConfig"].split())
    nodes = config_map(manifests, "broker-cluster")["nodes.config"]
    assert nodes.count("verify_peer") == 2
    assert "{fail_if_no_peer_cert, true}" in nodes


def test_two_authorities_issue_what_each_role_needs(build: Build, library: Callable[[str], Any], default: Path) -> None:
    identities = library("my_service.hardening.identity")
    topology = library("my_service.hardening.topology").Topology.load(default / "topology.toml")
    for overlay, environ in (("dev", "development"), ("prod", "production")):
        manifests = build("default", overlay)
        certificates = {each["metadata"]["name"]: each["spec"] for each in manifests.of("Certificate")}
        issuers = {each["metadata"]["name"]: each["spec"] for each in manifests.of("Issuer")}
        assert issuers["tls"]["ca"]["secretName"] != issuers["signing"]["ca"]["secretName"]
        assert all(certificates[f"{name}-ca"]["isCA"] for name in ("tls", "signing"))
        for role, stanza in topology.accounts.items():
            client, signer = certificates[f"tls-{role}"], certificates[f"signing-{role}"]
            assert (client["issuerRef"]["name"], signer["issuerRef"]["name"]) == ("tls", "signing")
            assert client["usages"] == ["digital signature", "client auth"]
            assert signer["usages"] == ["digital signature"]
            (uri,) = signer["uris"]
            own = identities.Identity.parse(uri)
            assert own.environment == environ
            assert topology.stanza(own, own) == stanza
        namespace = manifests.of("Namespace")[0]["metadata"]["name"]
        for name in ("broker", "results"):
            assert certificates[f"server-{name}"]["dnsNames"][:2] == [name, f"{name}.{namespace}.svc"]
        assert certificates["server-broker"]["dnsNames"][2] == f"*.broker-nodes.{namespace}"


MOUNT = "/run/credentials"


def put(pod: Object, folder: Path, contents: Callable[[str, str], str | None]) -> None:
    """Write a projected volume's files to where its mount would be."""
    (volume,) = (each for each in pod["volumes"] if "projected" in each)
    for source in volume["projected"]["sources"]:
        ((_, given),) = source.items()
        for item in given["items"]:
            content = contents(given["name"], item["key"])
            if content is None:
                assert given.get("optional"), given["name"]
                continue
            file = folder / item["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
            file.chmod(0o600)


@pytest.mark.parametrize("servers", ["servers", "managed"])
@pytest.mark.parametrize("broker", BROKERS)
def test_each_pod_accepts_its_settings(
    build: Build,
    request: pytest.FixtureRequest,
    library: Callable[[str], Any],
    tmp_path: Path,
    broker: str,
    servers: str,
) -> None:
    """With files where they are mounted, and what cert-manager would issue: the service's own checks."""
    tree = BROKERS[broker]
    project: Path = request.getfixturevalue(tree)
    manifests = build(tree, "prod", "flower", *(("managed",) if servers == "managed" else ()))
    account = library("stack.account").Account.unprivileged()
    pki = library("stack.pki").Pki(tmp_path / "pki", account)
    issued: dict[str, Any] = {}
    for each in manifests.of("Certificate"):
        name, spec = each["metadata"]["name"], each["spec"]
        if name.startswith("tls-") and not spec.get("isCA"):
            issued[name] = pki.tls.client(spec["commonName"]), pki.tls.certificate
        elif name.startswith("signing-") and not spec.get("isCA"):
            issued[name] = pki.signing.signer(spec["commonName"], spec["uris"][0]), pki.signing.certificate
        elif name.startswith("server-"):
            issued[name] = pki.tls.server(name, tuple(spec["dnsNames"][:2])), pki.tls.certificate

    def contents(secret: str, key: str) -> str | None:
        if secret in issued:
            pair, ca = issued[secret]
            return str({"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": ca}[key].read_text())
        made = {"results-passwords", "flower-password"}
        made |= {"broker-passwords"} if broker == "redis" or servers == "managed" else set()
        return "a password" if secret in made else None

    for name in ("worker", "beat", "flower"):
        (pod,) = (pod["spec"] for found, pod in manifests.pods if found == name)
        put(pod, tmp_path / name, contents)
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        given = {
            key: value.replace("$(ACCOUNT)", variables["ACCOUNT"]).replace(MOUNT, str(tmp_path / name))
            for key, value in variables.items()
        }
        given |= {"PYTHONPATH": str(project / "src"), "SECURE_CELERY_TOPOLOGY": str(project / "topology.toml")}
        code = (
            "from my_service.settings import Settings; s = Settings(); "
            "s.read_topology(), s.broker_tls, s.result_backend_tls; "
            "s.result_backend_address; s.broker_address; print(*{*s.weakenings}, sep='\\n'); "
            "print(*Settings.model_fields, file=__import__('sys').stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-B", "-c", code], env=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        weaker = {line.partition(":")[0] for line in done.stdout.split("\n") if line}
        assert weaker == (
            {f"{place}_{choice}" for place in ("broker", "result_backend") for choice in ("auth=password", "ca=system")}
            if servers == "managed"
            else set()
        )
        known = {f"SECURE_CELERY_{field.upper()}" for field in done.stderr.split()} | {"ACCOUNT"}
        assert {key for key in variables if "_FLOWER_" not in key} <= known
        if name == "worker":
            assert {"SECURE_CELERY_REPLAY_STORE", "SECURE_CELERY_REPLAY_STORE_PASSWORD_FILE"} <= variables.keys()


@pytest.fixture
def server(
    request: pytest.FixtureRequest, build: Build, library: Callable[[str], Any], tmp_path: Path
) -> Iterator[RedisPod]:
    """The pod of that name, as the cluster would start it."""
    with RedisPod(build("redis", "prod"), request.param, tmp_path, library) as pod:
        yield pod


@pytest.mark.slow
@pytest.mark.parametrize("server", ["results", "broker"], indirect=True)
def test_redis_as_the_cluster_starts_it_knows_each_account_by_its_password(server: RedisPod) -> None:
    """The very commands of the manifest, with other paths, a real server and real logins."""
    server.start()
    assert server.login("my-service.worker", "the worker's own").ping()
    assert server.login("my-service.client", "the client's own").ping()
    for user, password in (
        ("my-service.worker", "the client's own"),
        ("my-service.beat", ""),
        ("my-service.beat", "resetpass"),
        ("default", "the worker's own"),
    ):
        with pytest.raises(AuthenticationError):
            server.login(user, password).ping()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["results", "broker"], indirect=True)
def test_redis_is_started_again_for_its_new_certificate_and_forgets_nothing(server: RedisPod) -> None:
    """It reads a certificate at its start alone, and cert-manager replaces the mounted one every few days."""
    server.start()
    first = server.served()
    worker = server.login("my-service.worker", "the worker's own")
    if server.name == "results":
        worker.set("my-service:celery-task-meta-1", "kept", ex=600)
    else:
        worker.lpush("my-service.default", "kept")
    assert server.alive()
    server.renew()
    assert server.served() == first, "it has read the new one by itself, so that nobody has to start it again"
    assert not server.alive()
    server.stop()
    server.start()
    assert server.alive()
    assert server.served() != first
    kept = (
        worker.get("my-service:celery-task-meta-1") if server.name == "results" else worker.rpop("my-service.default")
    )
    assert kept == b"kept"
