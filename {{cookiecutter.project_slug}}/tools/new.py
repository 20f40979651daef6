"""``make new-task|new-queue|new-caller NAME=...``: write what is needed in the places where it belongs, and say so.

Guards against: a new queue or caller whose permissions were forgotten, or copied with more rights than it needs.
Rests on: ``topology.toml`` being the one source; whatever is refused is refused before anything is written.
Controls: BRK-6, AUT-1, VAL-1.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from pathlib import Path

import tomlkit

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = ROOT / "topology.toml"
PACKAGE = next((ROOT / "src").glob("*/hardening/__init__.py")).parents[1]

TASK = '''"""{title}."""

from __future__ import annotations

import logging

from celery import shared_task

logger = logging.getLogger(__name__)


@shared_task(max_retries=3, time_limit=30, soft_time_limit=20)
def {name}(item: str) -> None:
    """Do one thing that may safely be done twice. Annotate every argument; `ignore_result=False` keeps a result."""
    logger.info("{name} does nothing yet")
'''
TEST = '''"""{title}, through signing, gate and strict arguments."""

from __future__ import annotations

from ..project import errors, tasks
from ..service import Service


def test_{name}_is_sent_signed_and_admitted(service: Service) -> None:
    service.send(tasks.{name}.{name}, "one")
    assert service.work() == 1


def test_{name}_refuses_another_type(service: Service) -> None:
    result = service.client.app.tasks[tasks.{name}.{name}.name].apply_async((1,), ignore_result=False)
    service.work()
    assert isinstance(result.result, errors.InvalidArguments)
'''


class Refused(Exception):
    """The sentence for a person."""


def new_task(name: str) -> list[Path]:
    """Write a task's module and its test, and import the module where tasks are imported."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise Refused(f"{name!r} is no module name: write a lower-case letter, then letters, digits or underscores")
    module, test, imports = (
        PACKAGE / "tasks" / f"{name}.py",
        ROOT / "tests/unit" / f"test_{name}.py",
        PACKAGE / "tasks/__init__.py",
    )
    for path in (module, test):
        if path.exists():
            raise Refused(f"{path.relative_to(ROOT)} exists already: choose another name")
    title = name.replace("_", " ").capitalize()
    text = imports.read_text(encoding="utf-8")
    modules = sorted({*re.findall(r"^from \. import (.+)$", text, re.MULTILINE)[0].split(", "), name})
    text = re.sub(r"^from \. import .+$", f"from . import {', '.join(modules)}", text, count=1, flags=re.MULTILINE)
    listed = ", ".join(f'"{item}"' for item in ["app", *modules])
    text = re.sub(r"^__all__ = \[.*\]$", f"__all__ = [{listed}]", text, count=1, flags=re.MULTILINE)
    module.write_text(TASK.format(name=name, title=title), encoding="utf-8")
    test.write_text(TEST.format(name=name, title=title), encoding="utf-8")
    imports.write_text(text, encoding="utf-8")
    return [module, test, imports]


def new_queue(name: str, pool: str) -> list[Path]:
    """Add a queue, consumed by one worker pool; who may send to it is for you to say."""
    text = TOPOLOGY.read_text(encoding="utf-8")
    document = tomlkit.parse(text)
    if name in document["queues"]:
        raise Refused(f"topology.toml has a queue {name!r} already")
    if pool not in document["pools"]:
        raise Refused(f"topology.toml has no worker pool {pool!r}: it has {', '.join(document['pools'])}")
    end = [stanza.end() for stanza in re.finditer(r"^\[queues\..+\]\n(?:\w.*\n)*", text, re.MULTILINE)][-1]
    document = tomlkit.parse(f"{text[:end]}\n[queues.{tomlkit.key(name).as_string()}]\n{text[end:]}")
    document["pools"][pool]["queues"].append(name)
    return _write(tomlkit.dumps(document))


def new_caller(name: str, sends: list[str], identity: str | None) -> list[Path]:
    """Add a caller with an account and a certificate of its own, which may send tasks to one queue of this service."""
    document = tomlkit.parse(TOPOLOGY.read_text(encoding="utf-8"))
    callers = document["callers"]
    if name in callers:
        raise Refused(f"topology.toml has a caller {name!r} already")
    stanza = tomlkit.table()
    if identity:
        if not sends:
            raise Refused("name the tasks that another service may send: SENDS='one two'")
        stanza.add("identity", identity)
    stanza.add("queues", [next(iter(document["queues"]))])
    stanza.add("sends", sends or [f"{PACKAGE.name}.tasks.*"])
    callers.append(name, stanza)
    return _write(tomlkit.dumps(document))


def _write(text: str) -> list[Path]:
    """Replace the topology and render what follows from it, or leave everything as it was."""
    sys.path.insert(0, str(ROOT / "src"))
    render = importlib.import_module(f"{PACKAGE.name}.hardening.render")
    errors = importlib.import_module(f"{PACKAGE.name}.hardening.errors")
    before = TOPOLOGY.read_text(encoding="utf-8")
    TOPOLOGY.write_text(text, encoding="utf-8")
    try:
        topology = render.Topology.load(TOPOLOGY)
        rendered = {**_manifests(topology), **render.rendered(topology)}
    except errors.ConfigurationRefused as error:
        TOPOLOGY.write_text(before, encoding="utf-8")
        raise Refused(str(error)) from None
    for path, content in rendered.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(content, encoding="utf-8")
    return [TOPOLOGY, *(ROOT / path for path in rendered)]


def _manifests(topology):
    """What a project that runs on Kubernetes renders besides."""
    tool = ROOT / "tools/kubernetes.py"
    return runpy.run_path(str(tool))["rendered"](topology) if tool.exists() else {}


def main() -> int:
    """Return 0 after saying what was written, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="new")
    parser.add_argument("what", choices=["task", "queue", "caller"])
    parser.add_argument("name")
    parser.add_argument("--pool", default="worker", help="the worker pool that consumes a new queue")
    parser.add_argument("--sends", default="", help="the tasks that a new caller may send")
    parser.add_argument("--identity", help="who a new caller is that is another service")
    options = parser.parse_args()
    try:
        if options.what == "task":
            written = new_task(options.name)
        elif options.what == "queue":
            written = new_queue(options.name, options.pool)
        else:
            written = new_caller(options.name, options.sends.split(), options.identity)
    except (Refused, tomlkit.exceptions.TOMLKitError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    if options.what == "queue":
        print(f'Nobody sends to it yet: add "{options.name}" to a caller in topology.toml, then make topology')
    if options.what == "caller" and options.identity:
        print(f"Give {written[-1].relative_to(ROOT)} to {options.name}: it says all that they need to know")
    elif options.what == "caller" and not options.sends:
        print("It may send every task of this service: narrow that in topology.toml, then make topology")
    return 0


if __name__ == "__main__":
    sys.exit(main())
