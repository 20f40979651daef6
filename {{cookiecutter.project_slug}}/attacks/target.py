"""A target: one application with its worker, seen from where an attacker stands, and the means to judge an effect.

Guards against attacks that look repelled because the harness was broken: `settle()` sends honest messages through the
same queue and waits until they were served, so that "nothing happened" is only said of a worker that works.
Assumes one pool child and one queue in order: what was sent before an honest message has been dealt with when that was
served.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from amqp.exceptions import AMQPError
from kombu import Producer
from kombu.exceptions import KombuError

from stack import Stack
from stack.pki import Pair

from .attack import REDIS, BrokenAttack, Outage
from .targets.tasks import EFFECTS
from .wire import Amqp, Message, Redis, Wire

OBSERVER = "attacks.observer"
"""The harness's own account, which may do everything."""
PATIENCE = 8.0
"""Seconds within which an honest message must be served; a healthy worker takes well under 0.1."""


def within(seconds: float, condition: Callable[[], Any]) -> Any:
    """Poll until the condition is true or the time is up; its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return value


class Target(ABC):
    """What an attack can do to an application and see of it.

    `space` is what the application has of the broker: a virtual host, or a Redis database. `account` is what the
    attacker logs in to it with, and `pair` the certificate for that. `broadcasts` is what the names of Redis' channels
    begin with. `store` is the folder of those who may sign, and `intruder` what the stranger would have to have in it.
    """

    name: str
    module: str
    queue: str
    other_queue: str
    broadcasts: str
    account: str
    pair: Pair
    attacker: Wire
    results: Any
    store: Path
    intruder: tuple[Path, ...]
    refusals = (AMQPError, KombuError, redis.RedisError, OSError)

    def __init__(self, stack: Stack, observer: Pair, space: str, held: tuple[str, str]) -> None:
        self.stack = stack
        self.space = space
        self.held = held
        self.effects = stack.folder / f"effects-{self.name}"
        stack.account.folder(self.effects)
        self.observer = self.wire(OBSERVER, observer)
        self.worker: Any = None
        self.app: Any = None
        self.injected = self.forbidden = 0
        self.serves = False

    # -- what the targets do differently ------------------------------------------------------------------------------

    @abstractmethod
    def environment(self, role: str) -> dict[str, str]:
        """The settings that the application reads, for one of its roles."""

    @abstractmethod
    def colleague(self) -> Wire:
        """A broker connection with the account of the workers."""

    @abstractmethod
    def retold(self, task: str, /, *args: Any, **claims: Any) -> Iterator[Message]:
        """A signed message seen on the wire, told differently in every way that needs no key."""

    @abstractmethod
    def signed(
        self, signer: str, task: str, /, *args: Any, embed: Mapping[str, Any] | None = None, **claims: Any
    ) -> Message:
        """A message made by hand and signed with the key of `client`, `monitor` or a `stranger`."""

    @abstractmethod
    def signed_body(self, signer: str, body: object) -> Iterator[Message]:
        """Messages whose signature holds and whose body, wherever a body may stand, is `body`."""

    @abstractmethod
    def pickled(self, signer: str, pickle: bytes) -> Iterator[Message]:
        """Every way in which a trusted signer could get a pickle decoded."""

    @abstractmethod
    def unsigned(self, task: str, /, *args: Any) -> Iterator[Message]:
        """Messages to a task that nobody signed, in every dress that might pass."""

    @abstractmethod
    def misattributed(self, task: str, /, *args: Any) -> Iterator[Message]:
        """Messages that name a trusted signer's certificate, signed with a key that nobody trusts."""

    @abstractmethod
    def protocol_1(self, task: str, /, *args: Any, told: str) -> Iterator[Message]:
        """Signed messages in the shape of Celery's protocol 1, with a header that names another task."""

    @abstractmethod
    def from_elsewhere(self, task: str, /, *args: Any) -> Iterator[Message]:
        """Messages signed for another environment by one who is trusted there."""

    @abstractmethod
    def guises(self, victim: str) -> Iterator[dict[str, Any]]:
        """What a signer could add to its own message to pass for the victim."""

    @abstractmethod
    def outdated(self, task: str, /, *args: Any) -> Message:
        """A message that was signed too long ago."""

    @abstractmethod
    def forged_result(self, signer: str, task_id: str, result: object) -> bytes:
        """A successful result as a worker would store it, signed with any key."""

    @abstractmethod
    def command(self, signer: str, method: str, **arguments: Any) -> Message:
        """A command of remote control, signed with any key."""

    @abstractmethod
    def documented(self) -> Any:
        """An honest caller's connection to the broker, with no more TLS settings than the documentation shows."""

    @abstractmethod
    def quarantined(self) -> list[str]:
        """The reasons of the messages that were refused and kept since the last `clear()`."""

    # -- the attacker -------------------------------------------------------------------------------------------------

    def capture(self, task: str, /, *args: Any, **options: Any) -> Message:
        """Take an honest caller's message off the wire; it does not arrive."""
        caught: list[Message] = []

        def catch(message: Any, exchange: str = "", routing_key: str = "", **_: Any) -> None:
            caught.append(self.attacker.seen(message, exchange, routing_key))

        with self.app.producer_pool.acquire(block=True) as producer:
            channel = producer.channel
            honest = channel.basic_publish
            channel.basic_publish = catch
            try:
                sent = self.app.tasks[task].apply_async(args, producer=producer, **options)
            finally:
                channel.basic_publish = honest
        if len(caught) != 1:
            raise BrokenAttack(f"{len(caught)} messages were on the wire where one was expected")
        return replace(caught[0], task_id=sent.id)

    def inject(self, message: Message) -> bool:
        """Publish with the attacker's account; False when the broker did not let it."""
        published = self.attacker.publish(message)
        self.injected += published
        self.forbidden += not published
        return published

    def give(self, signer: str, method: str, **arguments: Any) -> None:
        """Send the workers a command, with all rights at the broker."""
        message, exchange = self.command(signer, method, **arguments), self.app.control.mailbox.exchange
        with self.observer.connection() as connection, Producer(connection.channel()) as producer:
            producer.publish(message.body, exchange=exchange, declare=[exchange], **message.properties)
        self.settle()

    # -- the effect ---------------------------------------------------------------------------------------------------

    def ran(self, effect: str = "") -> list[dict[str, Any]]:
        """What the tasks left behind since the last `clear()`: all but honest pings, or one kind."""
        found = []
        for path in sorted(self.effects.iterdir()):
            kind = path.name.rpartition("-")[0]
            if not path.name.startswith(".") and (kind == effect if effect else kind != "ping"):
                found.append(json.loads(path.read_text() or "{}"))
        return found

    def settle(self) -> float:
        """Wait until honest messages, sent now, were served; how long one took. Raises `Outage`.

        Two of them, one after the other: a worker that is about to exit still serves what it has read already.
        """
        return max(self._serve_one(), self._serve_one())

    def _serve_one(self) -> float:
        token = uuid.uuid4().hex
        started = time.monotonic()
        self.app.tasks["attacks.ping"].apply_async((token,))

        def served() -> bool:
            return any(one["token"] == token for one in self.ran("ping"))

        within(PATIENCE, lambda: served() or not self.worker.alive())
        if served():
            return time.monotonic() - started
        if self.worker.alive():
            raise Outage(f"the worker serves nothing for {PATIENCE:.0f} s")
        waiting = within(2.0, lambda: self.observer.depth(self.queue))
        raise Outage(f"the worker exited, and {waiting} messages wait for the next one")

    def outage(self) -> str | None:
        """Whether honest messages are no longer served, as the effect of an attack on availability."""
        try:
            self.settle()
        except Outage as effect:
            self.serves = False
            return str(effect)
        return None

    def lost(self) -> str | None:
        """Whether a message that was injected is neither done, nor waiting, nor kept anywhere."""
        self.settle()

        def missing() -> int:
            return self.injected - len(self.ran()) - len(self.quarantined()) - self.observer.depth(self.queue)

        within(2.0, lambda: missing() == 0)
        return f"{missing()} of {self.injected} messages are gone without a trace" if missing() > 0 else None

    def unaccounted(self) -> str | None:
        """Whether what was refused has been lost; asked after an attack that had no effect."""
        return None

    def defence(self) -> str:
        """What became of the attacker's messages."""
        return "no effect"

    def state(self, task_id: str) -> str:
        """What a caller is told of a task."""
        return str(self.app.AsyncResult(task_id).state)

    def answer(self, task_id: str) -> Any:
        """What a caller gets: the result, or the name of the error that ends its wait."""
        self.app.backend.result_consumer.stop()
        self.app._backend_cache = None  # a caller who has not heard of the task: nothing remembered, nothing buffered
        vars(self.app._local).pop("backend", None)
        try:
            return self.app.AsyncResult(task_id).get(timeout=2, interval=0.05)
        except Exception as error:
            return type(error).__name__

    def result_key(self, task_id: str) -> bytes:
        """The backend's key of a caller's result."""
        key: bytes = self.app.backend.get_key_for_task(task_id)
        return key

    def peak_memory(self) -> int:
        """The most memory that the worker's main process ever had, in bytes."""
        status = Path(f"/proc/{self.worker.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    # -- the harness --------------------------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[str, int]:
        """Where the broker listens."""
        url = urlsplit(self.stack.environment("client")["SECURE_CELERY_BROKER_URL"])
        return str(url.hostname), int(url.port or 0)

    def wire(self, account: str, client: Pair) -> Wire:
        """A broker connection of an account."""
        host = ":".join(map(str, self.address))
        ca = Path(self.stack.environment("client")["SECURE_CELERY_TLS_CA"])
        if self.stack.topology.broker != REDIS:
            return Amqp(host, self.space, ca, client)
        password = self.password("redis-broker", account)
        return Redis(host, self.space, ca, client, account, password, self.held, self.broadcasts)

    def backend(self, account: str, client: Pair) -> Any:
        """A backend connection with an account's password and client certificate."""
        environment = self.stack.environment("client")
        url = urlsplit(environment["SECURE_CELERY_RESULT_BACKEND"])
        return redis.Redis(
            host=str(url.hostname),
            port=int(url.port or 0),
            username=account,
            password=self.password("redis", account),
            ssl=True,
            ssl_ca_certs=environment["SECURE_CELERY_TLS_CA"],
            ssl_certfile=str(client.certificate),
            ssl_keyfile=str(client.key),
        )

    def password(self, server: str, account: str) -> str:
        """An account's password at a Redis server of the stack."""
        return (self.stack.folder / server / f"{account}.password").read_text(encoding="utf-8")

    def load(self) -> None:
        """Become the honest caller: this process loads the application with the client's settings."""
        self.app = import_module(self.module).app
        self.app.loader.import_default_modules()

    def clear(self) -> None:
        """Forget the effects of the attack before."""
        for path in self.effects.iterdir():
            path.unlink()
        self.injected = self.forbidden = 0

    def restart(self) -> None:
        """A fresh worker on an empty queue."""
        if self.worker is not None:
            self.worker.stop()
        self.observer.purge(self.queue)
        if isinstance(self.observer, Redis):
            self.observer.forget_held()
        self.worker = self.start_worker(f"worker-{self.name}")
        try:
            self.settle()
        except Outage as why:
            raise BrokenAttack(f"the worker of {self.name} does not start: {why}") from None
        self.serves = True

    def start_worker(self, name: str) -> Any:
        """Start a worker and wait until it is ready. Raises `StackFailed`."""
        settings = {**self.environment("worker"), EFFECTS: str(self.effects)}
        return self.stack.start_worker(self.module, settings, name=name, options=("--concurrency", "1"))

    def prepare(self) -> None:
        """Make sure that honest messages are served, with a new worker if need be."""
        try:
            if not self.serves or not self.worker.alive():
                raise Outage("there is no worker that serves")
            self.settle()
        except Outage:
            self.restart()
        self.clear()

    def check(self) -> None:
        """The attacker's hands are sound: what they make is accepted where nothing is wrong with it."""
        made = {
            "a captured message, delivered unchanged,": self.capture("attacks.pay", 1),
            "a message made by hand and signed by a client": self.signed("client", "attacks.pay", 1),
        }
        for what, message in made.items():
            self.inject(message)
            self.settle()
            if not self.ran("pay"):
                raise BrokenAttack(f"{what} does not run on {self.name}")
            self.clear()
        pending = self.capture("attacks.pay", 1)
        self.results.set(self.result_key(pending.task_id), self.forged_result("worker", pending.task_id, 999))
        if self.answer(pending.task_id) != 999:
            raise BrokenAttack(f"a result made by hand and signed by a worker is not accepted on {self.name}")
        self.give("operator", "revoke", task_id=[pending.task_id])
        self.clear()  # of what was made for the result
        self.inject(pending)
        self.settle()
        if self.ran("pay"):
            raise BrokenAttack(f"a command made by hand and signed by an operator is not obeyed on {self.name}")
        self.clear()

    def close(self) -> None:
        """Stop the worker."""
        if self.worker is not None:
            self.worker.stop()
        self.attacker.close()
        self.observer.close()
