"""The quarantine on a real broker: the operator's command, exactly one run, and floods that end no worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from stack.worker import Worker

from ...project import claims, codec, envelope, intake_redis, quarantine, render
from . import brokers
from .everything import within
from .running import ROOT, SOON, TASKS, Running
from .test_reliability import healthy

__all__ = ["healthy"]

MEGABYTE = 1024 * 1024
QUEUE, QUARANTINE = "everything.default", "everything.quarantine"
#: Messages of the flood that `make test` sends, and those that `make test-all` does.
MANY = int(os.environ.get("FLOOD", "1000"))

pytestmark = pytest.mark.timeout(300 + MANY // 4)


@pytest.fixture(autouse=True)
def empty(running: Running, healthy: None) -> Iterator[None]:
    """Begin and end with an empty quarantine: in a full one each record pushes another one out."""
    purge(running)
    yield
    purge(running)


def purge(running: Running) -> None:
    if brokers.NAME == "redis":
        running.stack.redis_broker("DEL", QUARANTINE)
    else:
        running.stack.rabbitmqctl("purge_queue", "-p", "everything", QUARANTINE)
    assert within(SOON, lambda: running.length("quarantine") == 0)


def command(running: Running, *arguments: str, role: str = "operator") -> subprocess.CompletedProcess[str]:
    """Run the operator's command in a role's name, as the workers' unprivileged user."""
    return subprocess.run(
        [sys.executable, "-m", f"{render.__name__.rpartition('.')[0]}.refused", *arguments],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"], **running.stack.environment(role)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **running.stack.account.popen_options(),
    )


def listed(running: Running) -> list[dict[str, str]]:
    done = command(running, "list")
    assert done.returncode == 0, done.stderr
    columns = ("id", "at", "code", "size", "signer", "task")
    return [dict(zip(columns, line.split("  "), strict=True)) for line in done.stdout.splitlines()]


def refused(running: Running, *codes: str) -> list[dict[str, str]]:
    """Wait until so many messages were refused, for these reasons; return what the operator sees."""
    assert within(SOON, lambda: running.waiting("quarantine") >= len(codes))
    found = listed(running)
    assert sorted(each["code"] for each in found) == sorted(codes)
    return found


def claimed(running: Running, task: str, *args: Any, **changes: Any) -> dict[str, Any]:
    """Return what a client claims of a task that it sends."""
    own, now, task_id = running.client.hardening.signer.identity, int(time.time()), str(uuid4())
    return {
        "iss": str(own),
        "aud": own.audience,
        "iat": now,
        "exp": now + 600,
        "jti": claims.new_id(),
        "origin": str(own),
        "owner": str(own),
        "queue": QUEUE,
        "task": {"name": f"{TASKS}.{task}", "id": task_id, "root_id": task_id, "ignore_result": False},
        "args": args,
        "kwargs": {},
        "embed": {},
        **changes,
    }


def signed(running: Running, fields: dict[str, Any], signer: envelope.Signer | None = None) -> bytes:
    return bytes((signer or running.client.hardening.signer).sign(envelope.Type.TASK, codec.encode(fields)))


def publish(running: Running, *bodies: bytes | tuple[bytes, dict[str, Any]]) -> None:
    """Publish as whoever has the client's account may."""
    with running.client.connection_for_write() as connection:
        producer = connection.Producer()
        for each in bodies:
            body, options = each if isinstance(each, tuple) else (each, {})
            producer.publish(
                body,
                **{
                    "exchange": running.client.hardening.broker.exchange,
                    "routing_key": QUEUE,
                    "content_type": envelope.CONTENT_TYPE,
                    "content_encoding": "utf-8",
                    "delivery_mode": 2,
                    **options,
                },
            )


def short_lived(running: Running, key: str) -> tuple[bytes, str]:
    """Return a message that has expired, and its task's id."""
    now = int(time.time())
    fields = claimed(running, "counted", key, iat=now - 200, exp=now - 100)
    return signed(running, fields), fields["task"]["id"]


# --- release ----------------------------------------------------------------------------------------------------------


def test_a_message_that_was_released_runs_once_and_its_caller_gets_the_result(running: Running, key: str) -> None:
    body, task_id = short_lived(running, key)
    publish(running, body)
    [found] = refused(running, "message.expired")
    assert (found["signer"], found["task"]) == (str(running.client.hardening.signer.identity), f"{TASKS}.counted")
    shown = command(running, "inspect", found["id"])
    assert json.loads(shown.stdout)["task_id"] == task_id
    assert key not in shown.stdout + shown.stderr
    done = command(running, "release", found["id"])
    assert (done.returncode, done.stdout) == (0, f"{found['id']}: release\n")
    assert running.happens(key)
    assert within(SOON, lambda: running.client.AsyncResult(task_id).state == "SUCCESS")
    assert running.client.AsyncResult(task_id).get(timeout=SOON) == key
    assert listed(running) == []
    again = quarantine.countersign(running.caller("operator").hardening, body)
    publish(running, *[again] * 5, body)
    refused(running, *["message.replayed"] * 5, "message.expired")
    assert running.count(key) == 1
    done = command(running, "release", "message.replayed", "message.expired")
    assert done.returncode == 1
    refused(running, *["message.replayed"] * 6)
    assert running.count(key) == 1


def test_a_release_by_anybody_else_is_refused(running: Running, key: str) -> None:
    body, _ = short_lived(running, key)
    operator = running.caller("operator").hardening
    forged = []
    for role in ("client", "worker", "monitor"):
        party = running.caller(role).hardening
        fields = {"iss": str(party.signer.identity), "aud": party.audience, "iat": int(time.time()), "jti": "1"}
        fields |= {"exp": fields["iat"] + 60, "of": quarantine.hashlib.sha256(body).hexdigest()}
        forged.append(body + b"~" + party.signer.sign(envelope.Type.RELEASE, codec.encode(fields)))
    other = quarantine.countersign(operator, short_lived(running, key)[0])
    altered = quarantine.countersign(operator, body)[:-4] + b"AAAA"
    publish(running, *forged, body + b"~" + other.partition(b"~")[2], altered)
    refused(running, *["control.denied"] * 3, *["message.signature"] * 2)
    for role, action in (("client", "release"), ("worker", "drop"), ("monitor", "list")):
        done = command(running, action, "control.denied", role=role)
        assert (done.returncode, done.stdout) == (2, "")
        assert "[worker.identity]" in done.stderr
    assert command(running, "release", "control.denied", "message.signature").returncode == 1
    assert len(listed(running)) == 5
    assert running.count(key) == 0


def test_a_message_that_a_new_rule_allows_runs_when_released(running: Running, key: str) -> None:
    shop = running.caller("shop").hardening.signer
    iss = dict.fromkeys(("iss", "origin", "owner"), str(shop.identity))
    fields = claimed(running, "counted", key, **iss)
    publish(running, signed(running, fields, shop))
    refused(running, "policy.denied")
    assert command(running, "release", "policy.denied").returncode == 0
    refused(running, "policy.denied")
    rules = Path(running.stack.environment("worker")["SECURE_CELERY_TOPOLOGY"])
    wider = rules.with_name(f"{key}.toml")
    wider.write_text(rules.read_text().replace('everything.becomes"', 'everything.*"'))
    running.worker.stop()
    running.worker = running.start("worker", SECURE_CELERY_TOPOLOGY=str(wider))
    assert running.count(key) == 0
    assert command(running, "release", "policy.denied").returncode == 0
    assert running.happens(key)
    assert listed(running) == []
    running.worker.stop()
    assert running.count(key) == 1


def test_a_release_ends_though_all_of_it_is_refused_again(running: Running) -> None:
    shop = running.caller("shop").hardening.signer
    iss = dict.fromkeys(("iss", "origin", "owner"), str(shop.identity))
    publish(running, *(signed(running, claimed(running, "counted", "never", **iss), shop) for _ in range(5)))
    refused(running, *["policy.denied"] * 5)
    done = command(running, "release", "policy.denied")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 5)
    refused(running, *["policy.denied"] * 5)


def test_what_is_dropped_is_gone_and_the_rest_stays(running: Running, key: str) -> None:
    publish(running, b"garbage", short_lived(running, key)[0], b"\x1b[2J\xff")
    first, second, _ = refused(running, "message.unsigned", "message.expired", "message.unsigned")
    assert command(running, "drop", "nothing").returncode == 1
    done = command(running, "drop", "message.unsigned")
    assert done.returncode == 0
    assert "quarantine.dropped" in done.stderr
    refused(running, "message.expired")
    assert {first["code"], second["code"]} == {"message.unsigned", "message.expired"}
    assert running.count(key) == 0


# --- floods -----------------------------------------------------------------------------------------------------------


def serves(running: Running) -> bool:
    return bool(running.task("add").delay(1, 2).get(timeout=4 * SOON) == 3) and running.worker.alive()


@pytest.mark.broker("rabbitmq")
def test_delays_that_are_not_left_to_the_broker_keep_nobody_waiting(running: Running) -> None:
    """What waits for its time in a worker is in the place of others: it has no more than it prefetches."""
    eta = datetime.now(UTC) + timedelta(hours=1)
    for _ in range(20):
        fields = claimed(running, "effect", "never", exp=int(eta.timestamp()) + 600)
        fields["task"]["eta"] = eta.isoformat()
        publish(running, signed(running, fields))
    assert serves(running)
    refused(running, *["message.delay"] * 20)


def test_a_flood_of_large_messages_does_not_fill_the_broker(running: Running) -> None:
    """The oldest go: 100 MB that were refused are twice as many with what is around them, and 64 MB stay."""
    publish(running, *(str(number).encode() + b"x" * (MEGABYTE - 10) for number in range(100)))
    assert serves(running)
    assert within(SOON, lambda: running.waiting("default") == 0 and 20 < running.waiting("quarantine") < 40)
    publish(running, b"the last one")
    assert within(SOON, lambda: any(each["size"] == "12" for each in listed(running)))
    assert running.waiting("dead") == 0


@pytest.mark.broker("redis")
def test_of_small_messages_ten_thousand_are_kept(running: Running) -> None:
    with running.caller("worker").connection_for_write() as connection:
        for _ in range(10):
            connection.default_channel.client.lpush(QUARANTINE, *["x"] * 1000)
    assert running.waiting("quarantine") == intake_redis.KEPT_MESSAGES
    publish(running, b"one", b"two")
    assert serves(running)
    assert running.waiting("quarantine") == intake_redis.KEPT_MESSAGES


def kinds(running: Running) -> Iterator[bytes | tuple[bytes, dict[str, Any]]]:
    """Yield a bad message of each kind, each time another one."""
    client, now = running.client.hardening.signer, int(time.time())
    foreign = _signer(running.stack.pki.authority("foreign").signer("foreign", str(client.identity)))
    stray = running.caller("monitor").hardening.signer
    ran = signed(running, claimed(running, "add", 1, 2))
    publish(running, ran)
    bomb = zlib.compress(b"\0" * 50 * MEGABYTE)
    number = 0
    while True:
        number += 1
        unique = os.urandom(32)
        good = claimed(running, "add", number, 2)
        body = signed(running, good)
        header, payload, signature = body.split(b".")
        yield unique
        yield b""
        yield unique, {"content_type": "application/x-python-serialize"}
        yield json.dumps([[number], {}, {}]).encode(), {"content_type": "application/json", "headers": {"task": "x"}}
        yield bomb, {"headers": {"compression": "application/x-gzip"}}
        yield unique * 1024 * 40  # 1.3 MB
        yield b".".join((header, payload, b"A" * len(signature)))
        yield b".".join((envelope._b64(unique), payload, signature))
        yield b".".join((envelope._b64(b"[" * 10_000), payload, signature))
        x5c = envelope._b64(json.dumps({"alg": "EdDSA", "typ": "celery-task+jws", "x5c": [unique.hex()] * 3}).encode())
        yield b".".join((x5c, payload, signature))
        yield signed(running, good, foreign)
        yield signed(running, {**good, "iss": str(stray.identity)}, stray)
        yield client.sign(envelope.Type.RESULT, codec.encode(good))
        yield client.sign(envelope.Type.TASK, unique)
        yield client.sign(envelope.Type.TASK, b'{"a":' * 20_000 + b"1" + b"}" * 20_000)
        yield client.sign(envelope.Type.TASK, b"[" + b"9" * 200_000 + b"]")
        yield signed(running, {**good, "args": [["x"] * 50_000]})[:-1]
        yield signed(running, {**good, "kwargs": _nested(300)})
        yield signed(running, {**good, "aud": good["aud"] + "x"})
        yield signed(running, {**good, "exp": now - 100, "iat": now - 200})
        yield signed(running, {**good, "iat": now + 9_000, "exp": now + 9_600})
        yield signed(running, {**good, "queue": "everything.slow"})
        yield signed(running, {**good, "task": {**good["task"], "name": f"no.{unique.hex()}"}})
        yield signed(running, {**good, "task": {**good["task"], "name": "celery.backend_cleanup"}})
        yield signed(running, {**good, "task": {**good["task"], "x" * 1000: 1}})
        yield ran
        yield body + b"~" + unique
        yield body + b"~" + client.sign(envelope.Type.RELEASE, codec.encode({"of": unique.hex()}))


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def _signer(pair: Any) -> envelope.Signer:
    chain = x509.load_pem_x509_certificates(pair.certificate.read_bytes())
    return envelope.Signer(load_pem_private_key(pair.key.read_bytes(), None), chain)


def memory(worker: Worker, what: str) -> int:
    """Return a figure of the worker's main process, in bytes."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024


def test_a_worker_under_bad_messages_of_every_kind_does_not_grow(running: Running) -> None:
    running.worker.stop()
    running.worker = running.start("worker")
    assert serves(running)
    before = memory(running.worker, "VmRSS")
    Path(f"/proc/{running.worker.pid}/clear_refs").write_text("5")  # forget the peak of the start
    flood = kinds(running)
    for _ in range(0, MANY, 500):
        publish(running, *islice(flood, 500))
        assert within(4 * SOON, lambda: running.waiting("default") == 0)
    assert serves(running)
    grown, peak = (memory(running.worker, what) - before for what in ("VmRSS", "VmHWM"))
    print(f"{MANY} bad messages: grown {grown / MEGABYTE:.1f} MB, at most {peak / MEGABYTE:.1f} MB")
    assert peak < 50 * MEGABYTE
    assert running.worker.alive()
    assert running.waiting("dead") == 0
