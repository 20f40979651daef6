"""What a message names besides its own task: seen in every form that Celery makes, refused in every other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from ...project import canvas, codec, errors

app = Celery("canvas", broker="memory://", set_as_current=False)


@app.task(name="app.add")
def add(x: int, y: int) -> int:
    return x + y


def named(task: str = "app.add", args: Any = (), kwargs: Any = None, **embed: Any) -> list[tuple[str, str | None]]:
    parts = {part: codec.decode(codec.encode(embed.get(part))) for part in ("callbacks", "errbacks", "chain", "chord")}
    claims: Any = SimpleNamespace(
        task=SimpleNamespace(name=task), args=args, kwargs=kwargs or {}, embed=SimpleNamespace(**parts)
    )
    return list(canvas.named(claims))


def call(name: str, **options: Any) -> Any:
    return app.signature(name, (1,), **options)


A, B = ("a", None), ("b", None)
SEEN = {
    "callback": ([call("a")], [A]),
    "callback of a callback": ([call("a", link=call("b"))], [A, B]),
    "error callback": ([call("a", link_error=call("b"))], [A, B]),
    "chain": ([chain(call("a"), call("b"), app=app)], [A, B]),
    "group": ([group(call("a"), call("b"), app=app)], [A, B]),
    "chord": ([chord([call("a")], call("b"), app=app)], [A, B]),
    "chain of a chord": ([chain(group(call("a"), app=app), call("b"), app=app)], [A, B]),
    "rest of a chain": ([call("a", chain=[call("b")])], [A, B]),
    "body of a chord": ([call("a", chord=call("b"))], [A, B]),
    "map": ([add.map([1])], [("app.add", None), ("celery.map", None)]),
    "starmap": ([add.starmap([(1, 2)])], [("app.add", None), ("celery.starmap", None)]),
    "chunks": ([add.chunks([(1, 2)], 1)], [("app.add", None), ("celery.chunks", None)]),
    "queue": ([call("a", queue="slow")], [("a", "slow")]),
    "routing key": ([call("a", routing_key="slow")], [("a", "slow")]),
    "queue of a group": ([group(call("a"), app=app).set(queue="slow")], [A, ("a", "slow")]),
}


@pytest.mark.parametrize("place", ["callbacks", "errbacks", "chain"])
@pytest.mark.parametrize("form", SEEN)
def test_every_task_is_seen(form: str, place: str) -> None:
    signatures, expected = SEEN[form]
    assert sorted(named(**{place: signatures}), key=str) == sorted(expected, key=str)


def test_the_error_callbacks_that_a_chord_gives_to_its_header_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "task_allow_error_cb_on_chord_header", True)
    signature = chord([call("a")], call("c"), app=app)
    signature.link_error(call("b"))  # Celery writes that it is immutable into its options too
    assert set(named(callbacks=[signature])) == {A, B, ("c", None)}


def test_a_task_named_by_its_name_alone_is_seen() -> None:
    assert named(errbacks=["a"]) == [A]


def test_no_canvas_names_nothing() -> None:
    assert named(args=[{"task": "a"}], kwargs={"task": "b"}) == []


@pytest.mark.parametrize("name", ["celery.map", "celery.starmap", "celery.chunks"])
@pytest.mark.parametrize("mapped", ["a", {"task": "a"}, {"task": "a", "subtask_type": None, "args": []}])
def test_what_is_mapped_is_seen(name: str, mapped: Any) -> None:
    assert named(name, [mapped, []]) == named(name, kwargs={"task": mapped}) == [A]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("celery.map", []),
        ("celery.map", [["a"]]),
        ("celery.map", ["celery.map"]),  # whose items would name what is mapped
        ("celery.starmap", [{"task": "celery.chord", "subtask_type": "chord"}]),
        ("celery.starmap", [{"task": "a", "subtask_type": "group"}]),
        ("celery.chunks", [{"task": 1}]),
        ("celery.group", [[]]),
        ("celery.chain", []),
        ("celery.chord", [[], None]),
        ("celery.chord_unlock", ["id", 1]),
    ],
)
def test_a_built_in_task_that_could_hide_another_is_refused(name: str, args: list[Any]) -> None:
    with pytest.raises(errors.BadShape):
        named(name, args)


@pytest.mark.parametrize(
    "signature",
    [
        1,
        {},
        {"task": 1},
        {"task": "a", "link": [{"task": "b"}]},  # a constructor would take it for an option
        {"task": "a", "options": {"options": {"link": [{"task": "b"}]}}},
        {"task": "a", "options": {"task": "b"}},
        {"task": "a", "options": {"type": "b"}},
        {"task": "a", "options": {"immutable": False}, "immutable": True},  # one of the two would win
        {"task": "a", "options": {"immutable": [{"task": "b"}]}},
        {"task": "a", "options": ["link"]},
        {"task": "a", "options": {"queue": ["slow"]}},
        {"task": "a", "options": {"link": 1}},
        {"task": "a", "kwargs": []},
        {"task": "a", "args": "b"},
        {"task": "celery.map", "args": 7, "immutable": True},
        {"task": "a", "subtask_type": "group", "kwargs": {"tasks": []}},
        {"task": "a", "subtask_type": "xmap", "kwargs": {"task": "b", "it": []}},
        {"task": "a", "subtask_type": ["group"]},
        {"task": "celery.group", "kwargs": {"tasks": [{"task": "b"}]}},
        {"task": "celery.chord_unlock", "args": ["id", {"task": "b"}]},
        {"task": "celery.map", "kwargs": {"task": "b", "it": []}},  # takes what came before it for its first argument
        {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [{"task": "celery.chord"}]}},
        {"task": "celery.chord", "subtask_type": "chord", "kwargs": {"header": [1], "body": None}},
    ],
)
def test_what_celery_could_read_in_another_way_is_refused(signature: Any) -> None:
    with pytest.raises(errors.BadShape):
        named(callbacks=[signature])


def test_queues_of_nested_groups_do_not_multiply() -> None:
    nested = call("a")
    for level in range(18):
        nested = {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [nested]}, "options": {}}
        nested["options"]["queue"] = f"queue-{level}"
    assert len(named(callbacks=[nested])) == 19
