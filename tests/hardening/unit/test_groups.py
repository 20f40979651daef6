"""Chord parts and groups: none passes for a result, and each caller gets its own groups back."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult, GroupResult

from ...project import errors
from .store import ECHO, Store, _group, _part, _refused


def test_a_genuine_value_of_another_kind_is_no_result(store: Store) -> None:
    result = store.run()
    for value in (_part(store, result.id), _group(store, result.id)):
        store.write(result, value)
        _refused(errors.ForeignResult, result)


def _write_group(store: Store, group_id: str, value: bytes) -> None:
    backend = store.service.client.app.backend
    backend.set(backend.get_key_for_group(group_id), value)


def _saved(store: Store, app: Celery | None = None) -> GroupResult:
    app = app or store.service.client.app
    group = GroupResult("group-1", [AsyncResult("a", app=app), AsyncResult("b", app=app)], app=app)
    group.save(backend=app.backend)
    return group


def _restore(store: Store, group_id: str, app: Celery | None = None) -> Any:
    app = app or store.service.client.app
    app.backend._cache.pop(group_id, None)
    return GroupResult.restore(group_id, backend=app.backend, app=app)


def test_a_group_comes_back_to_who_saved_it(store: Store) -> None:
    group = _saved(store)
    assert _restore(store, "group-1") == group
    assert _restore(store, "never saved") is None
    assert _restore(store, "group-1", store.beat.app) is None


def test_another_group_under_this_id_is_refused(store: Store) -> None:
    backend = store.service.client.app.backend
    _saved(store)
    _write_group(store, "group-2", backend.get(backend.get_key_for_group("group-1")))
    with pytest.raises(errors.ForeignResult):
        _restore(store, "group-2")


def test_a_group_that_another_caller_saved_is_refused(store: Store) -> None:
    _saved(store, store.beat.app)
    beat = store.beat.app.backend
    _write_group(store, "group-1", beat.get(beat.get_key_for_group("group-1")))
    with pytest.raises(errors.ForeignResult):
        _restore(store, "group-1")


def test_what_is_no_group_is_refused_in_its_place(store: Store) -> None:
    result = store.run()
    for value in (store.read(result), _part(store, "group-1")):
        _write_group(store, "group-1", value)
        with pytest.raises(errors.ForeignResult):
            _restore(store, "group-1")
    _write_group(store, "group-1", b'{"result": [["group-1", null], []]}')
    with pytest.raises(errors.Unsigned):
        _restore(store, "group-1")


def test_a_group_of_results_is_joined_and_each_is_verified(store: Store) -> None:
    app = store.service.client.app
    each = [store.run(ECHO, number) for number in range(3)]
    assert GroupResult("g", each, app=app).join_native(timeout=1) == [0, 1, 2]
    fresh = [AsyncResult(result.id, app=app) for result in each]
    for result in fresh:
        app.backend._cache.pop(result.id, None)
    store.write(each[1], store.read(each[2]))
    with pytest.raises(errors.ForeignResult):
        GroupResult("g", fresh, app=app).join_native(timeout=1)
