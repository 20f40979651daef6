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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import install
from .account import Account, StackFailed, own_folder
from .backend import ADMINISTRATOR, Backend, as_lines
from .broker import Broker
from .pki import Pair, Pki
from .process import Process, undisturbed
from .record import Record, free_ports
from .worker import Worker, start_worker, wait_ready

#: What is started for each broker that a topology can name, and the packages that it comes from.
_SERVERS = {"rabbitmq": ("rabbitmq", "redis", "epmd"), "redis": ("redis-broker", "redis")}
_PACKAGES = {"rabbitmq": ("rabbitmq-server", "redis-server"), "redis": ("redis-server",)}
_CALLER_ROLES = frozenset({"client", "beat", "monitor", "operator"})


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
    ) -> None:
        self.project = project.resolve()
        self.folder = Path(os.path.abspath(folder)) if folder else self.project / ".stack"
        for path in (self.project, self.folder):
            if any(character.isspace() for character in str(path)):
                raise StackFailed(f"{str(path)!r} has white space in it, which environment files cannot hold: move it")
        package = _package(self.project)
        self.app = app or f"{package}.app"
        self._rules = importlib.import_module(f"{package}.hardening.render")
        self._topology_file = (topology or self.project / "topology.toml").resolve()
        self.topology: Any = self._rules.Topology.load(self._topology_file)
        self._servers = _SERVERS[self.topology.broker]
        self._definitions = definitions or (lambda document: document)
        self._acl = tuple(acl)
        self.account = Account.unprivileged()
        self._record = Record(self.folder)
        self._pki: Pki | None = None

    @property
    def pki(self) -> Pki:
        """The authorities of this stack, in the process that brought it up."""
        if self._pki is None:
            raise StackFailed("only the process that brought the stack up has its authorities")
        return self._pki

    def up(self, *, worker: bool = True) -> None:
        """Start what is not running yet: the servers, and a worker for each pool.

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
                for pool in self.topology.pools if worker else ():
                    name = pool if pool == "worker" else f"worker-{pool}"
                    if name not in running:
                        self._start_worker(name, self.app, self.environment(pool), ())
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
        ports = self._record.ports if self._record.exists else {}
        return [(process, ports.get(process.name)) for process in self._record.processes]

    def environment(self, role: str) -> dict[str, str]:
        """What ``<role>.env`` says."""
        lines = (self.folder / f"{role}.env").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

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
        if self._topology_file == self.project / "topology.toml" and (stale := self._rules.stale(self.project)):
            raise StackFailed(f"{stale[0]} is not what topology.toml says: run `make topology`")

    def _start_servers(self) -> None:
        names = (*self._servers, *(("distribution",) if "rabbitmq" in self._servers else ()))
        self._record.begin(dict(zip(names, free_ports(len(names)), strict=True)))
        self._pki = pki = Pki(self.folder / "pki", self.account)
        hosts = ("127.0.0.1", "localhost")
        rules = {"redis": self._rules.acl_text}
        if "rabbitmq" in self._servers:
            definitions = json.dumps(self._definitions(self._rules.definitions(self.topology)))
            self._rabbitmq().configure(definitions, pki.tls.certificate, pki.tls.server("rabbitmq", hosts))
        else:
            rules["redis-broker"] = self._rules.broker_acl_text
        for name, text in rules.items():
            acl = [*text(self.topology).splitlines(), *self._acl]
            self._redis(name).configure(acl, pki.tls.certificate, pki.tls.server(name, hosts))
        pki.tls.client(ADMINISTRATOR)
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
            account = self.topology.account(next(iter(self.topology.accounts)))
            self._rabbitmq().wait(started["rabbitmq"], self.topology.vhost, *self._tls_client(account))

    def _starter(self, name: str) -> Callable[[Path], Process]:
        if name.startswith("redis"):
            return self._redis(name).start
        return self._rabbitmq().start if name == "rabbitmq" else self._rabbitmq().start_port_mapper

    def _tls_client(self, account: str) -> tuple[Path, Pair]:
        tls = self.folder / "pki/tls"
        return tls / "ca.pem", Pair(tls / f"{account}.pem", tls / f"{account}-key.pem")

    def _write_environment(self, role: str) -> None:
        account = self.topology.account(role)
        client = self.pki.tls.client(account)
        signer = self.pki.signing.signer(role, self._identity(role))
        ports = self._record.ports
        if "rabbitmq" in ports:
            broker: dict[str, object] = {"BROKER_URL": f"amqps://127.0.0.1:{ports['rabbitmq']}/{self.topology.vhost}"}
        else:
            broker = {
                "BROKER_URL": f"rediss://{account}@127.0.0.1:{ports['redis-broker']}/0",
                "BROKER_PASSWORD_FILE": self._redis("redis-broker").password_file(account),
            }
        values = {
            **broker,
            "RESULT_BACKEND": f"rediss://{account}@127.0.0.1:{ports['redis']}/0",
            "RESULT_BACKEND_PASSWORD_FILE": self._redis("redis").password_file(account),
            "TLS_CA": self.pki.tls.certificate,
            "TLS_CERTIFICATE": client.certificate,
            "TLS_KEY": client.key,
            "SECURITY_KEY": signer.key,
            "SECURITY_CERTIFICATE": signer.certificate,
            "SECURITY_CERT_STORE": self.pki.store,
            "TOPOLOGY": self._topology_file,
        }
        text = "".join(f"SECURE_CELERY_{name}={value}\n" for name, value in values.items())
        self.account.write(self.folder / f"{role}.env", text)

    def _identity(self, role: str) -> str:
        """The SPIFFE ID of a pool or caller; one that is not named after its role carries its name too."""
        application = self.topology.application
        base = f"spiffe://{application}.test/development/{application}"
        if role == "worker" or role in _CALLER_ROLES:
            return f"{base}/{role}"
        return f"{base}/{'worker' if role in self.topology.pools else 'client'}/{role}"

    def _start_worker(self, name: str, app: str, env: Mapping[str, str], options: Sequence[str]) -> Worker:
        for ended in self._record.processes:
            if ended.name == name and not ended.alive():
                self._record.drop(ended)
        home = own_folder(self.folder / "workers") / name
        if not home.exists():
            self.account.folder(home)
        node = f"{name}@{self.topology.application}-{self._record.ports[self._servers[0]]}"
        arguments = ("-A", app, "worker", "--hostname", node, "--concurrency", "2", "--loglevel", "INFO", *options)
        with undisturbed():
            process = start_worker(name, self.project, arguments, env, home, self._record.log(name), self.account)
            self._record.add(process)
        try:
            wait_ready(process)
        except BaseException:
            process.stop()
            self._record.drop(process)
            raise
        return Worker(process, self._record.drop)

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
        settings = "redis.conf" if name == "redis" else "broker.conf"
        return Backend(self.project, self.folder / name, self._record.ports[name], self.account, settings)


def _package(project: Path) -> str:
    """The name of the project's package. Found, not written down: no file here needs to know it."""
    packages = sorted(path.parent.parent.name for path in project.glob("src/*/hardening/render.py"))
    if len(packages) != 1:
        raise StackFailed(f"{project} is no project of this kind: src holds no one package with a hardening folder")
    if (source := str(project / "src")) not in sys.path:
        sys.path.append(source)
    return packages[0]
