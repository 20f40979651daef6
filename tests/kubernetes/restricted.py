"""The Pod Security Standard ``restricted``, as Kubernetes publishes it, with all that ``baseline`` asks for.

https://kubernetes.io/docs/concepts/security/pod-security-standards/ (version 1.32)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
    "image",
}
SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
PROFILES = {"RuntimeDefault", "Localhost"}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def violations(template: dict[str, Any]) -> Iterator[str]:
    """Yield what a pod template violates."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    annotations = template.get("metadata", {}).get("annotations", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", ()):
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']}"
    if any(sysctl["name"] not in SYSCTLS for sysctl in pod.get("sysctls", ())):
        yield "sysctls"
    for key, profile in annotations.items():
        if key.startswith("container.apparmor.security.beta") and profile.partition("/")[0] not in (
            "runtime",
            "localhost",
        ):
            yield "AppArmor"
    containers = [c for kind in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(kind, ())]
    for container in containers:
        own = container.get("securityContext", {})
        for problem in _container(container, own, pod):
            yield f"{container['name']}: {problem}"


def _container(container: dict[str, Any], own: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()) or not set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if not own.get("runAsNonRoot", pod.get("runAsNonRoot")):
        yield "runAsNonRoot"
    if 0 in (own.get("runAsUser"), pod.get("runAsUser")):
        yield "runAsUser"
    if {**pod.get("seccompProfile", {}), **own.get("seccompProfile", {})}.get("type") not in PROFILES:
        yield "seccompProfile"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "hostPort"
    for context in (pod, own):
        if context.get("windowsOptions", {}).get("hostProcess"):
            yield "hostProcess"
        options = context.get("seLinuxOptions", {})
        if options.get("type", "") not in SELINUX or options.get("user") or options.get("role"):
            yield "seLinuxOptions"
        if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
            yield "AppArmor"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        handler = container.get(probe, {})
        if any(handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield f"{probe} host"
