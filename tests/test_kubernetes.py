"""The manifests: built as ``kubectl apply -k`` builds them, validated, and judged by their effects (K8S-1 to K8S-6).

What is slow needs the tools of ``requirements/tools/kubernetes.txt``, which the tests install by themselves.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .baking import bake
from .kubernetes import (
    ALL,
    BROKERS,
    COMBINATIONS,
    COMPONENTS,
    FOREIGN,
    Build,
    Manifests,
    Object,
    run,
)
from .kubernetes.restricted import violations

ACCEPTED = tomllib.loads(Path(__file__).parent.joinpath("kubernetes", "accepted.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(build: Build) -> list[Manifests]:
    """Every combination that people can choose, with either broker, and with the longest names."""
    choices = [("prod",), ("dev",), *COMBINATIONS]
    return [build(tree, *choice) for tree in BROKERS.values() for choice in choices] + [build("long", "prod", *ALL)]


# Building


def test_every_overlay_builds_with_every_component(everything: list[Manifests]) -> None:
    for manifests in everything:
        namespace = manifests.of("Namespace")[0]["metadata"]["name"]
        names = [(each["kind"], each["metadata"]["name"]) for each in manifests.objects]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", name) for _, name in names)
        for each in manifests.objects:
            assert each["metadata"].get("namespace") == (
                None if each["kind"] in ("Namespace", "RuntimeClass") else namespace
            )


def test_every_component_changes_something(build: Build) -> None:
    for tree in BROKERS.values():
        for component in COMPONENTS:
            if (tree, component) == ("redis", "keda"):
                assert "keda" not in "".join(str(path) for path in build(tree, "prod").folder.parents[1].rglob("*"))
                continue
            assert build(tree, "prod", component).text != build(tree, "prod").text, component


def test_what_is_rendered_fits_the_topology(default: Path, long: Path, redis: Path) -> None:
    for tree in (default, long, redis):
        done = subprocess.run(
            [sys.executable, "-B", "tools/kubernetes.py", "--check"],
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_pool_queue_and_caller_get_all_that_they_need(default: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(default, tmp_path / "my-service"))
    topology = project / "topology.toml"
    topology.write_text(
        topology.read_text(encoding="utf-8") + '\n[queues.slow]\n\n[pools.night]\nqueues = ["slow"]\nsends = []\n'
        '\n[callers.web]\nqueues = ["slow"]\nsends = ["my_service.tasks.*"]\n',
        encoding="utf-8",
    )
    stale = subprocess.run([sys.executable, "-B", "tools/kubernetes.py", "--check"], cwd=project, check=False)
    assert stale.returncode == 1
    subprocess.run([sys.executable, "-B", "tools/kubernetes.py"], cwd=project, check=True)
    manifests = Manifests(project, tmp_path / "built", "prod", *ALL)
    night = manifests.one("Deployment", "night")
    assert [violation for _, pod in manifests.pods for violation in violations(pod)] == []
    assert manifests.one("PodDisruptionBudget", "night")
    assert manifests.one("ScaledObject", "night")["spec"]["triggers"][0]["metadata"]["queueName"] == "my-service.slow"
    assert night["spec"]["template"]["spec"]["runtimeClassName"] == "gvisor"
    assert manifests.one("Certificate", "signing-night")["spec"]["uris"] == [
        "spiffe://my-service.internal/production/my-service/worker/night"
    ]
    assert manifests.one("Certificate", "signing-web")["spec"]["uris"] == [
        "spiffe://my-service.internal/production/my-service/client/web"
    ]


def test_without_kubernetes_nothing_of_it_is_left(template: Path, tmp_path: Path) -> None:
    for broker in BROKERS:
        project = bake(tmp_path / broker, template, {"broker": broker, "kubernetes": "no"})
        assert not [path for path in project.rglob("*") if re.search("kustomiz|kubernetes", path.name)]
        assert "kubernetes" not in (project / "Makefile").read_text(encoding="utf-8")


# Validators


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_everything_fits_the_api_strictly(
    everything: list[Manifests], kubernetes_tools: Path, tmp_path: Path, version: str
) -> None:
    """No unknown field, no wrong type; of other kinds only those that an operator brings."""
    files = []
    for number, manifests in enumerate(everything):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(manifests.text, encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(everything[0].text.replace("readOnlyRootFilesystem", "readOnlyRootFileSystem"), encoding="utf-8")
    validate = [kubernetes_tools / "kubernetes-validate", "--strict", "-k", version]
    assert run(*validate, wrong).returncode != 0
    done = run(*validate, *files)
    said = (done.stdout + done.stderr).splitlines()
    unknown = {match[1] for line in said if (match := re.search(r"Couldn't find schema for kind (\w+) with", line))}
    assert done.returncode == 0, done.stdout + done.stderr
    assert unknown == FOREIGN
    assert not [line for line in said if not line.startswith("INFO") and "Couldn't find schema" not in line]


def checkov(kubernetes_tools: Path, *files: Path) -> set[str]:
    """What checkov finds, of all its checks."""
    options = ["--skip-download", "--framework", "kubernetes", "--output", "json", "--soft-fail"]
    done = run(kubernetes_tools / "checkov", *options, *(part for file in files for part in ("-f", str(file))))
    results = json.loads(done.stdout)
    assert results["summary"]["passed"] > 0, done.stdout
    assert results["summary"]["skipped"] == results["summary"]["parsing_errors"] == 0
    return {f"{each['check_id']} {each['resource']}" for each in results["results"]["failed_checks"]}


def trivy(kubernetes_tools: Path, folder: Path) -> set[str]:
    """What Trivy finds, at every severity."""
    done = run(kubernetes_tools / "trivy", "config", "--skip-check-update", "--quiet", "--format", "json", folder)
    results = json.loads(done.stdout)["Results"]
    assert results
    found = [each for result in results for each in result.get("Misconfigurations", ())]
    return {f"{each['ID']} {each['Message']}" for each in found}


@pytest.mark.slow
@pytest.mark.parametrize("tool", [checkov, trivy])
def test_no_scanner_finds_what_is_not_accepted(
    build: Build, kubernetes_tools: Path, tmp_path: Path, tool: Callable[..., set[str]]
) -> None:
    texts = [build(tree, *choice).text for tree in BROKERS.values() for choice in (("prod", *ALL), ("dev", "managed"))]
    # Found, so that finding nothing says something.
    weak = texts[0].replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", 1)
    found: list[set[str]] = []
    for number, written in enumerate((texts, [weak])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, text in enumerate(written):
            (folder / f"{place}.yaml").write_text(text, encoding="utf-8")
        found.append(
            tool(kubernetes_tools, folder) if tool is trivy else tool(kubernetes_tools, *sorted(folder.iterdir()))
        )
    assert not {finding for finding in found[0] if finding.split()[0] not in ACCEPTED}
    assert {finding for finding in found[1] if finding.split()[0] not in ACCEPTED}
    if tool is trivy:
        assert {finding.split()[0] for finding in found[0]} == set(ACCEPTED), "accepted, and not found any more"
    assert all(acceptance["reason"] for acceptance in ACCEPTED.values())


# Pods


def test_every_pod_is_restricted_and_so_is_its_namespace(everything: list[Manifests]) -> None:
    for manifests in everything:
        assert [f"{name}: {each}" for name, pod in manifests.pods for each in violations(pod)] == []
        labels = manifests.of("Namespace")[0]["metadata"]["labels"]
        for mode in ("enforce", "audit", "warn"):
            assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
            assert re.fullmatch(r"v1\.\d+", labels[f"pod-security.kubernetes.io/{mode}-version"])


WEAKENED: list[Callable[[Any, Any], Any]] = [
    lambda pod, container: pod.update(hostNetwork=True),
    lambda pod, container: pod.setdefault("volumes", []).append({"name": "host", "hostPath": {"path": "/"}}),
    lambda pod, container: pod["securityContext"].pop("seccompProfile"),
    lambda pod, container: pod["securityContext"].pop("runAsNonRoot"),
    lambda pod, container: pod["securityContext"].update(runAsUser=0),
    lambda pod, container: pod["securityContext"].update(sysctls=[{"name": "kernel.core_pattern", "value": "x"}]),
    lambda pod, container: container["securityContext"].pop("allowPrivilegeEscalation"),
    lambda pod, container: container["securityContext"].update(privileged=True),
    lambda pod, container: container["securityContext"].update(procMount="Unmasked"),
    lambda pod, container: container["securityContext"]["capabilities"].update(add=["NET_RAW"]),
    lambda pod, container: container["securityContext"]["capabilities"].pop("drop"),
    lambda pod, container: container.update(ports=[{"containerPort": 1, "hostPort": 1}]),
    lambda pod, container: container.update(livenessProbe={"tcpSocket": {"port": 1, "host": "10.0.0.1"}}),
]


@pytest.mark.parametrize("weaken", WEAKENED)
def test_a_weaker_pod_is_seen(build: Build, weaken: Callable[[Any, Any], Any]) -> None:
    for _, pod in build("default", "prod").pods:
        weaker = copy.deepcopy(pod)
        weaken(weaker["spec"], weaker["spec"]["containers"][0])
        assert list(violations(weaker))


def test_every_container_is_read_only_bounded_and_pinned(everything: list[Manifests]) -> None:
    for manifests in everything:
        for name, container in manifests.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            for bound in ("requests", "limits"):
                assert container["resources"][bound].keys() == {"cpu", "memory", "ephemeral-storage"}, name
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), name
        for name, pod in manifests.pods:
            assert pod["spec"]["automountServiceAccountToken"] is False, name
            assert pod["spec"]["serviceAccountName"] != "default", name
            assert pod["spec"]["enableServiceLinks"] is False, name
        assert all(each["automountServiceAccountToken"] is False for each in manifests.of("ServiceAccount"))
        for each in manifests.of("RabbitmqCluster"):
            assert re.search(r"@sha256:[0-9a-f]{64}$", each["spec"]["image"])


def test_no_secret_is_in_a_variable_or_in_a_file(everything: list[Manifests]) -> None:
    for manifests in everything:
        assert not manifests.of("Secret")
        for name, container in manifests.containers:
            assert "envFrom" not in container, name
            for variable in container.get("env", ()):
                assert variable.keys() == {"name", "value"}, name
                assert not re.search("PASSWORD$|SECRET|TOKEN", variable["name"]), name
        for name, pod in manifests.pods:
            secret = {
                volume["name"] for volume in pod["spec"].get("volumes", ()) if {"secret", "projected"} & volume.keys()
            }
            for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
                for mount in container.get("volumeMounts", ()):
                    assert mount["name"] not in secret or mount["readOnly"], name
                    assert "subPath" not in mount, name  # a renewed certificate would never arrive


def test_no_pod_reads_the_secrets_of_another_role(everything: list[Manifests]) -> None:
    for manifests in everything:
        for name, pod in manifests.pods:
            role = pod["spec"]["serviceAccountName"]
            for volume in pod["spec"].get("volumes", ()):
                for source in volume.get("projected", {}).get("sources", ()):
                    if "secret" not in source:
                        continue
                    secret, keys = source["secret"]["name"], {item["key"] for item in source["secret"]["items"]}
                    own = {f"tls-{role}", f"signing-{role}", "server-flower", "flower-password"}
                    assert secret in own or keys == {role}, name
                    assert not secret.endswith("-ca"), name


def test_workers_end_before_they_are_killed(build: Build, default: Path) -> None:
    source = (default / "src/my_service/hardening/harden.py").read_text(encoding="utf-8")
    (longest,) = re.findall(r'"task_time_limit": (\d+)', source)
    for each in build("default", "prod").of("Deployment"):
        if each["metadata"]["labels"].get("runs-tasks"):
            assert each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= int(longest) + 30


def test_probes_run_what_the_image_holds(build: Build, default: Path) -> None:
    probed = 0
    for pod in build("default", "prod").of("Deployment"):
        for container in pod["spec"]["template"]["spec"]["containers"]:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                *_, program = container[kind]["exec"]["command"]
                assert (default / Path(program).relative_to("/app")).is_file()
                probed += 1
            assert "SECURE_CELERY_HEARTBEAT_FILE=" in (default / "Dockerfile").read_text(encoding="utf-8")
    assert probed


def test_pools_survive_a_drain_and_share_out_over_nodes(everything: list[Manifests]) -> None:
    for manifests in everything:
        for each in manifests.of("Deployment"):
            spec, labels = each["spec"]["template"]["spec"], each["spec"]["selector"]["matchLabels"]
            assert spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels
            if each["metadata"]["labels"].get("runs-tasks"):
                budget = manifests.one("PodDisruptionBudget", each["metadata"]["name"])
                assert budget["spec"]["selector"]["matchLabels"] == labels
                scalers = manifests.of("HorizontalPodAutoscaler", "ScaledObject")
                assert [s["spec"]["scaleTargetRef"]["name"] for s in scalers] == [each["metadata"]["name"]]
                assert "replicas" not in each["spec"]  # or each `apply` would undo the scaling


def quantity(text: str) -> float:
    """A quantity in cores, bytes or pieces."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * units.get(unit, 1)


def test_the_quota_holds_everything_at_its_largest(build: Build) -> None:
    for tree in BROKERS.values():
        manifests = build(tree, "prod", *(c for c in ALL if c != "keda"))
        (quota,) = (each["spec"]["hard"] for each in manifests.of("ResourceQuota"))
        (limit,) = (each["spec"]["limits"][0]["max"] for each in manifests.of("LimitRange"))
        for what in ("requests", "limits"):
            for resource in ("cpu", "memory", "ephemeral-storage"):
                used = 0.0
                for each in manifests.of("Deployment", "StatefulSet", "CronJob", "RabbitmqCluster"):
                    spec = each["spec"]
                    scaler = [
                        h["spec"]["maxReplicas"]
                        for h in manifests.of("HorizontalPodAutoscaler")
                        if h["metadata"]["name"] == each["metadata"]["name"]
                    ]
                    count = scaler[0] + 1 if scaler else spec.get("replicas", 1)  # one more while it is rolled out
                    pod = spec.get("jobTemplate", {"spec": spec})["spec"].get("template", {"spec": None})["spec"]
                    for container in pod["containers"] if pod else [spec]:
                        assert quantity(container["resources"]["limits"][resource]) <= quantity(limit[resource])
                        used += count * quantity(container["resources"][what][resource])
                assert used <= quantity(quota[f"{what}.{resource}"]), (what, resource)


# Rights


def may(rules: list[Object], verb: str, resource: str, group: str = "") -> bool:
    """As `kubectl auth can-i` says."""
    return any(
        {verb, "*"} & {*rule["verbs"]}
        and {resource, "*"} & {*rule["resources"]}
        and {group, "*"} & {*rule["apiGroups"]}
        for rule in rules
    )


def test_operators_look_restart_and_scale_and_nobody_else_may_anything(everything: list[Manifests]) -> None:
    for manifests in everything:
        (role,), (binding,) = manifests.of("Role", "ClusterRole"), manifests.of("RoleBinding", "ClusterRoleBinding")
        assert (role["kind"], binding["roleRef"]["name"]) == ("Role", role["metadata"]["name"])
        assert [subject["kind"] for subject in binding["subjects"]] == ["Group"]
        rules = role["rules"]
        assert "*" not in json.dumps(rules)
        for allowed in (
            ("get", "pods"),
            ("get", "pods/log"),
            ("create", "pods/eviction"),
            ("list", "deployments", "apps"),
            ("patch", "deployments/scale", "apps"),
            ("list", "jobs", "batch"),
        ):
            assert may(rules, *allowed), allowed
        for resource in (
            "secrets",
            "configmaps",
            "serviceaccounts/token",
            "pods/exec",
            "pods/attach",
            "pods/ephemeralcontainers",
        ):
            assert not any(may(rules, verb, resource) for verb in ("get", "list", "watch", "create", "update", "patch"))
        writes = {
            (verb, resource)
            for rule in rules
            for verb in rule["verbs"]
            for resource in rule["resources"]
            if verb not in ("get", "list", "watch")
        }
        assert writes == {("patch", "deployments/scale"), ("create", "pods/eviction")}
