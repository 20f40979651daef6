"""Builds the manifests of a baked project as ``kubectl apply -k`` does, in every combination that the files offer."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

OVERLAYS = ("dev", "prod")
#: Each is in an overlay already or may be added to it; ``managed`` takes the place of ``servers``.
COMPONENTS = ("flower", "keda", "external-secrets", "cilium", "gvisor", "signed-images", "managed")
#: Kinds whose schema comes with the operator that they are for.
FOREIGN = {
    *("Certificate", "Issuer", "RabbitmqCluster", "ScaledObject", "TriggerAuthentication"),
    *("ExternalSecret", "SecretStore", "CiliumNetworkPolicy", "Policy"),
}


class Manifests:
    """What an overlay with these components more builds to."""

    def __init__(self, project: Path, folder: Path, overlay: str, *components: str) -> None:
        """Copy the project's ``deploy`` to ``folder``, and add the components as docs/kubernetes.md tells people to."""
        self.project, self.overlay = project, overlay
        there = project / "deploy" / "kubernetes" / "components"
        self.components = tuple(component for component in components if (there / component).exists())
        shutil.copytree(project / "deploy", folder / "deploy")
        self.folder = folder / "deploy" / "kubernetes" / "overlays" / overlay
        file = self.folder / "kustomization.yaml"
        text = file.read_text(encoding="utf-8")
        for component in self.components:
            if component == "managed":
                text = re.sub(r"components/servers.*", "components/managed", text)
            elif not re.search(rf"^  - .*/{component}$", text, re.MULTILINE):
                text = text.replace("\ncomponents:\n", f"\ncomponents:\n  - ../../components/{component}\n", 1)
        file.write_text(text, encoding="utf-8")

    @cached_property
    def text(self) -> str:
        """The manifests. A warning fails too."""
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            pytest.fail("kubectl is not installed, and builds the manifests: install kubectl 1.28 or newer")
        done = subprocess.run([kubectl, "kustomize", self.folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout

    @cached_property
    def objects(self) -> list[Object]:
        """The manifests, parsed; each call gives the same ones."""
        return list(yaml.safe_load_all(self.text))

    def of(self, *kinds: str) -> list[Object]:
        """The objects of these kinds."""
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        """The object of this kind and name."""
        (found,) = (each for each in self.of(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def pods(self) -> Iterator[tuple[str, Object]]:
        """Each workload's name and pod template."""
        for each in self.of("Deployment", "StatefulSet"):
            yield each["metadata"]["name"], each["spec"]["template"]
        for each in self.of("CronJob"):
            yield each["metadata"]["name"], each["spec"]["jobTemplate"]["spec"]["template"]

    @property
    def containers(self) -> Iterator[tuple[str, Object]]:
        """Each container of each workload, with where it is."""
        for name, pod in self.pods:
            for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
                yield f"{name}/{container['name']}", container


def config_map(manifests: Manifests, name: str) -> dict[str, str]:
    """The data of the map of that name, whatever hash it ends with."""
    (found,) = (
        each
        for each in manifests.of("ConfigMap")
        if re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", each["metadata"]["name"])
    )
    return dict(found["data"])


#: Fixtures of baked trees, by their broker.
BROKERS = {"rabbitmq": "default", "redis": "redis"}
ALL = tuple(component for component in COMPONENTS if component != "managed")
COMBINATIONS = [*(("prod", component) for component in COMPONENTS), ("prod", *ALL), ("dev", *ALL), ("dev", "managed")]
#: Builds ``(tree, overlay, *components)``.
Build = Callable[..., Manifests]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
