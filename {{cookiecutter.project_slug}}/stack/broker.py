"""RabbitMQ on loopback, with ``deploy/rabbitmq/rabbitmq.conf`` and only ports and paths of its own.

Guards against: touching a system's RabbitMQ (own node name, cookie, home, epmd), and listeners on other interfaces.
Rests on: epmd being started here, before the node would start one that nobody ends.
Controls: BRK-1, BRK-3, TLS-2.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path

import amqp

from .account import Account, StackFailed, own_folder, write_own
from .pki import Pair
from .process import Process, start

# Debian's `rabbitmq-server` on the path is a wrapper that insists on the system's account: look behind it first.
_SEARCH = os.pathsep.join(
    ("/usr/lib/rabbitmq/bin", os.environ.get("PATH", os.defpath), "/usr/sbin", "/opt/homebrew/sbin")
)

#: The account that everybody shares at a managed broker, and what else is different there.
ONE_ACCOUNT = "everybody"
_MANAGED = "auth_mechanisms.1 = PLAIN\nssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false\n"

#: Names of a binding's parts: in definitions, and in ``rabbitmqctl list_bindings``.
_BINDING = {
    "source": "source_name",
    "destination_type": "destination_kind",
    "destination": "destination_name",
    "routing_key": "routing_key",
}


class Broker:
    """One RabbitMQ node. Everything it writes is in ``folder``."""

    def __init__(self, project: Path, folder: Path, ports: Mapping[str, int], account: Account) -> None:
        self.project = project
        self.folder = folder
        self.port = ports["rabbitmq"]
        self._distribution_port = ports["distribution"]
        self._epmd_port = ports["epmd"]
        self.account = account

    @property
    def _env(self) -> dict[str, str]:
        home = self.folder / "home"
        return {
            "PATH": f"{Path(find_server()).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"stack-{self._epmd_port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.project / "deploy/rabbitmq/rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(self.folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.project / "deploy/rabbitmq/advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.project / "deploy/rabbitmq/enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(home / "pid"),
        }

    @property
    def password_file(self) -> Path:
        """Where the one account's password is, at a managed broker."""
        return self.folder / f"{ONE_ACCOUNT}.password"

    def configure_managed(self, vhost: str, ca: Path, server: Pair) -> None:
        """Write what a provider makes of it: a virtual host, one account with a password, no certificate asked for."""
        own_folder(self.folder)
        password = secrets.token_urlsafe(32)
        self.account.write(self.password_file, password)
        salt = secrets.token_bytes(4)  # RabbitMQ's hash: base64(salt + SHA-256(salt + password))
        user = {
            "name": ONE_ACCOUNT,
            "password_hash": base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode(),
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": "",
        }
        everything = {"user": ONE_ACCOUNT, "vhost": vhost, "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {"vhosts": [{"name": vhost}], "users": [user], "permissions": [everything], "bindings": []}
        self.configure(json.dumps(definitions), ca, server, _MANAGED)

    def configure(self, definitions: str, ca: Path, server: Pair, more: str = "") -> None:
        """Write what is this stack's own: definitions, listener, paths, cookie; ``more`` overrides the project's."""
        own_folder(self.folder)
        home = self.account.folder(self.folder / "home")
        self.account.write(home / ".erlang.cookie", secrets.token_hex(32)).chmod(0o400)
        loaded = self.account.write(self.folder / "definitions.json", definitions)
        write_own(
            own_folder(self.folder / "conf.d", 0o755) / "90-stack.conf",
            f"listeners.ssl.default = 127.0.0.1:{self.port}\n"
            f"ssl_options.cacertfile = {ca}\n"
            f"ssl_options.certfile = {server.certificate}\n"
            f"ssl_options.keyfile = {server.key}\n"
            f"load_definitions = {loaded}\n"
            # A laptop has less to spare than a broker's own host.
            "vm_memory_high_watermark.relative = 0.1\n"
            f"disk_free_limit.absolute = 100MB\n{more}",
            0o644,
        )

    def start_port_mapper(self, log: Path) -> Process:
        """Start the node's epmd."""
        command = [_find("epmd"), "-port", str(self._epmd_port), "-address", "127.0.0.1"]
        return start("epmd", command, env=self._env, cwd=self.folder / "home", log=log, account=self.account)

    def start(self, log: Path) -> Process:
        """Start the node; it is not ready yet."""
        command = [find_server()]
        return start("rabbitmq", command, env=self._env, cwd=self.folder / "home", log=log, account=self.account)

    def wait(self, process: Process, vhost: str, ca: Path, client: Pair) -> None:
        """Wait until an account can log in."""
        login = {"login_method": "EXTERNAL"}
        if self.password_file.exists():
            password = self.password_file.read_text(encoding="utf-8")
            login = {"login_method": "PLAIN", "userid": ONE_ACCOUNT, "password": password}

        def ready() -> bool:
            complete = b"startup complete" in Path(process.log).read_bytes()
            connection = amqp.Connection(
                f"127.0.0.1:{self.port}",
                virtual_host=vhost,
                **login,
                ssl={
                    "ca_certs": str(ca),
                    "certfile": str(client.certificate),
                    "keyfile": str(client.key),
                    "cert_reqs": ssl.CERT_REQUIRED,
                    "server_hostname": "127.0.0.1",
                },
                connect_timeout=5,
            )
            try:
                connection.connect()
            except (OSError, amqp.RecoverableConnectionError):
                if complete:  # it starts even if it cannot listen
                    raise StackFailed(f"rabbitmq does not listen on port {self.port}; see {process.log}") from None
                return False
            except amqp.AMQPError as error:  # it listens only when everything is loaded: this will not change
                raise StackFailed(f"rabbitmq refuses a login ({error}); see {process.log}") from error
            finally:
                connection.collect()
            return True

        process.wait(ready, 90, pause=0.25)
        self._require_definitions(process)

    def _require_definitions(self, process: Process) -> None:
        # RabbitMQ starts even if an import breaks off half-way, and logs no error. What it has not read by then are
        # topic permissions, perhaps, without which every routing key would pass. Bindings come last.
        wanted = json.loads((self.folder / "definitions.json").read_text(encoding="utf-8"))["bindings"]
        for vhost in sorted({binding["vhost"] for binding in wanted}):
            listed = self.control("--vhost", vhost, "list_bindings", "--formatter", "json", *_BINDING.values())
            found = {tuple(binding[key] for key in _BINDING.values()) for binding in json.loads(listed)}
            missing = {tuple(b[key] for key in _BINDING) for b in wanted if b["vhost"] == vhost} - found
            if missing:
                raise StackFailed(f"rabbitmq did not load all of its definitions; see {process.log}")

    def control(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against this node and return its output."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [_find("rabbitmqctl"), "--quiet", *arguments],
            env=self._env,
            cwd=self.folder / "home",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **self.account.popen_options(),
        )
        if done.returncode:
            raise StackFailed(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def find_server() -> str:
    """Return where the server's program is."""
    return _find("rabbitmq-server")


def _find(program: str) -> str:
    path = shutil.which(program, path=_SEARCH)
    if path is None:
        raise StackFailed(f"{program} is not installed")
    return path
