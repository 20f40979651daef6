"""Attacks by someone beside the broker: at the result backend, on the network, or on a host that workers run on.

What `.get()` returns becomes the caller's truth: it must be the result of this task, said by a worker. The others are
what TLS and file permissions must withstand.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any
from unittest import mock

from stack import StackFailed
from stack.pki import Authority, Pair

from .attack import BACKEND, BACKEND_AND_SIGNER, FILES, NETWORK, NOTHING, RABBITMQ, REDIS, BrokenAttack, attack
from .target import Target, within

CHANCES = 20
"""Messages sent while two workers consume, so that each gets some."""


# -- at the result backend: a stolen worker account, or Redis left open ------------------------------------------------


def paid(target: Target, amount: int) -> str:
    """Have an honest payment made; its id."""
    result = target.app.tasks["attacks.pay"].delay(amount)
    if not within(5.0, lambda: target.answer(result.id) == amount):
        raise BrokenAttack("an honest payment has no result")
    return str(result.id)


@attack("X16", "Give a caller the result of another task", control="RES-1", assumes=BACKEND)
def swapped_result(target: Target) -> str | None:
    """Both values are genuine."""
    small, large = paid(target, 1), paid(target, 1000)
    target.results.set(target.result_key(small), target.results.get(target.result_key(large)))
    answer = target.answer(small)
    return f"the caller who paid 1 is told {answer}" if answer == 1000 else None


@attack("X17", "Forge a result with a client's key", control="RES-1", assumes=BACKEND_AND_SIGNER)
def forged_result(target: Target) -> str | None:
    pending = target.capture("attacks.pay", 5)
    target.results.set(target.result_key(pending.task_id), target.forged_result("client", pending.task_id, 999))
    answer = target.answer(pending.task_id)
    return f"the caller is told {answer} of a payment never made" if answer == 999 else None


@attack(
    "X18",
    "Forge a result without any key",
    control="RES-1",
    assumes=BACKEND,
    withstood="its results have to be signed as well",
)
def unsigned_result(target: Target) -> str | None:
    pending = target.capture("attacks.pay", 5)
    meta = {"status": "SUCCESS", "result": 999, "traceback": None, "children": [], "task_id": pending.task_id}
    target.results.set(target.result_key(pending.task_id), json.dumps(meta))
    answer = target.answer(pending.task_id)
    return f"the caller is told {answer} of a payment never made" if answer == 999 else None


# -- without an account ------------------------------------------------------------------------------------------------


def foreign(target: Target) -> Authority:
    """An authority of the attacker's own."""
    return target.stack.pki.authority(f"foreign-{target.name}")


@attack(
    "X27",
    "Publish without an account at the broker",
    control="TLS-2",
    assumes=NOTHING,
    withstood="the broker, here the same for both, asks for a certificate",
)
def no_account(target: Target) -> str | None:
    """A certificate of one's own with the account's name in it and, over Redis, even with the account's password."""
    outsider = target.wire(target.account, foreign(target).client(target.account))
    try:
        outsider.publish(target.capture("attacks.pay", 1))
    except target.refusals:
        target.forbidden += 1
    finally:
        outsider.close()
    target.settle()
    return "a payment arrived from nobody" if target.ran("pay") else None


# -- on the network ---------------------------------------------------------------------------------------------------


@contextmanager
def between(target: Target, presented: Pair) -> Iterator[bytearray]:
    """Answer for the broker with any certificate, and pass on with one's own what comes; what was said.

    Callers are led here by what the network tells them of the broker's address.
    """
    heard, loop = bytearray(), asyncio.new_event_loop()
    front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(presented.certificate, presented.key)
    back = ssl.create_default_context(cafile=target.stack.pki.tls.certificate)
    back.load_cert_chain(target.pair.certificate, target.pair.key)

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, record: bytearray) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                record += data
                sink.write(data)
        sink.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, upstream = await asyncio.open_connection(*target.address, ssl=back)
        await asyncio.gather(pass_on(reader, upstream, heard), pass_on(answers, writer, bytearray()))

    server = loop.run_until_complete(asyncio.start_server(meet, "127.0.0.1", 0, ssl=front))
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    honest, here = socket.getaddrinfo, server.sockets[0].getsockname()

    def led_astray(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        return honest(*(here if (host, port) == target.address else (host, port)), *arguments, **options)

    try:
        with mock.patch("socket.getaddrinfo", led_astray):
            yield heard
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        server.close()
        if left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def confided(target: Target, presented: Pair) -> bool:
    """Whether a caller hands its message to the attacker, who presents this certificate."""
    task = str(uuid.uuid4())
    with between(target, presented) as heard, target.documented() as connection, suppress(*target.refusals):
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        target.app.tasks["attacks.pay"].apply_async((7,), task_id=task, connection=connection, retry=False)
    target.settle()
    target.injected += (handed := task.encode() in heard)  # for it was passed on
    return handed


def taken_for_the_broker(target: Target, *presented: Pair) -> str | None:
    """Whether one of these certificates is as good as the broker's own."""
    if not confided(target, target.stack.pki.tls.server(f"broker-{target.name}", target.address[:1])):
        raise BrokenAttack("no caller comes to the attacker's server, not even to a right certificate")
    handed = any(confided(target, one) for one in presented)
    return "a caller handed its payment to the attacker's server" if handed else None


@attack(
    "X28",
    "Be the broker: a certificate of one's own",
    control="TLS-1",
    assumes=NETWORK,
    withstood="it looks who issued the certificate, and what for",
)
def own_server(target: Target) -> str | None:
    """Self-made, and a genuine one that was issued to a client."""
    self_made = foreign(target).server("broker", target.address[:1])
    return taken_for_the_broker(target, self_made, target.stack.pki.tls.client(f"thief-{target.name}"))


def other_server(target: Target) -> str | None:
    """Each server has a genuine certificate, and one that was broken into need not be the broker."""
    return taken_for_the_broker(target, target.stack.pki.tls.server(f"other-{target.name}", ("other.example",)))


attack("X29.1", "Be the broker: another server's key", control="TLS-1", assumes=NETWORK, only=RABBITMQ)(other_server)
attack(
    "X29.2",
    "Be the broker: another server's key",
    control="TLS-1",
    assumes=NETWORK,
    only=REDIS,
    withstood="redis-py looks at the host name unless it is told not to",
)(other_server)


# -- on the host ------------------------------------------------------------------------------------------------------


@attack("X30", "Become a signer: a file in the trust store", control="SIG-2", assumes=FILES)
def planted(target: Target) -> str | None:
    """Every user of the host may write to that folder. A worker that runs looks at it again, and one more starts."""
    planted = [target.store / f"stranger{file.suffix}" for file in target.intruder]
    mode, started = target.store.stat().st_mode, None
    target.store.chmod(0o777)
    try:
        for file, there in zip(target.intruder, planted, strict=True):
            there.write_bytes(file.read_bytes())
            there.chmod(0o644)
        try:
            started = target.start_worker(f"second-{target.name}")
        except StackFailed as error:
            if "can replace files" not in str(error):
                raise BrokenAttack("a worker does not start for another reason") from error
        for _ in range(CHANCES):
            target.inject(target.signed("stranger", "attacks.pay", 1))
        target.settle()
        paid = target.ran("pay")
    finally:
        for there in planted:
            there.unlink(missing_ok=True)
        target.store.chmod(mode)
        if started:
            started.stop()
    return "a payment was made that a user of the host had signed" if paid else None
