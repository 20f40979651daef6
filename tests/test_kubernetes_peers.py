"""What the programs around the service make of the manifests: Erlang, Redis, KEDA, Kyverno, Cilium, oauth2-proxy."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .baking import TEMPLATE, bake
from .kubernetes import BROKERS, Build, Manifests, Object, config_map

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
        code = f"io:format(\"~s\", [net_adm:ping('rabbit@{names[0]}')]), halt()."
        done = subprocess.run(erlang(1, options, code), env=env, capture_output=True, text=True, check=False)
        return done.stdout[-4:]

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
