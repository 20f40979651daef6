"""Who signs which results: workers alone, and nothing that could pass for something else."""

from __future__ import annotations

from typing import Any

import pytest
from celery import states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...project import envelope, errors
from .store import ECHO, Store, _signed


@pytest.mark.parametrize("role", ["client", "beat", "operator", "monitor"])
def test_only_a_worker_signs_results(store: Store, role: str) -> None:
    backend = store.service.party(role).app.backend
    for data in ({"status": "SUCCESS", "task_id": "1"}, [1, "1", "SUCCESS", None]):
        with pytest.raises(PermissionError):
            backend.encode(data)
    with pytest.raises(PermissionError):
        backend.store_result("1", "forged", states.SUCCESS)
    backend.encode({"result": [["group", None], []]})


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("SUCCESS"),
    lambda v: (
        st.lists(v, max_size=5)
        | st.dictionaries(st.sampled_from(["status", "task_id", "result", "iss", "task", "args", "a"]), v, max_size=5)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ANYTHING)
def test_the_encoder_signs_results_parts_and_groups_alone(store: Store, data: Any) -> None:
    """A worker must not be made to sign what could pass for something else (F26)."""
    match data:
        case {"status": str(), "task_id": str()} | [_, str(), str(), _] | {"result": [[str(), _], [*_]]}:
            pass
        case _:
            with pytest.raises(PermissionError):
                store.service.worker.app.backend.encode(data)
            return
    if isinstance(data, dict) and "status" not in data and len(data) > 1:
        return
    value = store.service.worker.app.backend.encode(data)
    for other in (envelope.Type.TASK, envelope.Type.QUARANTINE):
        with pytest.raises(errors.WrongType):
            store.service.client.app.hardening.verifier.verify(other, value)


def test_what_a_worker_signs_as_a_result_is_no_task(store: Store) -> None:
    claims = {"task": {"name": ECHO, "id": "1"}, "args": [], "kwargs": {}, "embed": {}}
    value = _signed(store, {"status": "SUCCESS", "task_id": "1", "result": claims, **claims})
    store.service.publish(value)
    assert store.service.work() == 0
    assert [record["code"] for record in store.service.quarantined()] == ["message.type"]


def test_a_pools_child_hands_its_parent_an_exception_and_no_stored_form(store: Store) -> None:
    """Celery asks for ``pickle`` where it reports its own failures; it needs an exception there."""
    handed = store.service.worker.app.backend.prepare_exception(ValueError("x"), "pickle")
    assert isinstance(handed, ValueError)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_worker_that_was_taken_over_cannot_end_its_callers(store: Store, kind: type[BaseException]) -> None:
    stored = store.service.worker.app.backend.prepare_exception(kind("x"))
    result = store.service.client.app.AsyncResult("an-id")
    value = {"status": "FAILURE", "result": stored, "task_id": result.id, "traceback": None, "children": []}
    store.write(result, _signed(store, value))
    with pytest.raises(RuntimeError, match=kind.__name__):
        result.get(timeout=1)
