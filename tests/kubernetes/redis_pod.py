"""A pod of Redis without a cluster: the manifest's very commands, with other paths."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from redis import Redis

from . import Manifests, config_map

ADDRESSES = {"*": "127.0.0.1", "-::*": "-::1"}


class RedisPod:
    """The StatefulSet ``name`` of these manifests, on loopback."""

    def __init__(self, manifests: Manifests, name: str, folder: Path, library: Callable[[str], Any]) -> None:
        """Make its volumes, and run its init container."""
        library("stack.install").require_servers("redis-server")
        self.name, self.pki = (
            name,
            library("stack.pki").Pki(folder / "pki", library("stack.account").Account.unprivileged()),
        )
        self.pod = manifests.one("StatefulSet", name)["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]
        paths = ("/rendered", "/passwords", "/etc/redis", "/data")
        self.folders = {path: folder / path.strip("/").replace("/", "-") for path in paths}
        for path in self.folders.values():
            path.mkdir()
        for file, text in config_map(manifests, name).items():
            (self.folders["/rendered"] / file).write_text(self._moved(text), encoding="utf-8")
        for role in ("worker", "client", "monitor"):
            (self.folders["/passwords"] / role).write_text(f"the {role}'s own\n", encoding="utf-8")
        (accounts,) = self.pod["initContainers"]
        subprocess.run([self._moved(part) for part in accounts["command"]], check=True)
        self.own = self.pki.tls.client("my-service.worker")
        self.renew()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _moved(self, text: str) -> str:
        for path, folder in self.folders.items():
            text = re.sub(rf"(?<![\w/]){path}(?![\w.])", str(folder), text)
        return text

    def renew(self) -> None:
        """Mount a certificate, as cert-manager and the kubelet would."""
        pair, tls = self.pki.tls.server("server", ("127.0.0.1",)), self.folders["/etc/redis"] / "tls"
        for source, file in ((self.pki.tls.certificate, "ca"), (pair.certificate, "server"), (pair.key, "server-key")):
            shutil.copy(source, tls / f"{file}.pem")

    def start(self) -> None:
        """Start the container."""
        command = [ADDRESSES.get(part, self._moved(part)) for part in self.container["command"]]
        self.process = subprocess.Popen([*command, "--tls-port", str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        said = ""
        for line in self.process.stdout:
            said += line
            if "Ready to accept connections" in line:
                return
        raise AssertionError(said)

    def stop(self) -> None:
        """End the container, as the kubelet does."""
        if self.process is not None:
            self.process.terminate()
            self.process.communicate(timeout=30)
            self.process = None

    def alive(self) -> bool:
        """Ask as the kubelet does, which starts the container again when the answer is no."""
        probe = self.container["livenessProbe"]
        if "tcpSocket" in probe:
            with socket.create_connection(("127.0.0.1", self.port)):
                return True
        command = [self._moved(part) for part in probe["exec"]["command"]]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def served(self) -> str:
        """The certificate that clients get."""
        context = ssl.create_default_context(cafile=str(self.pki.tls.certificate))
        context.check_hostname = False
        context.load_cert_chain(self.own.certificate, self.own.key)
        with (
            socket.create_connection(("127.0.0.1", self.port)) as connection,
            context.wrap_socket(connection) as wrapped,
        ):
            der = wrapped.getpeercert(binary_form=True)
        assert der
        return ssl.DER_cert_to_PEM_cert(der)

    def login(self, user: str, password: str) -> Redis:
        """Give a client of this account."""
        return Redis(
            host="127.0.0.1",
            port=self.port,
            username=user,
            password=password,
            ssl=True,
            ssl_ca_certs=str(self.pki.tls.certificate),
            ssl_certfile=str(self.own.certificate),
            ssl_keyfile=str(self.own.key),
        )
