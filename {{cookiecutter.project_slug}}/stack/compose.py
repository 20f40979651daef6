"""The stack in containers, ``STACK=compose make up``: issues what compose.yaml mounts, and has an engine bring it up.

Guards against: containers that share keys. Each service's folder holds what that account logs in and signs with, and
nothing else; the authorities' keys are mounted nowhere.
Rests on: Docker's or Podman's Compose, and on the files belonging to the one user that all containers run as: who calls
this, or the image's user where that is root. ``.env``, which Compose reads and Git ignores, tells its own commands too.
An engine that maps users would make that somebody else, and is refused.
Controls: CMP-1, DAT-3.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from .account import Account, StackFailed, own_folder, write_own
from .backend import Backend
from .pki import Pki
from .record import Record
from .stack import Stack

FOLDER = ".stack-compose"  # compose.yaml names it
_IMAGE_USER = 10001  # the Dockerfile's
#: Each with a command that only works where all of it is there.
_ENGINES = ((("docker", "compose"), "ls"), (("podman-compose",), "version"))
#: What `docker info` or `podman info` says of one whose containers' users are other ones here.
_MAPS_USERS = re.compile(r"^\s*(rootless|userns)(: true)?\s*$", re.MULTILINE)
_SETTING = "STACK_USER"
#: Folders that a service writes to.
_DATA = ("broker-data", "beat-data", "uploads", "output")


def run(stack: Stack, command: str) -> int:
    """Do ``up``, ``down`` or ``status``.

    Raises:
        StackFailed: there is no engine, it failed, or the command is one of the local stack alone.
    """
    folder = stack.project / FOLDER
    if command == "up":
        _require_same_users()
        _require_services(stack)
        record = Record(folder)
        with record.locked():
            if not (folder / "backend/users.acl").exists():  # with other passwords, servers that run would refuse
                issue(stack)
        _tell_compose(stack, _user())
        _engine(stack, "up", "--detach")
    elif command == "down":
        _engine(stack, "--profile", "client", "down")
        shutil.rmtree(folder, ignore_errors=True)
        _tell_compose(stack, "")
    elif command == "status":
        _engine(stack, "ps")
    else:
        raise StackFailed(f"`{command}` is for the local stack; here, `make down` and `make up` issue everything anew")
    return 0


def service(account: str) -> str:
    """The service that an account of the topology runs in."""
    return account if account in ("worker", "beat", "client") else f"worker-{account}"


def issue(stack: Stack) -> None:
    """Issue keys and passwords for servers, pools, beat and the client, below ``.stack-compose``."""
    folder, topology, account = stack.project / FOLDER, stack.topology, _account()
    pki = Pki(folder / "pki", account)
    passwords: dict[str, Backend] = {}
    for name, rules in {"broker": stack.rules.broker_acl_text, "backend": stack.rules.acl_text}.items():
        server = pki.tls.server(name, (name, "localhost"))
        place = own_folder(folder / name)
        write_own(place / "ca.pem", pki.tls.certificate.read_bytes(), 0o644)
        write_own(place / "server.pem", server.certificate.read_bytes(), 0o644)
        account.write(place / "server-key.pem", server.key.read_bytes())
        if name == "backend" or topology.broker == "redis":
            passwords[name] = Backend(stack.project, folder / "passwords" / name, 6379, account)
            acl = passwords[name].write_accounts(rules(topology).splitlines())
            account.write(place / "users.acl", acl.read_bytes())
        else:
            write_own(place / "listener.conf", "listeners.ssl.default = 5671\n", 0o644)
    for role in (*topology.pools, *({"beat", "client"} & topology.callers.keys())):
        name = topology.account(role)
        tls, signer = pki.tls.client(name), pki.signing.signer(role, stack.identity(role))
        place = own_folder(folder / service(role))
        files = {"tls.pem": tls.certificate, "tls-key.pem": tls.key}
        files |= {"signing.pem": signer.certificate, "signing-key.pem": signer.key, "ca.pem": pki.tls.certificate}
        files |= {f"{server}.password": each.password_file(name) for server, each in passwords.items()}
        for target, source in files.items():
            account.write(place / target, source.read_bytes())
    for name in _DATA:
        account.folder(folder / name)


def _account() -> Account:
    if os.geteuid() == 0:
        return Account("the image's user", _IMAGE_USER, _IMAGE_USER, switch=True)
    return Account.unprivileged()


def _user() -> str:
    account = _account()
    return f"{account.uid}:{account.gid}"


def _tell_compose(stack: Stack, user: str) -> None:
    """Write the user into ``.env``, or nobody; the rest of it is a person's."""
    file = stack.project / ".env"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [line for line in before.splitlines() if not line.startswith(f"{_SETTING}=")]
    lines += [f"{_SETTING}={user}"] if user else []
    if lines:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif before:
        file.unlink()


def _require_same_users() -> None:
    program = _program()[0].removesuffix("-compose")
    if _MAPS_USERS.search(subprocess.run([program, "info"], capture_output=True, text=True, check=False).stdout):
        raise StackFailed(
            f"{program} maps users, as rootless engines do, so containers could not read their keys: "
            "use an engine that maps none, or unset STACK"
        )


def _require_services(stack: Stack) -> None:
    listed = set(_engine(stack, "config", "--services", capture_output=True).stdout.split())
    for pool in stack.topology.pools:
        if service(pool) not in listed:
            raise StackFailed(f"compose.yaml has no service {service(pool)} for that pool: add one, like `worker`")


def _program() -> tuple[str, ...]:
    engine = next((engine for engine, check in _ENGINES if shutil.which(engine[0]) and _works(*engine, check)), None)
    if engine is None:
        raise StackFailed("neither `docker compose` nor `podman-compose` works here: install one, or unset STACK")
    return engine


def _engine(stack: Stack, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, _SETTING: _user()}
    command = [*_program(), *arguments]
    done = subprocess.run(command, cwd=stack.project, env=environment, text=True, check=False, **options)
    if done.returncode:
        raise StackFailed(f"`{' '.join(command)}` failed with status {done.returncode}{done.stderr or ''}")
    return done


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
