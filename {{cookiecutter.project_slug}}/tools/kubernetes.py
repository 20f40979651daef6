"""Renders what a Kubernetes cluster has to know of ``topology.toml``: workloads, certificates, scaling.

Guards against: a pool, beat or caller whose account or certificate in the cluster is another than the topology's.
Rests on: names in a topology being names in YAML and in DNS too; nothing here is a secret, and no variable holds one.
Controls: K8S-2, K8S-3, K8S-4, K8S-5, BRK-6.

``python tools/kubernetes.py`` writes the files, ``--check`` only compares.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = next((ROOT / "src").glob("*/hardening/__init__.py")).parents[1].name
FOLDER = Path("deploy/kubernetes")
RENDERED = "# Rendered from topology.toml by `make topology`: change that file, or patch this one in an overlay.\n"
#: Accounts whose signer's SPIFFE ID ends with them; others carry their name behind their role.
ROLES = frozenset({"worker", "client", "beat", "monitor", "operator"})

WORKLOAD = Template("""---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: $role
automountServiceAccountToken: false
---
apiVersion: apps/v1
kind: $kind
metadata:
  name: $name
  labels:
    calls-servers: "true"
$labels
spec:
$strategy
  selector:
    matchLabels:
      app.kubernetes.io/name: $application
      app.kubernetes.io/component: $name
  template:
    metadata:
      labels:
        app.kubernetes.io/name: $application
        app.kubernetes.io/component: $name
        calls-servers: "true"
$pod_labels
    spec:
      serviceAccountName: $role
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: $grace
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        seccompProfile:
          type: RuntimeDefault
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: $application
              app.kubernetes.io/component: $name
      containers:
        - name: $name
          image: $application
          imagePullPolicy: Always
          command: $command
          env:
            - name: ACCOUNT
              value: $application.$role
            - name: SECURE_CELERY_TLS_CA
              value: /run/credentials/tls/ca.pem
            - name: SECURE_CELERY_TLS_CERTIFICATE
              value: /run/credentials/tls/client.pem
            - name: SECURE_CELERY_TLS_KEY
              value: /run/credentials/tls/client-key.pem
            - name: SECURE_CELERY_SECURITY_CERTIFICATE
              value: /run/credentials/signing/signer.pem
            - name: SECURE_CELERY_SECURITY_KEY
              value: /run/credentials/signing/signer-key.pem
            - name: SECURE_CELERY_SECURITY_CERT_STORE
              value: /run/credentials/trust
            - name: SECURE_CELERY_RESULT_BACKEND_PASSWORD_FILE
              value: /run/credentials/passwords/results
$env
$probes
          resources:
            requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 64Mi}
            limits: {cpu: "$cpu", memory: $memory, ephemeral-storage: 2Gi}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          volumeMounts:
            - {name: credentials, mountPath: /run/credentials, readOnly: true}
            - {name: tmp, mountPath: /tmp}
$mounts
      volumes:
        - name: credentials
          projected:
            defaultMode: 288 # 0440
            sources:
              - secret:
                  name: tls-$role
                  items:
                    - {key: ca.crt, path: tls/ca.pem}
                    - {key: tls.crt, path: tls/client.pem}
                    - {key: tls.key, path: tls/client-key.pem}
              - secret:
                  name: signing-$role
                  items:
                    - {key: ca.crt, path: trust/ca.pem}
                    - {key: tls.crt, path: signing/signer.pem}
                    - {key: tls.key, path: signing/signer-key.pem}
              - configMap:
                  name: revocations
                  optional: true
                  items:
                    - {key: ca.crl, path: trust/ca.crl}
              - secret:
                  name: results-passwords
                  items:
                    - {key: $role, path: passwords/results}
              - secret:
                  name: broker-passwords
                  optional: true
                  items:
                    - {key: $role, path: passwords/broker}
        - name: tmp
          emptyDir: {sizeLimit: 64Mi}
$volumes
""")

POOL = Template("""---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: $name
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      app.kubernetes.io/name: $application
      app.kubernetes.io/component: $name
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: $name
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: $name}
  minReplicas: 2
  maxReplicas: 6
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: 70}
""")
REPLAY_STORE = """
            - name: SECURE_CELERY_REPLAY_STORE_PASSWORD_FILE
              value: /run/credentials/passwords/results
"""
SCHEDULE = """
  volumeClaimTemplates:
    - metadata:
        name: schedule
      spec:
        accessModes: [ReadWriteOnce]
        resources:
          requests: {storage: 1Gi}
"""

# Alive: the process said so lately, by its heartbeat file. A lost broker ends nobody.
HEARTBEAT = """
          startupProbe:
            exec: {command: $command}
            periodSeconds: 5
            timeoutSeconds: 10
            failureThreshold: 24
          readinessProbe:
            exec: {command: $command}
            periodSeconds: 15
            timeoutSeconds: 10
          livenessProbe:
            exec: {command: $command}
            periodSeconds: 30
            timeoutSeconds: 10
            failureThreshold: 4
"""
LEAF = Template("""---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  name: $name
  labels: {certificate-of: $of}
spec:
  commonName: $subject
  $names
  secretName: $name
  duration: 168h
  privateKey: {algorithm: ECDSA, size: 256, encoding: PKCS8, rotationPolicy: Always}
  usages: [$usages]
  issuerRef: {group: cert-manager.io, kind: Issuer, name: $issuer}
""")

SCALED = Template("""---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: $name
spec:
  scaleTargetRef: {name: $name}
  minReplicaCount: 2
  maxReplicaCount: 6
  # While the queue cannot be counted.
  fallback: {failureThreshold: 3, replicas: 4}
  triggers:
""")
TRIGGER = Template("""
    - type: rabbitmq
      authenticationRef: {name: broker}
      metadata:
        protocol: amqp
        host: amqps://broker.$vhost.svc:5671/$vhost
        queueName: $queue
        mode: QueueLength
        value: "20"
""")


def _lines(text: str) -> str:
    """Drop the lines that a template's empty places have left."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def _flow(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _heartbeat() -> str:
    return HEARTBEAT.replace("$command", _flow(["python3", "-I", f"/app/src/{PACKAGE}/hardening/heartbeat.py"]))


def _workload(topology: Any, name: str, role: str, command: Iterable[str], **more: object) -> str:
    parts = dict.fromkeys(("labels", "pod_labels", "strategy", "env", "probes", "mounts", "volumes"), "")
    base = {"application": topology.application, "name": name, "role": role, "command": _flow(command)}
    return WORKLOAD.substitute(base | {"kind": "Deployment", "cpu": "1", "memory": "256Mi", "grace": 30} | parts | more)


def _pool(topology: Any, name: str) -> str:
    folders = {folder: f"/var/lib/{PACKAGE}/{folder}" for folder in ("uploads", "output")}
    return _workload(
        topology,
        name,
        name,
        ["python3", "-m", "celery", "-A", f"{PACKAGE}.app", "worker", "--concurrency", '"2"', "--loglevel", "INFO"],
        labels='    runs-tasks: "true"',
        pod_labels='        runs-tasks: "true"',
        grace=330,  # the longest task (task_time_limit: 300 seconds) ends before its worker is killed
        strategy="  strategy:\n    rollingUpdate: {maxUnavailable: 1, maxSurge: 1}",
        env=REPLAY_STORE,
        probes=_heartbeat(),
        mounts="".join(f"            - {{name: {folder}, mountPath: {path}}}\n" for folder, path in folders.items()),
        volumes="".join(f"        - name: {folder}\n          emptyDir: {{sizeLimit: 1Gi}}\n" for folder in folders),
        cpu="2",
        memory="1536Mi",  # two children of at most 512 MiB (worker_max_memory_per_child), and their parent
    ) + POOL.substitute(application=topology.application, name=name)


def _beat(topology: Any) -> str:
    state = "/var/lib/beat"
    return _workload(
        topology,
        "beat",
        "beat",
        ["python3", "-m", "celery", "-A", f"{PACKAGE}.app", "beat", "-s", f"{state}/celerybeat-schedule.json"],
        kind="StatefulSet",  # never two of them
        strategy="  serviceName: beat\n  replicas: 1\n" + SCHEDULE.rstrip(),
        probes=_heartbeat(),
        mounts=f"            - {{name: schedule, mountPath: {state}}}",
    )


def workloads(topology: Any) -> str:
    """Worker pools and beat: service account, workload, limits, and how pools may be disturbed and scaled."""
    texts = [_pool(topology, name) for name in topology.pools]
    return "".join(texts + ([_beat(topology)] if "beat" in topology.callers else []))


def certificates(topology: Any) -> str:
    """Two certificates for each account of the topology: one to log in with, and one to sign with."""
    text = ""
    for role, party in topology.accounts.items():
        account, names = topology.account(role), f"dnsNames: [{topology.account(role)}]"
        text += LEAF.substitute(
            issuer="tls",
            of="client",
            name=f"tls-{role}",
            subject=account,
            names=names,
            usages="digital signature, client auth",
        )
        if getattr(party, "identity", None):
            continue  # another service signs with its own CA's certificates
        text += LEAF.substitute(
            of="signer",
            name=f"signing-{role}",
            subject=account,
            names=f"uris: ['{identity(topology, role)}']",
            usages="digital signature",
            issuer="signing",
        )
    return text


def identity(topology: Any, role: str) -> str:
    """The SPIFFE ID of a pool or caller, in production; an overlay names another environment."""
    domain = topology.trust_domain or f"{topology.application}.internal"
    base = f"spiffe://{domain}/production/{topology.application}"
    if role in ROLES:
        return f"{base}/{role}"
    return f"{base}/{'worker' if role in topology.pools else 'client'}/{role}"


def scaling(topology: Any) -> str:
    """How many workers a pool has, by the length of its queues, which the monitor's account may count."""
    text = ""
    for name, pool in topology.pools.items():
        text += SCALED.substitute(name=name)
        for queue in pool.queues:
            text += TRIGGER.substitute(vhost=topology.vhost, queue=topology.queue(queue).broker_name)
    return text


def rendered(topology: Any) -> dict[Path, str]:
    """Every rendered file's text, by its path in the project."""
    texts = {
        "base/workloads.yaml": workloads(topology),
        "components/cert-manager/certificates.yaml": certificates(topology),
    }
    if "monitor" in topology.callers and (ROOT / FOLDER / "components/flower").is_dir():
        texts["components/flower/flower.yaml"] = _workload(
            topology, "flower", "monitor", ["python3", "-m", f"{PACKAGE}.flower"], strategy="  replicas: 1"
        )
    if "monitor" in topology.callers and topology.broker == "rabbitmq":
        # For Redis, KEDA counts with a script, and no account may run one: a script that never ends stops the server.
        texts["components/keda/scaling.yaml"] = scaling(topology)
    return {FOLDER / path: RENDERED + _lines(text) for path, text in texts.items()}


def main() -> int:
    """The command: 0 when all is well, 1 when a file is stale, 2 when the topology is refused."""
    sys.path.insert(0, str(ROOT / "src"))
    model = importlib.import_module(f"{PACKAGE}.hardening.topology")
    errors = importlib.import_module(f"{PACKAGE}.hardening.errors")
    try:
        files = rendered(model.Topology.load(ROOT / "topology.toml"))
    except errors.ConfigurationRefused as refused:
        print(refused, file=sys.stderr)
        return 2
    stale = [
        path for path, text in files.items() if not (ROOT / path).exists() or (ROOT / path).read_text("utf-8") != text
    ]
    check = sys.argv[1:] == ["--check"]
    for path in stale:
        if not check:
            (ROOT / path).write_text(files[path], encoding="utf-8")
        print(f"{path} is not what topology.toml says; run make topology" if check else f"wrote {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
