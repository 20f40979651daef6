"""docs/kubernetes.md: its commands are about what there is, and its picture shows what the policies allow.

Controls: K8S-1.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from .baking import TEMPLATE
from .kubernetes import ALL, COMPONENTS, Build, reachability

PAGE = TEMPLATE / "docs" / "kubernetes.md"


def test_each_command_of_the_page_is_about_what_there_is(build: Build, default: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    manifests = build("default", "prod", *ALL)
    names = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in manifests.objects}
    for path in re.findall(r"(?<![\w/])deploy/[\w./-]*\w", text):
        assert (default / path).exists(), path
    for namespace in re.findall(r"(?:-n|--namespace)[ =](\S+)", commands):
        assert namespace == "my-service"
    named = re.findall(r"\b(deployment|statefulset|cronjob|certificate|rabbitmqcluster|namespace)/([\w-]+)", commands)
    assert len(named) >= 5
    assert {f"{kind}/{name}" for kind, name in named} <= names
    # What pods mount and nobody issues is made on the page.
    issued = {each["spec"]["secretName"] for each in manifests.of("Certificate")}
    mounted = {
        source["secret"]["name"]
        for _, pod in manifests.pods
        for volume in pod["spec"].get("volumes", ())
        for source in volume.get("projected", {}).get("sources", ())
        if "secret" in source and not source["secret"].get("optional")
    }
    assert mounted - issued == {*re.findall(r"create secret generic (\S+)", commands)}
    for component in COMPONENTS:
        assert f"`{component}`" in text, component
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == 10


def test_what_the_page_applies_by_path_lands_in_its_namespace(default: Path) -> None:
    paths = re.findall(r"kubectl apply .*-f (\S+)", PAGE.read_text(encoding="utf-8"))
    assert paths
    for path in paths:
        for each in yaml.safe_load_all((default / path).read_text(encoding="utf-8")):
            found = each["metadata"].get("namespace")
            assert found == (None if each["kind"] == "Namespace" else "my-service"), each["kind"]


def test_the_picture_shows_what_the_policies_allow() -> None:
    (picture,) = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    nodes = {name: label.split(", ") for name, label in re.findall(r'(\w+)\["(.+?)"\]', picture)}
    drawn = {
        (a, b, ports)
        for source, ports, target in re.findall(r"(\w+) -->\|(.+?)\| (\w+)", picture)
        for a in nodes[source]
        for b in nodes[target]
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reachability.golden("RabbitMQ").splitlines()]
    agreed = {
        (re.sub(r"-\d$", "", line[0]), re.sub(r"-\d$", "", column), cell)
        for line in lines[2:]
        for column, cell in zip(lines[0][1:], line[1:], strict=True)
        if cell
    }
    assert drawn == agreed
