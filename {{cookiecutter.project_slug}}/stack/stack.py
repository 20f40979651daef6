"""Brings the local stack up and down, and remembers what it started.

Guards against: processes and ports left behind, by a failure half-way or by a command that was killed. What was started
is written down at once, so that the next command can end it.
Rests on: one folder per stack, which holds everything, and a lock on it.
Controls: TLS-1, TLS-2, DAT-3.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import install
from .account import Account, write_own
from .backend import ADMINISTRATOR, Backend, as_lines
from .broker import Broker
from .errors import StackFailed
from .pki import Pair, Pki
from .ports import free_ports
from .process import Process
from .worker import Worker, start_worker, wait_ready

_ROLES = ("client", "beat", "monitor", "operator")
_STATE = "stack.json"


class Stack:
    """Broker, backend and workers of one project, all of it in one folder.

    Args:
        project: the project's root.
        folder: where everything goes; `.stack` in the project if not given. Must be new, or a stack's already.
        app: the Celery application of the workers; the project's own if not given.
        topology: another topology file than the project's.
        definitions: changes the broker's definitions before they are loaded.
        acl: more lines for the backend's ACL file; ``user NAME on resetpass ...`` gets a password of its own.
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
                raise StackFailed(f"the path {str(path)!r} has a space in it, which environment files cannot hold; move it")
        package = _package(self.project)
        self.app = app or f"{package}.app"
        self._render = importlib.import_module(f"{package}.hardening.render")
        self._own_topology = topology is None
        self._topology_file = (topology or self.project / "topology.toml").resolve()
        self.topology: Any = self._render.Topology.load(self._topology_file)
        self._definitions = definitions or (lambda document: document)
        self._acl = tuple(acl)
        self.account = Account.unprivileged()
        self._pki: Pki | None = None

    @property
    def pki(self) -> Pki:
        """The authorities of this stack, in the process that brought it up."""
        if self._pki is None:
            raise StackFailed("the authorities' keys are only known to the process that brought the stack up")
        return self._pki

    def up(self, *, worker: bool = True) -> None:
        """Start what is not running yet.

        Raises:
            StackFailed: what went wrong; nothing is left behind.
        """
        with self._locked():
            servers = [process for process in self._processes() if not process.name.startswith("worker")]
            if not servers or not all(process.alive() for process in servers):
                self._down()
                self._check()
                try:
                    self._start_servers()
                except BaseException:
                    self._end()
                    raise
            if worker and not any(p.name == "worker" and p.alive() for p in self._processes()):
                try:
                    self._start_worker("worker", self.app, None, ())
                except BaseException:
                    self._end()
                    raise

    def down(self) -> None:
        """End every process that was started and remove what they used; logs stay."""
        if not (self.folder / _STATE).exists():
            return
        with self._locked():
            self._down()

    def status(self) -> list[tuple[str, int, bool, str]]:
        """Name, process number, whether it is alive, and log, of everything that was started."""
        return [(process.name, process.pid, process.alive(), process.log) for process in self._processes()]

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
        """Start another worker and wait until it is ready. ``env`` replaces what ``worker.env`` says."""
        with self._locked():
            return self._start_worker(name, app or self.app, env, options)

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against the broker."""
        return self._broker().control(*arguments)

    def redis(self, *command: str) -> str:
        """Send a command to the backend as an administrator, who exists only here."""
        tls = self.folder / "pki/tls"
        pair = Pair(tls / f"{ADMINISTRATOR}.pem", tls / f"{ADMINISTRATOR}-key.pem")
        with self._backend().administrator(tls / "ca.pem", pair) as administrator:
            return as_lines(administrator.execute_command(*command))

    # -- what the public methods are made of; the lock is held --------------------------------------------------------

    def _check(self) -> None:
        install.require_servers()
        self.account.require_reachable(self.project)
        if self._own_topology and (stale := self._render.stale(self.project)):
            raise StackFailed(f"{stale[0]} is not what topology.toml says: run `make topology`")

    def _start_servers(self) -> None:
        amqps, distribution, epmd, rediss = free_ports(4)
        ports = {"amqps": amqps, "distribution": distribution, "epmd": epmd, "rediss": rediss}
        self._save({"ports": ports, "processes": []})
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        self._pki = pki = Pki(self.folder / "pki", self.account)
        administrator = pki.tls.client(ADMINISTRATOR)
        clients = {role: pki.tls.client(self.topology.account(role)) for role in self.topology.accounts}
        hosts = ("127.0.0.1", "localhost")

        broker, backend = self._broker(), self._backend()
        definitions = json.dumps(self._definitions(self._render.definitions(self.topology)))
        broker.configure(definitions, pki.tls.certificate, pki.tls.server("rabbitmq", hosts))
        rules = self._render.acl_text(self.topology).splitlines()
        backend.configure([*rules, *self._acl], pki.tls.certificate, pki.tls.server("redis", hosts))
        for role, client in clients.items():
            self._write_environment(role, client)

        self._remember(broker.start_port_mapper(self._log("epmd")))
        self._remember(rabbitmq := broker.start(self._log("rabbitmq")))
        self._remember(redis := backend.start(self._log("redis")))
        backend.wait(redis, pki.tls.certificate, administrator)
        broker.wait(rabbitmq, self.topology.vhost, pki.tls.certificate, next(iter(clients.values())))

    def _write_environment(self, role: str, client: Pair) -> None:
        signer = self.pki.signing.signer(role, self._identity(role))
        account = self.topology.account(role)
        ports = self._state()["ports"]
        values = {
            "BROKER_URL": f"amqps://127.0.0.1:{ports['amqps']}/{self.topology.vhost}",
            "RESULT_BACKEND": f"rediss://{account}@127.0.0.1:{ports['rediss']}/0",
            "RESULT_BACKEND_PASSWORD_FILE": self._backend().password_file(account),
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
        if role in _ROLES or role == "worker":
            return f"{base}/{role}"
        return f"{base}/{'worker' if role in self.topology.pools else 'client'}/{role}"

    def _start_worker(self, name: str, app: str, env: Mapping[str, str] | None, options: Sequence[str]) -> Worker:
        home = self.folder / "workers" / name
        home.parent.mkdir(mode=0o711, exist_ok=True)
        if not home.exists():
            self.account.folder(home)
        log = self._log(name)
        log.unlink(missing_ok=True)
        process = start_worker(
            self.project,
            app,
            name=name,
            env=self.environment("worker") if env is None else env,
            options=options,
            home=home,
            log=log,
            account=self.account,
        )
        self._remember(process)
        try:
            wait_ready(process)
        except BaseException:
            process.stop()
            self._forget(process)
            raise
        return Worker(process, self._forget)

    def _down(self) -> None:
        self._end()
        self._remove_files()

    def _end(self) -> None:
        # Workers first: they would log a lost broker. Whatever fails, the others are ended too.
        failures = []
        for process in reversed(self._processes()):
            try:
                process.stop()
            except StackFailed as error:
                failures.append(str(error))
            else:
                self._forget(process)
        if failures:
            raise StackFailed("; ".join(failures))
        self._pki = None

    def _remove_files(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name in {"logs", "lock", ".gitignore"}:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    # -- what is remembered -------------------------------------------------------------------------------------------

    def _broker(self) -> Broker:
        ports = self._state()["ports"]
        numbers = (ports["amqps"], ports["distribution"], ports["epmd"])
        return Broker(self.project, self.folder / "rabbitmq", numbers, self.account)

    def _backend(self) -> Backend:
        return Backend(self.project, self.folder / "redis", self._state()["ports"]["rediss"], self.account)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / _STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StackFailed(f"no stack is up in {self.folder}: run `make up`") from None

    def _save(self, state: dict[str, Any]) -> None:
        new = write_own(self.folder / f"{_STATE}.new", json.dumps(state, indent=1), 0o600)
        new.replace(self.folder / _STATE)

    def _processes(self) -> list[Process]:
        if not (self.folder / _STATE).exists():
            return []
        return [Process(**process) for process in self._state()["processes"]]

    def _remember(self, process: Process) -> None:
        state = self._state()
        self._save({**state, "processes": [*state["processes"], asdict(process)]})

    def _forget(self, process: Process) -> None:
        state = self._state()
        self._save({**state, "processes": [entry for entry in state["processes"] if entry["pid"] != process.pid]})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "lock").exists():
            raise StackFailed(f"{self.folder} holds something that is not a stack's: name another folder")
        # Others may pass through, to what is theirs below.
        self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / ".gitignore").write_text("*\n", encoding="ascii")
            yield


def _package(project: Path) -> str:
    """The name of the project's package. Found, not written down: no file here needs to know it."""
    packages = sorted(path.parent.parent.name for path in project.glob("src/*/hardening/render.py"))
    if len(packages) != 1:
        raise StackFailed(f"{project} is not a project: there is no one package with a hardening folder in src")
    if (source := str(project / "src")) not in sys.path:
        sys.path.append(source)
    return packages[0]
