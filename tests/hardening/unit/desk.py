"""A gate with a worker behind it, and genuine claims to change: what the tests of the gate share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from amqp import basic_message
from celery import Task

from ...project import claims, codec, envelope, intake
from ...service import Party, Service
from . import certificates, documents

TASK = envelope.Type.TASK
PREFIX = documents.checksum.name.rpartition(".documents.")[0]
PROBE, UNLIMITED = f"{PREFIX}.probe", f"{PREFIX}.unlimited"
FORBIDDEN = f"{PREFIX.rpartition('.')[0]}.admin.delete"
SECRET = "swordfish"
PROTOCOL_2 = [[], {}, {}]
OTHER = {"a": "b"}
HEADERS: dict[str, Any] = {
    "lang": "c",
    "task": FORBIDDEN,
    "id": "victim",
    "root_id": "victim",
    "parent_id": "victim",
    "group": "victim",
    "group_index": 9,
    "eta": "2999-01-01T00:00:00",
    "expires": "2000-01-01T00:00:00",
    "retries": 999,
    "timelimit": [0.001, 0.001],
    "shadow": SECRET,
    "argsrepr": SECRET,
    "kwargsrepr": SECRET,
    "origin": "spiffe://x/y/z/operator",
    "owner": "spiffe://x/y/z/operator",
    "ignore_result": True,
    "replaced_task_nesting": 99,
    "stamped_headers": ["routing_key"],
    "stamps": {"routing_key": "victim"},
    "meth": "x",
    "utc": False,
    "callbacks": [{"task": FORBIDDEN}],
    "errbacks": [{"task": FORBIDDEN}],
    "chain": [{"task": FORBIDDEN}],
    "chord": {"task": FORBIDDEN},
    "headers": OTHER,
    "properties": OTHER,
    "delivery_info": {"routing_key": "victim", "is_eager": True},
    "reply_to": "victim",
    "correlation_id": "victim",
    "hostname": "victim",
    "is_eager": True,
    "called_directly": True,
    "loglevel": 10,
    "logfile": "/tmp/x",
    "args": [666],
    "kwargs": {"number": 666},
    "taskset": "victim",
    "_children": [],
    "x-death": [{"queue": "x", "count": 99}],
    "traceparent": SECRET,
    "": SECRET,
}
NOW = int(certificates.NOW.timestamp())


class Channel:
    """What a message needs of its channel: it notes what became of it."""

    no_ack_consumers = None

    def __init__(self) -> None:
        self.fate: list[str] = []

    def basic_ack(self, *_: Any, **__: Any) -> None:
        self.fate.append("acknowledged")

    def basic_reject(self, *_: Any, requeue: bool, **__: Any) -> None:
        self.fate.append("requeued" if requeue else "rejected")


def delivered(
    body: Any, channel: Channel | None = None, delivery_info: dict[str, Any] | None = None, **properties: Any
) -> Any:
    """Return a message as py-amqp delivers it, with any properties at all."""
    message = basic_message.Message(body, **properties)
    message.delivery_info = {"delivery_tag": 1, **(delivery_info or {})}
    return intake.AmqpMessage(message, channel=channel or Channel())


class Desk:
    """A service with a task that notes each of its requests, and genuine claims to change."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seen: list[dict[str, Any]] = []
        app = service.worker.app

        @app.task(name=PROBE, bind=True, shared=False, max_retries=1, time_limit=30, soft_time_limit=20)
        def probe(task: Task, number: int = 0, again: bool = False) -> int:
            self.seen.append(dict(vars(task.request)))
            if again and not task.request.retries:
                raise task.retry(countdown=0)
            return number

        @app.task(name=UNLIMITED, shared=False)
        def unlimited() -> None: ...

        @app.task(name=FORBIDDEN, shared=False)
        def delete(number: int = 0, again: bool = False) -> None:
            self.seen.append({"task": FORBIDDEN})

    def capture(self, *args: Any, **options: Any) -> Any:
        """Send the probe as a client does; return the message that came out, taken from its queue."""
        self.service.client.app.send_task(PROBE, args, **{"ignore_result": False, **options})
        (message,) = self.service.deliveries()
        message.ack()
        return message

    def claims(self, message: Any = None) -> dict[str, Any]:
        """Return genuine claims, ready to be changed."""
        verifier = self.service.worker.app.hardening.verifier
        verified = verifier.verify(TASK, (message or self.capture()).body)
        fields: dict[str, Any] = codec.decode(verified.payload)
        return fields

    def fresh(self, message: Any) -> bytes:
        """Return a genuine message's body as if it had been sent once more: no copy, and otherwise the same."""
        return self.sign({**self.claims(message), "jti": claims.new_id()})

    def sign(self, fields: Any, party: Party | None = None) -> bytes:
        """Sign any claims with a genuine key."""
        return (party or self.service.client).signer.sign(TASK, codec.encode(fields))

    def refusal(self, body: Any = None, **properties: Any) -> dict[str, Any]:
        """Publish a message and assert that all that becomes of it is one record in the quarantine."""
        self.service.publish(body, **properties)
        return self.refused()

    def refused(self) -> dict[str, Any]:
        """Assert that what lies in the queue is refused; return its record."""
        assert self.service.work() == 0
        (record,) = self.service.quarantined()
        assert self.seen == []
        return record

    def run(self, body: Any, **properties: Any) -> dict[str, Any]:
        """Publish a message that passes; return the request that its task saw."""
        self.service.publish(body, **properties)
        assert self.service.work() == 1
        assert self.service.quarantined() == []
        return self.seen.pop()


@pytest.fixture(scope="module")
def one_desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One for the module: each test takes all that it put into its queues."""
    return Desk(Service(tmp_path_factory.mktemp("gate")))


@pytest.fixture
def desk(one_desk: Desk) -> Iterator[Desk]:
    yield one_desk
    left = [*one_desk.service.deliveries(), *one_desk.service.quarantined(), *one_desk.seen]
    one_desk.seen.clear()
    assert left == []


def changed(fields: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(fields)
    *parents, last = path.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[last] = value
    return changed


def issued(desk: Desk, uri: str, start: int = -120, end: int = 86_400) -> envelope.Signer:
    """Return a signer of the service's own CA; its validity is given in seconds from now."""
    authority = desk.service.pki.signing
    valid = tuple(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds) for seconds in (start, end))
    return certificates.signing(uri, certificates.Pair(authority.key, (authority.root,)), valid=valid).signer


def named_as(desk: Desk, role: str) -> str:
    """Return the SPIFFE ID of another role of the same application."""
    return str(desk.service.client.identity).replace("/client", f"/{role}")
