"""Brings the local stack up and down.

Guards against: processes, ports and keys left behind by a failure half-way, and a stack that differs from production in
more than ports, paths and passwords.
Rests on: one folder per stack that holds everything, and ``deploy/`` for all the rest.
Controls: TLS-1, TLS-2, BRK-1, BRK-2, DAT-3.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import install
from .account import Account, StackFailed, own_folder, write_own
from .backend import ADMINISTRATOR, Backend, as_lines
from .broker import ONE_ACCOUNT, Broker
from .pki import Pair, Pki
from .process import Process, undisturbed
from .record import Record, free_ports, read_environment
from .worker import Worker, find_flower, find_package, flower_settings, has_schedule, start_worker, wait_ready

#: What is started for each broker that a topology can name, and the packages that it comes from.
_SERVERS = {"rabbitmq": ("rabbitmq", "redis", "epmd"), "redis": ("redis-broker", "redis")}
_PACKAGES = {"rabbitmq": ("rabbitmq-server", "redis-server"), "redis": ("redis-server",)}
#: Folders of the service, by the setting that names them.
_FOLDERS = {"UPLOAD_FOLDER": "uploads", "OUTPUT_FOLDER": "output"}


class Stack:
    """Broker, backend and workers of one project, all of it in one folder.

    Args:
        project: the project's root.
        folder: where everything goes; `.stack` in the project if not given. Must be new, or a stack's already.
        app: the Celery application of the workers; the project's own if not given.
        topology: another topology file than the project's.
        definitions: changes the broker's definitions before they are loaded.
        acl: more lines for the ACL file of the backend, and of a broker that is Redis; ``user NAME on resetpass ...``
            gets a password of its own.
        managed: servers as a provider lets them: one account with a password, no client certificates, no definitions.
    """

    def __init__(
        self,
        project: Path,
        folder: Path | None = None,
        app: str | None = None,
        *,
        topology: Path | None = None,
        definitions: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        acl: Iterable[str] = (),
        managed: bool = False,
    ) -> None:
        self.project = project.resolve()
        self.folder = Path(os.path.abspath(folder)) if folder else self.project / ".stack"
        for path in (self.project, self.folder):
            if any(character.isspace() for character in str(path)):
                raise StackFailed(f"{str(path)!r} has white space in it, which environment files cannot hold: move it")
        package = find_package(self.project)
        self.app = app or f"{package}.app"
        self.rules = importlib.import_module(f"{package}.hardening.render")
        self.explain = importlib.import_module(f"{package}.hardening.explain")
        self._topology_file = (topology or self.project / "topology.toml").resolve()
        self.topology: Any = self.rules.Topology.load(self._topology_file)
        self._servers = _SERVERS[self.topology.broker]
        self._flower = find_flower(self.project) if "monitor" in self.topology.callers else ""
        self._definitions = definitions or (lambda document: document)
        self._acl = tuple(acl)
        self._managed = managed
        self.account = Account.unprivileged()
        self._record = Record(self.folder)
        self._pki: Pki | None = None

    @property
    def pki(self) -> Pki:
        """The authorities of this stack; their keys are in its folder."""
        if self._pki is None:
            if not self._record.ready:
                raise StackFailed("nothing is up; `make up` starts it")
            self._pki = Pki(self.folder / "pki", self.account)
        return self._pki

    def up(self, *, worker: bool = True, calls: Iterable[Path] = ()) -> None:
        """Start what is not running yet: the servers, a worker for each pool, beat if there is a schedule, and Flower.

        Args:
            worker: whether to start workers.
            calls: environment files that the stacks of other services wrote for this one; workers get them too.

        Raises:
            StackFailed: what went wrong; nothing is left behind.
        """
        with self._record.locked():
            try:
                servers = [process for process in self._record.processes if process.name in self._servers]
                if not self._record.ready or not all(server.alive() for server in servers):
                    self._end()
                    self._check()
                    self._start_servers()
                running = {process.name for process in self._record.processes if process.alive()}
                others = {name: value for file in calls for name, value in read_environment(file).items()}
                for pool in self.topology.pools if worker else ():
                    name = pool if pool == "worker" else f"worker-{pool}"
                    if name not in running:
                        self._start_worker(name, self.app, {**others, **self.environment(pool)}, ())
                if worker and "beat" in self.topology.callers and "beat" not in running:
                    env = self.environment("beat")
                    if has_schedule(self.project, self.app, env, self._home("beat"), self.account):
                        self._start_beat(self.app, env, "beat", ())
                if worker and self._flower and "flower" not in running:
                    self._launch("flower", (), self.environment("flower"), self._flower)
            except BaseException:
                self._end()
                raise

    def down(self) -> None:
        """End every process that was started and remove its files; the logs stay."""
        if self._record.exists:
            with self._record.locked():
                self._end()

    def status(self) -> list[tuple[Process, int | None]]:
        """What was started, oldest first, with the port that it serves."""
        return [(process, self._record.ports.get(process.name)) for process in self._record.processes]

    def issue(self, role: str, name: str | None = None) -> Pair:
        """Issue a signing key and certificate to a role: another one, or as ``rotate``.

        Raises:
            StackFailed: the topology knows no such role.
        """
        if role not in self.topology.accounts:
            raise StackFailed(f"{role!r} is no role; there are {', '.join(self.topology.accounts)}")
        return self.pki.signing.signer(name or f"{role}-{secrets.token_hex(4)}", self.identity(role))

    def rotate(self, role: str) -> Pair:
        """Replace a role's keys and certificates, of TLS too, under whoever is using them; what it had stays valid."""
        with self._record.locked():
            new = self.issue(role, role)
            self.pki.tls.client(self.topology.account(role))
        return new

    def revoke(self, name: str) -> int:
        """Revoke the certificate that a role signs with now, or the one with this serial number (hexadecimal).

        Raises:
            StackFailed: it is neither.
        """
        file = self.pki.signing.folder / f"{name}.pem"
        try:
            serial = Pair(file, file).serial if name in self.topology.accounts else int(name, 16)
        except ValueError:
            raise StackFailed(f"{name!r} is neither a role nor a serial number") from None
        with self._record.locked():
            self.pki.revoke(serial)
        return serial

    def environment(self, role: str) -> dict[str, str]:
        """What ``<role>.env`` says, or Flower's."""
        return read_environment(self.folder / f"{role}.env")

    def start_worker(
        self,
        app: str | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "worker",
        options: Sequence[str] = (),
    ) -> Worker:
        """Start another worker and wait until it is ready; ``env`` replaces what ``worker.env`` says."""
        with self._record.locked():
            return self._start_worker(name, app or self.app, env or self.environment("worker"), options)

    def start_beat(
        self,
        app: str | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "beat",
        options: Sequence[str] = (),
    ) -> Worker:
        """Start beat and wait until it schedules; ``env`` replaces what ``beat.env`` says."""
        with self._record.locked():
            return self._start_beat(app or self.app, env or self.environment("beat"), name, options)

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Kill a server without warning; in the end, start it again on what it has kept."""
        with self._record.locked():
            process = next(process for process in self._record.processes if process.name == name)
            process.kill()
            self._record.drop(process)
        try:
            yield
        finally:
            with self._record.locked():
                self._start(name)

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against a broker that is RabbitMQ."""
        return self._rabbitmq().control(*arguments)

    def redis(self, *command: str) -> str:
        """Send a command to the backend as an administrator, who exists only here."""
        return self._administer("redis", command)

    def redis_broker(self, *command: str) -> str:
        """Send a command to a broker that is Redis, as its administrator."""
        return self._administer("redis-broker", command)

    def _administer(self, name: str, command: Sequence[str]) -> str:
        with self._redis(name).administrator(*self._tls_client(ADMINISTRATOR)) as administrator:
            return as_lines(administrator.execute_command(*command))

    def _check(self) -> None:
        if sys.platform != "linux":
            raise StackFailed("the local stack reads /proc, so it needs Linux: a virtual machine, a container or WSL 2")
        install.require_servers(*_PACKAGES[self.topology.broker])
        self.account.require_reachable(self.project, self.folder)
        if self._topology_file == self.project / "topology.toml" and (stale := self.rules.stale(self.project)):
            raise StackFailed(f"{stale[0]} is not what topology.toml says: run `make topology`")

    def _start_servers(self) -> None:
        names = [*self._servers, *["distribution"] * ("rabbitmq" in self._servers), *["flower"] * bool(self._flower)]
        self._record.begin(dict(zip(names, free_ports(len(names)), strict=True)))
        self._pki = pki = Pki(self.folder / "pki", self.account)
        hosts = ("127.0.0.1", "localhost")
        rules = {"redis": self.rules.acl_text}
        if "rabbitmq" in self._servers and self._managed:
            server = pki.tls.server("rabbitmq", hosts)
            self._rabbitmq().configure_managed(self.topology.vhost, pki.tls.certificate, server)
        elif "rabbitmq" in self._servers:
            definitions = json.dumps(self._definitions(self.rules.definitions(self.topology)))
            self._rabbitmq().configure(definitions, pki.tls.certificate, pki.tls.server("rabbitmq", hosts))
        else:
            rules["redis-broker"] = self.rules.broker_acl_text
        for name, text in rules.items():
            acl = [*text(self.topology).splitlines(), *self._acl]
            self._redis(name).configure(acl, pki.tls.certificate, pki.tls.server(name, hosts), self._managed)
        pki.tls.client(ADMINISTRATOR)
        for name in _FOLDERS.values():
            self.account.folder(self.folder / name)
        for role in self.topology.accounts:
            self._write_environment(role)
        self._start(*sorted(self._servers))  # epmd before the node that would start its own
        self._record.complete()

    def _start(self, *names: str) -> None:
        started = {}
        for name in names:
            with undisturbed():
                started[name] = self._record.add(self._starter(name)(self._record.log(name)))
        for name, process in started.items():
            if name.startswith("redis"):
                self._redis(name).wait(process, *self._tls_client(ADMINISTRATOR))
        if "rabbitmq" in started:
            # Any account of the topology; a managed broker looks at no certificate.
            account = ADMINISTRATOR if self._managed else self.topology.account(next(iter(self.topology.accounts)))
            self._rabbitmq().wait(started["rabbitmq"], self.topology.vhost, *self._tls_client(account))

    def _starter(self, name: str) -> Callable[[Path], Process]:
        if name.startswith("redis"):
            return self._redis(name).start
        return self._rabbitmq().start if name == "rabbitmq" else self._rabbitmq().start_port_mapper

    def _tls_client(self, account: str) -> tuple[Path, Pair]:
        tls = self.folder / "pki/tls"
        return tls / "ca.pem", Pair(tls / f"{account}.pem", tls / f"{account}-key.pem")

    def _write_environment(self, role: str) -> None:
        account, topology = self.topology.account(role), self._topology_file
        prefix, party = "SECURE_CELERY", self.topology.accounts[role]
        if getattr(party, "identity", None):  # another service, in whose processes the usual names are its own
            prefix = self.topology.application.upper().replace("-", "_")
            topology = write_own(self.folder / f"{role}.toml", self.rules.contract_text(self.topology, party), 0o644)
        signer = self.pki.signing.signer(role, self.identity(role))
        values: dict[str, object] = {
            **(self._shared_account() if self._managed else self._own_account(account)),
            "TLS_CA": self.pki.tls.certificate,
            "SECURITY_KEY": signer.key,
            "SECURITY_CERTIFICATE": signer.certificate,
            "SECURITY_CERT_STORE": self.pki.store,
            "TOPOLOGY": topology,
            **{setting: self.folder / name for setting, name in _FOLDERS.items()},
        }
        if role in self.topology.pools:
            values |= {f"REPLAY_STORE{part}": values[f"RESULT_BACKEND{part}"] for part in ("", "_PASSWORD_FILE")}
            values["EVENTS"] = bool(self._flower)
        text = "".join(f"{prefix}_{name}={value}\n" for name, value in values.items())
        self.account.write(self.folder / f"{role}.env", text)
        if self._flower and role == "monitor":
            text += flower_settings(self.folder, self.pki, self._record.ports["flower"])
            self.account.write(self.folder / "flower.env", text)

    def _own_account(self, account: str) -> dict[str, object]:
        """Addresses and logins of an account of the topology."""
        client = self.pki.tls.client(account)
        ports = self._record.ports
        if "rabbitmq" in ports:
            broker: dict[str, object] = {"BROKER_URL": f"amqps://127.0.0.1:{ports['rabbitmq']}/{self.topology.vhost}"}
        else:
            broker = {
                "BROKER_URL": f"rediss://{account}@127.0.0.1:{ports['redis-broker']}/0",
                "BROKER_PASSWORD_FILE": self._redis("redis-broker").password_file(account),
            }
        return {
            **broker,
            "RESULT_BACKEND": f"rediss://{account}@127.0.0.1:{ports['redis']}/0",
            "RESULT_BACKEND_PASSWORD_FILE": self._redis("redis").password_file(account),
            "TLS_CERTIFICATE": client.certificate,
            "TLS_KEY": client.key,
        }

    def _shared_account(self) -> dict[str, object]:
        """Addresses and logins of the one account of managed servers."""
        ports = self._record.ports
        if "rabbitmq" in ports:
            url = f"amqps://{ONE_ACCOUNT}@127.0.0.1:{ports['rabbitmq']}/{self.topology.vhost}"
            password = self._rabbitmq().password_file
        else:
            url = f"rediss://127.0.0.1:{ports['redis-broker']}/0"
            password = self._redis("redis-broker").password_file("default")
        return {
            "BROKER_URL": url,
            "BROKER_PASSWORD_FILE": password,
            "BROKER_AUTH": "password",
            "BROKER_TOPOLOGY": "app",
            "RESULT_BACKEND": f"rediss://127.0.0.1:{ports['redis']}/0",
            "RESULT_BACKEND_PASSWORD_FILE": self._redis("redis").password_file("default"),
            "RESULT_BACKEND_AUTH": "password",
            "RESULT_BACKEND_TOPOLOGY": "app",
        }

    def identity(self, role: str) -> str:
        """The SPIFFE ID of a pool or caller; one that is not named after its role carries its name too."""
        application = self.topology.application
        base = f"spiffe://{self.topology.trust_domain or f'{application}.test'}/development/{application}"
        if identity := getattr(self.topology.accounts[role], "identity", None):
            return str(replace(identity, environment="development"))
        if role in ("worker", "client", "beat", "monitor", "operator"):
            return f"{base}/{role}"
        return f"{base}/{'worker' if role in self.topology.pools else 'client'}/{role}"

    def _start_worker(self, name: str, app: str, env: Mapping[str, str], options: Sequence[str]) -> Worker:
        node = f"{name}@{self.topology.application}-{self._record.ports[self._servers[0]]}"
        arguments = ("-A", app, "worker", "--hostname", node, "--concurrency", "2", "--loglevel", "INFO", *options)
        return self._launch(name, arguments, env)

    def _start_beat(self, app: str, env: Mapping[str, str], name: str, options: Sequence[str]) -> Worker:
        file = self._home(name) / "celerybeat-schedule.json"
        return self._launch(name, ("-A", app, "beat", "-s", str(file), "--loglevel", "INFO", *options), env)

    def _launch(self, name: str, options: Sequence[str], env: Mapping[str, str], module: str = "celery") -> Worker:
        for ended in self._record.processes:
            if ended.name == name and not ended.alive():
                self._record.drop(ended)
        log = self._record.log(name)
        with undisturbed():
            process = start_worker(name, self.project, (module, *options), env, self._home(name), log, self.account)
            self._record.add(process)
        try:
            wait_ready(process)
        except BaseException:
            process.stop()
            self._record.drop(process)
            raise
        return Worker(process, self._record.drop)

    def _home(self, name: str) -> Path:
        """The one folder that a worker, or beat, may write to."""
        home = own_folder(self.folder / "workers") / name
        return home if home.exists() else self.account.folder(home)

    def _end(self) -> None:
        """End everything, the youngest first: a worker would log a lost broker."""
        failures = []
        for process in reversed(self._record.processes):
            try:
                process.stop()
            except StackFailed as error:  # the others are ended all the same, and this one stays on record
                failures.append(str(error))
            else:
                self._record.drop(process)
        if failures:
            raise StackFailed("; ".join(failures))
        self._record.clear()
        self._pki = None

    def _rabbitmq(self) -> Broker:
        return Broker(self.project, self.folder / "rabbitmq", self._record.ports, self.account)

    def _redis(self, name: str) -> Backend:
        return Backend(self.project, self.folder / name, self._record.ports[name], self.account)
