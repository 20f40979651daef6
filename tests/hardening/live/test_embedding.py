"""`hardening/` alone, copied into two applications that are not this project: a plain one and a Django project.

The lines that they add are those of ``docs/embedding.md``, taken from there. Effects are files, one for each run.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from attacks.wire import Amqp, Message
from stack import Stack
from stack.pki import Pair
from stack.worker import Worker

from ...project import hardening
from ...service import ROOT

TASKS = """
import os
from pathlib import Path
from uuid import uuid4

from celery import shared_task


@shared_task(ignore_result=False)
def add(x: int, y: int) -> int:
    return x + y


@shared_task(ignore_result=False)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task
def leave(effect: str) -> None:
    Path(os.environ["EFFECTS"], f"{effect}:{uuid4().hex}").touch()


@shared_task
def destroy(effect: str) -> None:
    leave(f"destroyed-{effect}")
"""

DJANGO = {
    "shop/__init__.py": "from .celery import app as celery_app\n\n__all__ = ['celery_app']\n",
    "shop/settings.py": """
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
SECRET_KEY = "of a throw-away test"
USE_TZ = True
CELERY_RESULT_EXPIRES = 42
""",
}

#: What every client does first. `say` answers the test; `capture` takes a message off the wire instead of sending it.
CLIENT = f"""
import base64, json, sys
from celery import chain, chord, group
from shop.celery import app
from shop import tasks

def say(value):
    assert not [name for name in sys.modules if name.partition(".")[0] == {hardening.__name__.partition(".")[0]!r}]
    print(json.dumps(value))

def capture(task, *args):
    caught = []
    def catch(message, exchange="", routing_key="", **_):
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        caught.append([base64.b64encode(body).decode(), message.properties, exchange, routing_key])
    with app.producer_pool.acquire(block=True) as producer:
        producer.channel.basic_publish = catch
        task.apply_async(args, producer=producer)
    [message] = caught
    return message
"""


def documented(heading: str) -> dict[str, str]:
    """Return the files that a section of the documentation shows."""
    text = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, heading
    return dict(re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', section[1], re.DOTALL | re.MULTILINE))


class Shop:
    """One application with its own copy of the hardening layer, on a stack whose topology is the documented one."""

    def __init__(self, folder: Path, stack: Stack, files: dict[str, str]) -> None:
        self.stack = stack
        self.folder = folder
        self.effects = folder / "effects"
        for name, content in {"shop/__init__.py": "", "shop/tasks.py": TASKS, **files}.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(hardening.__file__).parent, folder / "shop/hardening", ignore=ignored)
        self.effects.mkdir()
        self.effects.chmod(0o777)  # the worker is another user's

    def environment(self, role: str) -> dict[str, str]:
        """Return a role's settings, and where the application is: nowhere near this project's sources."""
        return {**self.stack.environment(role), "PYTHONPATH": str(self.folder), "EFFECTS": str(self.effects)}

    @contextmanager
    def working(self) -> Iterator[Worker]:
        """Run a worker with one child: what an honest task finds done, was done before it."""
        name = f"worker-{self.folder.name}"
        options = ("--concurrency", "1")
        worker = self.stack.start_worker("shop.celery", self.environment("worker"), name=name, options=options)
        try:
            yield worker
        finally:
            worker.stop()

    def call(self, script: str, **environment: str) -> Any:
        """Run a client; return what it says."""
        done = subprocess.run(
            [sys.executable, "-c", CLIENT + script],
            env={"PATH": "/usr/bin:/bin", **self.environment("client"), **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def capture(self, script: str) -> Message:
        """Take an honest client's message off the wire."""
        body, properties, exchange, key = self.call(f"say(capture({script}))")
        return Message(base64.b64decode(body), properties, exchange, key)

    def settle(self) -> None:
        """Let the worker do what was sent so far, and see that it still works."""
        assert self.call("say(tasks.add.delay(20, 22).get(timeout=30))") == 42

    def count(self, effect: str) -> int:
        """Return how often an effect happened."""
        return len(list(self.effects.glob(f"{effect}:*")))

    def wire(self, role: str = "client") -> Amqp:
        """Connect as whoever has this role's TLS certificate."""
        own = self.stack.environment(role)
        host = urlsplit(own["SECURE_CELERY_BROKER_URL"]).netloc
        ca, certificate, key = (Path(own[f"SECURE_CELERY_TLS_{name}"]) for name in ("CA", "CERTIFICATE", "KEY"))
        return Amqp(host, self.stack.topology.vhost, ca, Pair(certificate, key))


def altered(message: Message) -> Message:
    """The same message with another argument under the same signature."""
    header, payload, signature = message.body.split(b".")
    claims = base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4))
    assert b'"altered"' in claims
    forged = base64.urlsafe_b64encode(claims.replace(b'"altered"', b'"rewritten"')).rstrip(b"=")
    return message.with_body(b".".join((header, forged, signature)))


@pytest.fixture(scope="module")
def servers(temporary: Path) -> Iterator[Stack]:
    """Broker and backend with the documented topology."""
    folder = temporary / "embedding"
    folder.mkdir(mode=0o755)
    topology = folder / "topology.toml"
    topology.write_text(documented("Who may send what")["topology.toml"], encoding="utf-8")
    stack = Stack(ROOT, folder / "stack", topology=topology)
    stack.up(worker=False)
    yield stack
    stack.down()


@pytest.fixture(scope="class")
def plain(servers: Stack) -> Iterator[Shop]:
    shop = Shop(servers.folder.parent / "plain", servers, documented("A plain application"))
    with shop.working():
        yield shop


@pytest.fixture(scope="class")
def django(servers: Stack) -> Iterator[Shop]:
    shop = Shop(servers.folder.parent / "django", servers, {**documented("A Django project"), **DJANGO})
    with shop.working():
        yield shop


def test_permissions_are_rendered_for_another_project(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_text(documented("Who may send what")["topology.toml"], encoding="utf-8")
    command = [sys.executable, "-m", f"{hardening.__name__}.render", "--project", tmp_path]
    subprocess.run(command, cwd=ROOT / "src", check=True, timeout=60)
    definitions = json.loads((tmp_path / "deploy/rabbitmq/definitions.json").read_text(encoding="utf-8"))
    assert [vhost["name"] for vhost in definitions["vhosts"]] == ["shop"]
    assert "user shop.client on" in (tmp_path / "deploy/redis/users.acl").read_text(encoding="utf-8")


class TestPlainApplication:
    def test_signed_tasks_and_canvas_run(self, plain: Shop) -> None:
        said = plain.call("""
say([
    tasks.add.delay(1, 2).get(timeout=30),
    chain(tasks.add.s(1, 2), tasks.add.s(3))().get(timeout=30),
    chord(group(tasks.add.s(n, n) for n in range(3)), tasks.total.s())().get(timeout=30),
])
""")
        assert said == [3, 6, 6]

    def test_a_wrong_argument_is_refused(self, plain: Shop) -> None:
        said = plain.call('say(type(tasks.add.delay("1", 2).get(timeout=30, propagate=False)).__name__)')
        assert said == "InvalidArguments"

    def test_an_unsigned_task_does_not_run(self, plain: Shop) -> None:
        honest = plain.capture('tasks.leave, "honest"')
        headers = {"lang": "py", "task": "shop.tasks.leave", "id": uuid4().hex, "root_id": uuid4().hex}
        body = json.dumps([["unsigned"], {}, {}]).encode()
        unsigned = replace(honest, body=body).with_headers(**headers).with_properties(content_type="application/json")
        assert plain.wire().publish(unsigned)
        plain.settle()
        assert plain.count("unsigned") == 0

    def test_another_task_in_the_header_does_not_run(self, plain: Shop) -> None:
        message = plain.capture('tasks.leave, "retold"')
        assert plain.wire().publish(message.with_headers(task="shop.tasks.destroy"))
        plain.settle()
        assert plain.count("destroyed-retold") == 0

    def test_an_altered_body_does_not_run_and_the_true_one_does(self, plain: Shop) -> None:
        message, wire = plain.capture('tasks.leave, "altered"'), plain.wire()
        assert wire.publish(altered(message))
        plain.settle()
        assert plain.count("altered") == plain.count("rewritten") == 0
        assert wire.publish(message)
        plain.settle()
        assert plain.count("altered") == 1

    def test_a_stranger_is_refused(self, plain: Shop) -> None:
        identity = "spiffe://shop.test/development/shop/client"
        authority = plain.stack.pki.authority("stranger")
        stranger = authority.signer("stranger", identity)
        store = plain.folder / "stranger"  # with ours, it would know that it is one
        store.mkdir()
        (store / "ca.pem").write_bytes(authority.certificate.read_bytes())
        files = {
            "SECURE_CELERY_SECURITY_CERT_STORE": str(store),
            "SECURE_CELERY_SECURITY_KEY": str(stranger.key),
            "SECURE_CELERY_SECURITY_CERTIFICATE": str(stranger.certificate),
        }
        plain.call('tasks.leave.delay("stranger"); say(None)', **files)
        plain.settle()
        assert plain.count("stranger") == 0

    def test_what_was_refused_is_in_quarantine(self, plain: Shop) -> None:
        operator, quarantine = plain.wire("operator"), plain.stack.topology.quarantine
        operator.drain(quarantine)
        assert plain.wire().publish(plain.capture('tasks.leave, "honest"').with_body(b"garbage"))
        plain.settle()
        assert len(operator.drain(quarantine)) == 1


class TestDjangoProject:
    def test_django_keeps_its_task_class_and_settings(self, django: Shop) -> None:
        said = django.call("""
from celery.contrib.django.task import DjangoTask
say([isinstance(tasks.add, DjangoTask), app.conf.result_expires, tasks.add.delay(1, 2).get(timeout=30)])
""")
        assert said == [True, 42, 3]

    def test_delay_on_commit_sends_after_the_commit_and_not_after_a_rollback(self, django: Shop) -> None:
        said = django.call("""
import django, os
django.setup()
from django.db import transaction
with transaction.atomic():
    tasks.leave.delay_on_commit("committed")
    inside = tasks.add.delay(1, 2).get(timeout=30)
    early = [name for name in os.listdir(os.environ["EFFECTS"]) if name.startswith("committed")]
try:
    with transaction.atomic():
        tasks.leave.delay_on_commit("rolled-back")
        raise LookupError
except LookupError:
    pass
say([inside, early])
""")
        assert said == [3, []]
        django.settle()
        assert django.count("committed") == 1
        assert django.count("rolled-back") == 0

    def test_an_altered_body_does_not_run(self, django: Shop) -> None:
        message = django.capture('tasks.leave, "altered"')
        assert django.wire().publish(altered(message))
        django.settle()
        assert django.count("altered") == django.count("rewritten") == 0
