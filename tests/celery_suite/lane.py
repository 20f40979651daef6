"""Runs Celery's tests on one broker: for stock Celery, then for ours, on the servers of a stack.

Run in a baked project, by its Python: ``python -m tests.celery_suite.lane``. The tests are in ``celery-suite/t`` there.
Outcomes go to ``celery-suite/<target>.jsonl``, what pytest printed to ``celery-suite/<target>.log``.
"""

from __future__ import annotations

import json
import signal
import ssl
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote, urlsplit

from stack import Stack
from stack.process import start

from .verdict import Outcomes, intended, passed, read, unexpected, unsteady

PROJECT = Path.cwd()
FOLDER = PROJECT / "celery-suite"
FILES = ("t/integration/test_tasks.py", "t/integration/test_canvas.py")
#: Seconds that one run of both files may take; what has not run by then has failed.
LIMIT = 2400
#: How often a test that failed on ours alone gets another chance: the machine may have been busy. On stock it gets one.
AGAIN = 2
STOCK = "stock"
#: What the tests rely on, and ours has another default for. A worker's children are not replaced, because here each new
#: one would inherit the connections of a caller, and close them.
OURS = {"task_ignore_result": False, "worker_max_tasks_per_child": None}


def definitions(document: dict[str, Any]) -> dict[str, Any]:
    """Give stock a vhost of its own, in which it may do everything, as Celery expects."""
    document["vhosts"].append({"name": STOCK})
    document["users"].append({"name": STOCK, "password_hash": "", "tags": ""})
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    document["permissions"].append({"user": STOCK, "vhost": STOCK, **everything})
    return document


class Lane:
    """One broker."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.listed = intended(stack.topology.broker)
        self.vain = self.listed  # what need not pass on ours, and so is not waited for long
        self.client = stack.pki.tls.client(STOCK)
        self.ours = stack.environment("worker")
        self.ca = self.ours["SECURE_CELERY_TLS_CA"]
        self.redis_tls = {
            "ssl_ca_certs": self.ca,
            "ssl_certfile": str(self.client.certificate),
            "ssl_keyfile": str(self.client.key),
            "ssl_check_hostname": True,
        }

    def password(self, server: str) -> str:
        """The password of stock, and of who looks on, at a Redis server."""
        return Path(self.stack.folder, server, f"{STOCK}.password").read_text(encoding="utf-8")

    def port(self, setting: str) -> int:
        """The port of a server that ours is told of."""
        return urlsplit(self.ours[f"SECURE_CELERY_{setting}"]).port or 0

    def redis_url(self, server: str, setting: str) -> str:
        """The address of a Redis server, as stock has it."""
        return f"rediss://{STOCK}:{quote(self.password(server), safe='')}@127.0.0.1:{self.port(setting)}/0"

    def stock(self) -> dict[str, Any]:
        """Celery's settings for stock: JSON, and TLS as good as ours."""
        redis_tls = {**self.redis_tls, "ssl_cert_reqs": "required"}
        settings = {
            "result_backend": self.redis_url("redis", "RESULT_BACKEND"),
            "redis_backend_use_ssl": redis_tls,
        }
        if self.stack.topology.broker == "redis":
            return {
                **settings,
                "broker_url": self.redis_url("redis-broker", "BROKER_URL"),
                "broker_use_ssl": redis_tls,
            }
        tls = {
            "ca_certs": self.ca,
            "certfile": str(self.client.certificate),
            "keyfile": str(self.client.key),
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "127.0.0.1",
        }
        return {
            **settings,
            "broker_url": f"amqps://127.0.0.1:{self.port('BROKER_URL')}/{STOCK}",
            "broker_login_method": "EXTERNAL",
            "broker_use_ssl": tls,
        }

    def run(self, target: str, tests: Iterable[str] = FILES) -> Outcomes:
        """Run tests for a target, as an unprivileged user, and return how they ended."""
        account, hardened = self.stack.account, not target.startswith(STOCK)
        home = FOLDER / f"{target}-home"
        account.folder(home)
        outcomes = account.write(FOLDER / f"{target}.jsonl", "")
        configuration = {
            "hardened": hardened,
            "settings": OURS if hardened else self.stock(),
            "operator": self.stack.environment("operator"),
            "queue": "suite.celery" if hardened else "celery",
            "notebook": {
                "host": "127.0.0.1",
                "port": self.port("RESULT_BACKEND"),
                "username": STOCK,
                "password": self.password("redis"),
                "ssl": True,
                "socket_timeout": 30,  # redis-py's own is shorter than some tests wait for a key
                **self.redis_tls,
            },
            "outcomes": str(outcomes),
            "listed": sorted(self.vain) if hardened else [],
        }
        environment: Mapping[str, str] = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": f"{PROJECT}:{PROJECT / 'src'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "WORKER_LOGLEVEL": "INFO",  # some tests look for what it logs
            "CELERY_SUITE": str(account.write(FOLDER / f"{target}.json", json.dumps(configuration))),
            **(self.ours if hardened else {}),
        }
        plugins = ("no:cacheprovider", "celery.contrib.pytest", f"{__package__}.plugin")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "--tb=native",
            *(part for name in plugins for part in ("-p", name)),
        ]
        began = time.monotonic()
        process = start(
            target, [*command, *tests], env=environment, cwd=FOLDER, log=FOLDER / f"{target}.log", account=account
        )
        try:
            while process.alive() and time.monotonic() < began + LIMIT:
                time.sleep(0.5)
        finally:
            process.stop()
        found = read(outcomes, unsteady())
        print(f"{target}: {len(passed(found))} of {len(found)} passed in {time.monotonic() - began:.0f} s", flush=True)
        return found


def _terminate(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that what was started is ended


def main() -> None:
    """Run everything and write ``outcomes.json``."""
    signal.signal(signal.SIGTERM, _terminate)
    topology = FOLDER / "topology.toml"
    stack = Stack(PROJECT, topology=topology, definitions=definitions, acl=(f"user {STOCK} on resetpass ~* &* +@all",))
    try:
        stack.up(worker=False)
        lane = Lane(stack)
        stock = lane.run(STOCK)
        if failed := {test for test, one in stock.items() if one["outcome"] == "failed"}:
            stock |= lane.run(f"{STOCK}-again", sorted(failed))
        lane.vain = lane.listed | (stock.keys() - passed(stock))
        ours = lane.run("ours")
        again: set[str] = set()
        for attempt in range(AGAIN):
            if failed := unexpected(stock, ours, lane.listed):
                again |= failed
                ours |= lane.run(f"again-{attempt + 1}", sorted(failed))
    finally:
        stack.down()
    document = {"stock": stock, "ours": ours, "again": sorted(again)}
    (FOLDER / "outcomes.json").write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
