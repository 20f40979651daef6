"""Stored results and the hands of someone who can write to them: what the tests of results share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import states
from celery.result import AsyncResult

from ...project import codec, envelope, errors, ownership
from ...service import Party, Service
from . import certificates, documents

RESULT = envelope.Type.RESULT
PREFIX = documents.checksum.name.rpartition(".documents.")[0]
ECHO = f"{PREFIX}.echo"
META = {"status": "SUCCESS", "result": "forged", "traceback": None, "children": []}


class Store:
    """A service, and the hands of someone who can write to its result backend."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.beat = service.party("beat")

        @service.worker.app.task(name=ECHO, shared=False, ignore_result=False)
        def echo(value: Any) -> Any:
            return value

    def send(self, name: str = ECHO, *args: Any, party: Party | None = None, **options: Any) -> AsyncResult:
        """Send a task as a caller does."""
        app = (party or self.service.client).app
        return app.send_task(name, args or ("v",), **{"ignore_result": False, **options})

    def run(self, name: str = ECHO, *args: Any, party: Party | None = None, **options: Any) -> AsyncResult:
        """Send a task and let the worker run it."""
        result = self.send(name, *args, party=party, **options)
        assert self.service.work() == 1
        return result

    def read(self, result: AsyncResult) -> bytes:
        """Read a stored value as it is."""
        backend = result.app.backend
        value: bytes = backend.get(backend.get_key_for_task(result.id))
        return value

    def write(self, result: AsyncResult, value: Any) -> None:
        """Write any value where this result is stored."""
        backend = result.app.backend
        backend.set(backend.get_key_for_task(result.id), value)

    def forge(self, result: AsyncResult, signer: envelope.Signer, **changes: Any) -> bytes:
        """Return a value for this result, signed by anyone."""
        value = {"status": "SUCCESS", "result": "forged", "task_id": result.id, "traceback": None, "children": []}
        claims = {
            "iss": str(signer.identity),
            "aud": str(self.service.client.identity.audience),
            "iat": int(time.time()),
            "owner": str(self.service.client.identity),
            "kind": "result",
            "of": result.id,
            "value": value,
        }
        return signer.sign(RESULT, codec.encode(claims | changes))


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(Service(tmp_path_factory.mktemp("results")))


@pytest.fixture
def store(one_store: Store) -> Iterator[Store]:
    yield one_store
    left = [*one_store.service.deliveries(), *one_store.service.quarantined()]
    assert left == []


def _issued(store: Store, role: str, start: int = -120, end: int = 86_400, environment: str = "development") -> Any:
    authority = store.service.pki.signing
    own = store.service.client.identity
    uri = f"spiffe://{own.trust_domain}/{environment}/{own.application}/{role}"
    valid = tuple(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds) for seconds in (start, end))
    return certificates.signing(uri, certificates.Pair(authority.key, (authority.root,)), valid=valid).signer


def _refused(leaf: type[errors.MessageRefused], result: AsyncResult) -> None:
    with pytest.raises(errors.MessageRefused) as caught:
        result.get(timeout=1)
    assert type(caught.value) is leaf


def _signed(store: Store, data: Any) -> bytes:
    """Return a genuine value for the client, of any kind that the worker may sign."""
    request = type("Request", (), {"owner": str(store.service.client.identity), "origin": ""})
    with ownership.acting_for(request):
        value: bytes = store.service.worker.app.backend.encode(data)
    return value


def _part(store: Store, task_id: str) -> bytes:
    return _signed(store, [1, task_id, states.SUCCESS, "part"])


def _group(store: Store, group_id: str) -> bytes:
    return _signed(store, {"result": [[group_id, None], []]})
