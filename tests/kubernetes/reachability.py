"""Who reaches whom: ``network-config-analyzer`` computes it from the policies, pod by pod and port by port.

``python -m tests.kubernetes.reachability`` writes ``reachability.md`` anew, for people to read before they commit it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from ..baking import bake, environment
from . import Manifests, Object

GOLDEN = Path(__file__).with_name("reachability.md")
OUTSIDE = "outside"
_NAME = "kubernetes.io/metadata.name"
_EDGE = re.compile(r'^\t"(.+)" -> "(.+)" \[label="(.*?)"', re.MULTILINE)
_NODE = re.compile(r'^\t"(.+)" \[label=', re.MULTILINE)
_NOTE = {
    "RabbitMQ": "prod, with flower and keda",
    "Redis": "prod, with flower",
    "managed": "prod, with flower, and a provider's servers in 192.0.2.0/24",
    "oidc": "prod, with flower behind its own proxy, and an identity provider in 192.0.2.0/24",
}

Edges = dict[tuple[str, str], str]


def _pod(name: str, namespace: str, **labels: str) -> Object:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}}


def cluster(own: str) -> list[Object]:
    """Who else is there: pods of the cluster's, of an operator's, and two that nobody expects."""
    pods = [
        _pod("dns", "kube-system", **{"k8s-app": "kube-dns"}),
        _pod("prometheus", "monitoring", **{"app.kubernetes.io/name": "prometheus"}),
        _pod("proxy", "ingress-nginx", **{"app.kubernetes.io/name": "ingress-nginx"}),
        _pod("keda", "keda", app="keda-operator"),
        _pod("neighbour", "elsewhere", **{"calls-servers": "true"}),
        _pod("client", own, **{"calls-servers": "true"}),
        _pod("stranger", own, app="stranger"),
    ]
    namespaces = sorted({pod["metadata"]["namespace"] for pod in pods} - {own})
    return [
        *(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {_NAME: name}}}
            for name in namespaces
        ),
        *pods,
    ]


def edges(analyzer: Path, objects: Iterable[Object]) -> Edges:
    """Compute who reaches whom, as (from, to) -> ports."""
    own = [each for each in objects if not each["kind"].startswith(("Custom", "Cilium", "Policy"))]
    (namespace,) = (each["metadata"]["name"] for each in own if each["kind"] == "Namespace")
    for each in own:
        if each["kind"] == "Namespace":
            each["metadata"].setdefault("labels", {})[_NAME] = namespace
    brokers = [
        _pod(f"broker-{number}", namespace, **{"app.kubernetes.io/name": "broker"})
        for each in own
        if each["kind"] == "RabbitmqCluster"
        for number in range(2)
    ]
    native = [each for each in own if each["apiVersion"].split("/")[0] in ("v1", "apps", "batch", "networking.k8s.io")]
    with tempfile.TemporaryDirectory() as folder:
        # Namespaces first: the analyzer reads in order.
        everything = sorted([*native, *cluster(namespace), *brokers], key=lambda each: each["kind"] != "Namespace")
        Path(folder, "all.yaml").write_text(yaml.safe_dump_all(everything), encoding="utf-8")
        graph = Path(folder, "graph.dot")
        command = [str(analyzer), "--connectivity", "-r", folder, "-o", "dot", "-f", str(graph)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert graph.exists(), done.stdout + done.stderr
        text = graph.read_text(encoding="utf-8")

    def short(node: str) -> str:
        return OUTSIDE if node == "0.0.0.0/0" else node.rpartition("/")[2].partition("(")[0] if "(" in node else node

    theirs = {short(node) for node in _NODE.findall(text) if f"{namespace}/" not in node}
    found = {(short(a), short(b)): ports for a, b, ports in _EDGE.findall(text)}
    # What others do among themselves is theirs.
    return {pair: ports for pair, ports in found.items() if not set(pair) <= theirs}


def table(found: Edges) -> str:
    """Show as a table: a row for who calls, a column for who is called."""
    rows = sorted({a for a, _ in found})
    columns = sorted({b for _, b in found})
    lines = [["from \\ to", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(found.get((row, column), "") for column in columns)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )


def golden(name: str) -> str:
    """The table that was agreed on."""
    (section,) = re.findall(rf"^## {name}:.*\n\n((?:\|.*\n)+)", GOLDEN.read_text(encoding="utf-8"), re.MULTILINE)
    return str(section)


def document(tables: dict[str, str]) -> str:
    """All tables, for people."""
    sections = "".join(f"\n## {name}: {_NOTE[name]}\n\n{text}" for name, text in tables.items())
    return f"""# Who reaches whom

Computed from the network policies, and compared by a test. Who has no row reaches nobody, and who has no column is
reached by nobody: `stranger` (a pod of the namespace that no policy names), `neighbour` (elsewhere, with the label of a
caller), and `outside`, which is every address that is no pod's.
{sections}"""


def built(name: str, project: Path, folder: Path) -> Manifests:
    """The manifests that a table is about."""
    return Manifests(project, folder, "prod", "flower", *{"managed": ["managed"], "oidc": []}.get(name, ["keda"]))


def main() -> None:
    """Write the tables."""
    tables = {}
    analyzer = environment("kubernetes") / "bin" / "nca"
    with tempfile.TemporaryDirectory() as folder:
        for name in _NOTE:
            answers = {"broker": "redis" if name == "Redis" else "rabbitmq"}
            answers |= {"flower": "oidc"} if name == "oidc" else {}
            project = bake(Path(folder, name), answers=answers)
            tables[name] = table(edges(analyzer, built(name, project, Path(folder, f"{name}-built")).objects))
    GOLDEN.write_text(document(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
