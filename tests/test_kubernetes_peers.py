"""What the programs around the service make of the manifests, from Erlang to Kyverno (K8S-1 to K8S-6, FLW-2)."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import test_kubernetes as general
from .baking import TEMPLATE, bake
from .kubernetes import ALL, BROKERS, Build, Manifests, Object, config_map, reachability

NOT_WORKERS = {"key": "runs-tasks", "operator": "DoesNotExist"}
USAGES = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}


def issue(folder: Path, spec: Object, *more_names: str) -> None:
    """Issue what cert-manager would for this specification, with the keys of its Secret as names of files."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tls CA")]), datetime.now(UTC)

    def sign(subject: x509.Name, owner: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(owner.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
        builder = builder.not_valid_after(now + timedelta(hours=168))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    (folder / "ca.crt").write_bytes(sign(ca_name, ca_key, x509.BasicConstraints(ca=True, path_length=None)))
    certificate = sign(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec["commonName"])]),
        key,
        x509.BasicConstraints(ca=False, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName(name) for name in (*spec["dnsNames"], *more_names)]),
        x509.ExtendedKeyUsage([USAGES[usage] for usage in spec["usages"] if usage in USAGES]),
    )
    (folder / "tls.crt").write_bytes(certificate)
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def free_port() -> int:
    """Give a port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def running(*command: object, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the block ends."""
    process = subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


# RabbitMQ


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_the_brokers_nodes_believe_each_other_by_their_certificate(
    build: Build, library: Callable[[str], Any], tmp_path: Path, overlay: str
) -> None:
    """Two Erlang nodes with the options, the names and the certificate that the cluster gives them."""
    library("stack.install").require_servers("rabbitmq-server")
    manifests = build("default", overlay)
    (certificate,) = (
        each["spec"] for each in manifests.of("Certificate") if each["metadata"]["name"] == "server-broker"
    )
    namespace = manifests.of("Namespace")[0]["metadata"]["name"]
    issue(tmp_path / "tls", certificate)
    nodes = config_map(manifests, "broker-cluster")["nodes.config"].replace("/etc/rabbitmq-tls", str(tmp_path / "tls"))
    exact, count = re.subn(r",\s*\{customize_hostname_check.*?\)\}\]\}", "", nodes, flags=re.DOTALL)
    given = manifests.one("RabbitmqCluster", "broker")["spec"]["rabbitmq"]["envConfig"]
    (flags,) = re.findall(r'^SERVER_ADDITIONAL_ERL_ARGS="(.*)"$', given, re.MULTILINE)
    assert f'RABBITMQ_CTL_ERL_ARGS="{flags}"' in given

    names = [f"broker-server-{number}.broker-nodes.{namespace}" for number in range(2)]
    (tmp_path / "inetrc").write_text(f'{{host, {{127,0,0,1}}, ["{names[0]}", "{names[1]}"]}}.\n{{lookup, [file]}}.\n')
    callers = ("rabbit", "other")
    env = {
        **{"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ERL_INETRC": str(tmp_path / "inetrc")},
        **{"ERL_EPMD_ADDRESS": "127.0.0.1", "ERL_EPMD_PORT": str(free_port())},
    }

    def erlang(number: int, options: Path, code: str) -> list[str]:
        own = [*flags.replace("/etc/rabbitmq/nodes.config", str(options)).split(), "-start_epmd", "false"]
        own += ["-kernel", "inet_dist_use_interface", "{127,0,0,1}", "-setcookie", "of-this-test-alone"]
        return ["erl", "-noinput", "-name", f"{callers[number]}@{names[number]}", *own, "-eval", code]

    def ping(options: Path) -> str:
        code = f"io:format(\"answer=~s~n\", [net_adm:ping('rabbit@{names[0]}')]), halt()."
        done = subprocess.run(erlang(1, options, code), env=env, capture_output=True, text=True, check=False)
        (answer,) = re.findall(r"answer=(\w+)", done.stdout)  # among what Erlang logs
        return str(answer)

    texts = {"given": nodes, "exact": exact}
    for name, text in texts.items():
        (tmp_path / f"{name}.config").write_text(text, encoding="utf-8")
    with (
        running("epmd", "-port", env["ERL_EPMD_PORT"], "-address", "127.0.0.1", env=env),
        running(*erlang(0, tmp_path / "given.config", 'io:format("ready~n").'), env=env) as node,
    ):
        assert node.stdout
        assert "ready" in node.stdout.readline()
        assert ping(tmp_path / "given.config") == "pong"
        assert (count, ping(tmp_path / "exact.config")) == (1, "pang"), "without it no wildcard is believed"
        # Somebody else's certificate of another CA.
        issue(tmp_path / "other", certificate)
        (tmp_path / "other.config").write_text(nodes.replace(str(tmp_path / "tls"), str(tmp_path / "other")))
        assert ping(tmp_path / "other.config") == "pang"


# KEDA


def test_keda_logs_in_with_a_certificate_and_checks_the_brokers(build: Build) -> None:
    """KEDA looks at `ca`, `cert` and `key` only where `tls` is `enable`, which it takes from authentication alone."""
    for overlay in ("dev", "prod"):
        manifests = build("default", overlay, "keda")
        spec = manifests.one("TriggerAuthentication", "broker")["spec"]
        maps = {each["metadata"]["name"]: each["data"] for each in manifests.of("ConfigMap")}
        assert {each["parameter"]: maps[each["name"]][each["key"]] for each in spec["configMapTargetRef"]} == {
            "tls": "enable"
        }
        issued = {each["spec"]["secretName"] for each in manifests.of("Certificate")}
        assert {each["parameter"]: each["key"] for each in spec["secretTargetRef"]} == {
            **{"ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
        }
        assert {each["name"] for each in spec["secretTargetRef"]} == {"tls-monitor"} <= issued
        for scaled in manifests.of("ScaledObject"):
            for trigger in scaled["spec"]["triggers"]:
                assert trigger["authenticationRef"] == {"name": "broker"}
                # With a password in its address KEDA would not log in with the certificate.
                assert re.fullmatch(r"amqps://broker\.[a-z-]+\.svc:5671/my-service", trigger["metadata"]["host"])
    page = (TEMPLATE / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert "KEDA 2.20 or newer" in page


# Cilium


@pytest.mark.parametrize("servers", ["servers", "managed"])
@pytest.mark.parametrize("tree", BROKERS.values())
def test_cilium_lets_workers_resolve_what_they_need_and_nothing_else(build: Build, tree: str, servers: str) -> None:
    for overlay in ("dev", "prod"):
        manifests = build(tree, overlay, "cilium", *(("managed",) if servers == "managed" else ()))
        namespace = manifests.of("Namespace")[0]["metadata"]["name"]
        policy = manifests.one("CiliumNetworkPolicy", "worker-hosts")["spec"]
        (label,) = policy["endpointSelector"]["matchLabels"].items()
        names, hosts = policy["egress"]
        (asked,) = names["toPorts"]
        # Nothing else allows workers to ask: where a policy allows the port, Cilium looks at no name.
        others = manifests.one("NetworkPolicy", "names")["spec"]["podSelector"]
        assert others == {"matchLabels": {"calls-servers": "true"}, "matchExpressions": [NOT_WORKERS]}
        resolved = {each["matchName"] for each in hosts["toFQDNs"]}
        for name, pod in manifests.pods:
            if label not in pod["metadata"]["labels"].items():
                assert "dnsConfig" not in pod["spec"]
                continue
            # A name with a dot is asked for as it is, and not first with each of the cluster's domains behind it.
            assert pod["spec"]["dnsConfig"] == {"options": [{"name": "ndots", "value": "1"}]}, name
            for variable in pod["spec"]["containers"][0]["env"]:
                if match := re.match(r"(?:amqps|rediss)://(?:.*@)?([\w.-]+):\d+", variable["value"]):
                    found = match[1] if "." in match[1] else f"{match[1]}.{namespace}.svc.cluster.local"
                    resolved.add(found)
        assert {each["matchName"] for each in asked["rules"]["dns"]} == resolved
        assert len(resolved) == 3


# Kyverno

GITHUB = "https://github.com/OWNER/REPOSITORY/.github/workflows/release.yml@refs/tags/"
GITLAB = "https://gitlab.com/GROUP/PROJECT//.gitlab-ci.yml@refs/tags/"


@pytest.mark.parametrize(
    ("ci", "kind", "issuer", "identity"),
    [
        # cosign 3 stores a bundle beside the image; Debian's cosign 2 a tag that ends with .sig.
        ("github", "SigstoreBundle", "https://token.actions.githubusercontent.com", GITHUB),
        ("gitlab", "Cosign", "https://gitlab.com", GITLAB),
    ],
)
def test_kyverno_looks_for_what_the_pipeline_signs(
    template: Path, tmp_path: Path, ci: str, kind: str, issuer: str, identity: str
) -> None:
    project = bake(tmp_path / ci, template, {"ci": ci})
    rules = Manifests(project, tmp_path / "built", "prod", "signed-images").one("Policy", "signed-images")["spec"][
        "rules"
    ]
    (image,) = rules[0]["verifyImages"]
    assert image["type"] == kind
    (entry,) = image["attestors"][0]["entries"]
    # In a bundle Kyverno compares `subject` letter by letter: a pattern has to be a regular expression.
    assert entry["keyless"].keys() == {"issuer", "subjectRegExp", "rekor"}
    assert entry["keyless"]["issuer"] == issuer
    pattern = entry["keyless"]["subjectRegExp"]
    assert re.search(pattern, f"{identity}v1.0.0")
    for other in (
        identity.replace("refs/tags", "refs/heads") + "v1.0.0",
        f"{identity.replace('OWNER', 'OTHER').replace('GROUP', 'OTHER')}v1.0.0",
        f"https://other.example.org/?{identity}v1.0.0",
        identity.replace(".yml", "xyml") + "v1.0.0",
        f"{identity}v1.0.0\nx",
        identity,
    ):
        assert not re.search(pattern, other), other
    pipeline = (project / (".github/workflows/release.yml" if ci == "github" else ".gitlab-ci.yml")).read_text("utf-8")
    assert ("cosign-installer@" in pipeline, "install --yes --no-install-recommends buildah cosign" in pipeline) == (
        ci == "github",
        ci == "gitlab",
    )
    assert identity.split("/", 5)[-1].lstrip("/").split("@")[0] in pipeline


# oauth2-proxy


def test_with_oidc_a_hardened_proxy_stands_before_flower(build: Build, oidc: Path) -> None:
    everything = [build("oidc", overlay, *more) for overlay in ("dev", "prod") for more in (("flower",), ALL)]
    general.test_every_overlay_builds_with_every_component(everything)
    general.test_every_pod_is_restricted_and_so_is_its_namespace(everything)
    general.test_every_container_is_read_only_bounded_and_pinned(everything)
    general.test_no_secret_is_in_a_variable_or_in_a_file(everything)
    general.test_pools_survive_a_drain_and_share_out_over_nodes(everything)
    for manifests in everything:
        namespace = manifests.of("Namespace")[0]["metadata"]["name"]
        (names,) = (
            each["spec"]["dnsNames"]
            for each in manifests.of("Certificate")
            if each["metadata"]["name"] == "server-oauth2-proxy"
        )
        assert names == ["oauth2-proxy", f"oauth2-proxy.{namespace}.svc"]
        # It reads the files of deploy/oauth2-proxy, which name what is mounted, and nothing else is.
        files = {path.name: path.read_text("utf-8") for path in (oidc / "deploy/oauth2-proxy").glob("[!k]*")}
        assert config_map(manifests, "oauth2-proxy") == files
        pod = manifests.one("Deployment", "oauth2-proxy")["spec"]["template"]["spec"]
        proxy, _ = pod["containers"]
        mounted = {
            f"/run/secrets/{item['path']}": source["secret"]["name"]
            for volume in pod["volumes"]
            for source in volume.get("projected", {}).get("sources", ())
            for item in source["secret"]["items"]
        }
        assert {mount["mountPath"] for mount in proxy["volumeMounts"]} == {"/etc/oauth2-proxy", "/run/secrets"}
        assert set(mounted) == set(re.findall(r"/run/secrets/[\w.-]+", "".join(files.values())))
        assert proxy["env"] == [{"name": "SSL_CERT_FILE", "value": "/run/secrets/internal-ca.pem"}]
        assert set(mounted.values()) == {"server-oauth2-proxy", "oauth2-proxy", "flower-password"}
        # Where that file looks for Flower it is.
        (upstream,) = yaml.safe_load(files["flower.yaml"])["upstreamConfig"]["upstreams"]
        (port,) = manifests.one("Service", "flower")["spec"]["ports"]
        assert upstream["uri"] == f"https://flower:{port['port']}"


def test_without_kubernetes_the_proxy_s_files_are_as_before(template: Path, tmp_path: Path) -> None:
    project = bake(tmp_path / "no", template, {"flower": "oidc", "kubernetes": "no"})
    assert {path.name for path in (project / "deploy/oauth2-proxy").iterdir()} == {"flower.yaml", "oauth2-proxy.cfg"}
    assert not (project / "deploy/kubernetes").exists()


def test_flower_s_proxy_is_started_again_when_its_certificate_was_renewed(build: Build, tmp_path: Path) -> None:
    """It reads its certificate at its start alone, and its image has no shell: another container compares."""
    pod = build("oidc", "prod", "flower").one("Deployment", "oauth2-proxy")["spec"]["template"]["spec"]
    proxy, watch = pod["containers"]
    assert proxy["livenessProbe"]["httpGet"] == {"path": "/", "port": 4181}
    specification = {"commonName": "oauth2-proxy", "dnsNames": ["oauth2-proxy"], "usages": ["server auth"]}
    issue(tmp_path, specification)
    ports = {"4180": str(free_port()), "4181": str(free_port())}
    command = [part.replace("/run/secrets/oauth2-proxy.pem", str(tmp_path / "tls.crt")) for part in watch["command"]]
    for given, free in ports.items():
        command = [part.replace(given, free) for part in command]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    context.minimum_version = ssl.TLSVersion.TLSv1_3

    def alive() -> int:
        for _ in range(50):
            connection = http.client.HTTPConnection("127.0.0.1", int(ports["4181"]), timeout=10)
            try:
                connection.request("GET", "/")
                return connection.getresponse().status
            except ConnectionRefusedError:
                time.sleep(0.1)
            except http.client.RemoteDisconnected:
                return 0
            finally:
                connection.close()
        return -1

    with running(sys.executable, *command[1:]):
        assert alive() == 0, "nobody serves"
        with socket.create_server(("127.0.0.1", int(ports["4180"]))) as listener:
            serve = threading.Thread(target=answer, args=(context, listener), daemon=True)
            serve.start()
            assert alive() == 200
            issue(tmp_path, specification)
            assert alive() == 503


def answer(context: ssl.SSLContext, listener: socket.socket) -> None:
    """Shake hands with whoever comes, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(1)


@pytest.mark.slow
def test_with_oidc_flower_is_reached_through_its_proxy_alone(
    oidc: Path, kubernetes_tools: Path, tmp_path: Path
) -> None:
    manifests = reachability.built("oidc", oidc, tmp_path / "built")
    computed = reachability.edges(kubernetes_tools / "nca", manifests.objects)
    assert reachability.table(computed) == reachability.golden("oidc"), f"now:\n{reachability.table(computed)}"
    assert {a for a, b in computed if b == "flower"} == {"oauth2-proxy"}
    assert {a for a, b in computed if b == "oauth2-proxy"} == {"proxy"}
    assert {b for a, b in computed if a == "oauth2-proxy"} == {"flower", "dns", "192.0.2.0/24"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "found"),
    [
        (general.checkov, set()),
        # Names in its own configuration, whose secrets are paths of files (`fromFile`, `clientSecretFile`).
        (general.trivy, {("KSV-01010", "oauth2-proxy")}),
    ],
)
def test_no_scanner_finds_more_with_oidc(
    build: Build, kubernetes_tools: Path, tmp_path: Path, tool: Callable[..., set[str]], found: set[tuple[str, str]]
) -> None:
    (tmp_path / "all.yaml").write_text(build("oidc", "prod", *ALL).text, encoding="utf-8")
    findings = tool(kubernetes_tools, tmp_path if tool is general.trivy else tmp_path / "all.yaml")
    rest = {finding for finding in findings if finding.split()[0] not in general.ACCEPTED}
    assert {(finding.split()[0], finding.split("'")[1].rpartition("-")[0]) for finding in rest} == found, rest
