"""The service's own tasks, through signing, gate and strict arguments: the pattern for yours."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from ..project import documents, errors
from ..service import Service


def test_checksum_returns_the_documents_checksum(service: Service) -> None:
    result = service.send(documents.checksum, "hello", algorithm="sha512")
    assert service.work() == 1
    assert result.get(timeout=1) == hashlib.sha512(b"hello").hexdigest()


def test_a_wrong_argument_fails_the_task_without_showing_the_value(service: Service) -> None:
    result = service.send(documents.checksum, 12345)
    service.work()
    with pytest.raises(errors.InvalidArguments, match="document: Input should be a valid string") as caught:
        result.get(timeout=1)
    assert "12345" not in str(caught.value)


def test_receipt_takes_a_date_and_an_id_and_stores_nothing(service: Service) -> None:
    result = service.send(documents.record_receipt, uuid4(), datetime.now(UTC))
    assert service.work() == 1
    assert result.state == "PENDING"
