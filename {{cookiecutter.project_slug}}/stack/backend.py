"""Redis on loopback, with a file of ``deploy/redis`` and only port, paths and passwords of its own.

Guards against: a committed or shared password. The rendered ACL file has none; each start makes new ones.
Rests on: 256 random bits in each password, which makes Redis' unsalted SHA-256 safe to store.
Controls: BRK-2, BRK-3, DAT-3.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .account import Account, StackFailed, own_folder, write_own
from .pki import Pair
from .process import Process, start

#: Exists in the local stack only, for its tests.
ADMINISTRATOR = "stack-administrator"
#: What providers of Redis refuse to their customers, or of it enough to tell.
_KEPT_BY_PROVIDERS = "-config -acl -debug -module -save -bgsave -bgrewriteaof -shutdown -replicaof -migrate"


class Backend:
    """One Redis server: ``redis`` for the results or ``redis-broker``. Everything it writes is in ``folder``."""

    def __init__(self, project: Path, folder: Path, port: int, account: Account) -> None:
        self.project = project
        self.folder = folder
        self.port = port
        self.account = account
        broker = folder.name == "redis-broker"
        self._settings = project / "deploy/redis" / ("broker.conf" if broker else "redis.conf")

    def password_file(self, user: str) -> Path:
        """Where an account's password is."""
        return self.folder / f"{user}.password"

    def configure(self, rules: Iterable[str], ca: Path, server: Pair, managed: bool = False) -> None:
        """Write what is this stack's own: passwords, ACL file, listener, paths.

        ``managed`` is what a provider makes of it: one account, no certificate asked for, nothing to configure.
        """
        if managed:
            rules = (f"user default on resetpass ~* &* +@all {_KEPT_BY_PROVIDERS}",)
        acl = self.write_accounts((*rules, f"user {ADMINISTRATOR} on resetpass ~* &* +@all"))
        home = self.account.folder(self.folder / "home")
        write_own(
            self.folder / "redis.conf",
            f"include {self._settings}\n"
            f"tls-port {self.port}\n"
            f"tls-ca-cert-file {ca}\n"
            f"tls-cert-file {server.certificate}\n"
            f"tls-key-file {server.key}\n"
            f"aclfile {acl}\n"
            f"dir {home}\n" + ("tls-auth-clients no\n" if managed else ""),
            0o644,
        )

    def write_accounts(self, rules: Iterable[str]) -> Path:
        """Write the ACL file, and for each account a file with a password."""
        own_folder(self.folder)
        lines = [self._with_password(line) for line in rules]
        return self.account.write(self.folder / "users.acl", "\n".join(lines) + "\n")

    def _with_password(self, line: str) -> str:
        match = re.match(r"user (\S+) on resetpass ", line)
        if match is None:
            return line
        password = secrets.token_urlsafe(32)
        file = write_own(self.password_file(match[1]), password, 0o600)
        if match[1] != ADMINISTRATOR:
            self.account.give(file)
        return line.replace("resetpass", f"resetpass #{hashlib.sha256(password.encode()).hexdigest()}", 1)

    def start(self, log: Path) -> Process:
        """Start the server; it is not ready yet."""
        command = [find_server(), str(self.folder / "redis.conf")]
        env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        return start(self.folder.name, command, env=env, cwd=self.folder / "home", log=log, account=self.account)

    def wait(self, process: Process, ca: Path, client: Pair) -> None:
        """Wait until the administrator can log in."""

        def ready() -> bool:
            try:
                return bool(self.administrator(ca, client).ping())
            except (redis.ConnectionError, redis.TimeoutError):
                return False

        process.wait(ready, 30)

    def administrator(self, ca: Path, client: Pair) -> redis.Redis:
        """Connect with all rights."""
        return redis.Redis(
            host="127.0.0.1",
            port=self.port,
            username=ADMINISTRATOR,
            password=self.password_file(ADMINISTRATOR).read_text(encoding="utf-8"),
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            ssl=True,
            ssl_ca_certs=str(ca),
            ssl_certfile=str(client.certificate),
            ssl_keyfile=str(client.key),
        )


def as_lines(reply: Any) -> str:
    """A reply as text, one value on a line, as ``redis-cli`` prints it."""
    if isinstance(reply, dict):
        return "\n".join(as_lines(item) for pair in reply.items() for item in pair)
    if isinstance(reply, list | tuple | set):
        return "\n".join(as_lines(item) for item in reply)
    return "" if reply is None else str(reply)


def find_server() -> str:
    """Return where the server's program is."""
    path = shutil.which("redis-server")
    if path is None:
        raise StackFailed("redis-server is not installed")
    return path
