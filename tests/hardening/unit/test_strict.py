"""Strict arguments: what fits the annotations runs, and nothing else."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from celery import Celery, Task
from celery.exceptions import Retry
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Discriminator, Field

from ...project import codec, errors, strict

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
app = Celery(set_as_current=False)


class Colour(Enum):
    RED = "red"
    ONE = 1


class Order(BaseModel):
    id: UUID
    amount: int
    parent: Order | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


def make(function: Any, **options: Any) -> Any:
    """Return the task made of ``function``, validating as a hardened application's does."""
    name = f"{function.__name__}{len(app.tasks)}"
    task = app.task(name=name, shared=False, **options)(function)
    made = app.tasks[name]
    strict.make_strict(made)
    assert made == task
    return made


def run(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``task`` with arguments as they come out of a message."""
    args, kwargs = codec.decode(codec.encode([args, kwargs]))
    return task.run(*args, **kwargs)


def taking(annotation: Any) -> Any:
    """Return a task with one argument of this type, which returns it."""

    def take(value: Any) -> Any:
        return value

    take.__annotations__ = {"value": annotation}
    return make(take)


def refused(task: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(errors.InvalidArguments) as caught:
        run(task, *args, **kwargs)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (str, "x"),
        (int, 1),
        (int, 10**30),
        (float, 1.5),
        (float, 1),
        (bool, True),
        (None, None),
        (UUID, UUID(int=7)),
        (datetime, NOW),
        (datetime, NOW.replace(tzinfo=None)),
        (date, date(2024, 5, 6)),
        (timedelta, None),
        (Decimal, Decimal("1.50")),
        (Colour, Colour.RED),
        (Colour, Colour.ONE),
        (bytes, b"\xfb\xff\x00"),
        (tuple[int, str], (1, "x")),
        (tuple[int, ...], (1, 2, 3)),
        (set[int], None),
        (list[datetime], [NOW]),
        (dict[str, Decimal], {"a": Decimal("0.1")}),
        (Order, Order(id=UUID(int=7), amount=2)),
        (Order, Order(id=UUID(int=7), amount=2, parent=Order(id=UUID(int=8), amount=3))),
        (Point, Point(1, 2)),
        (list[Point], [Point(1, 2)]),
        (Literal["a", 2], 2),
        (int | str, "1"),
        (int | None, None),
        (Annotated[int, Field(ge=1)], 1),
        (Any, {"a": [1, "x", None]}),
        (object, [1]),
    ],
    ids=str,
)
def test_an_argument_of_its_type_arrives_as_that_type(annotation: Any, value: object) -> None:
    if value is None and annotation in (timedelta, set[int]):
        sent, value = {timedelta: ("PT90S", timedelta(seconds=90)), set[int]: ([1, 2], {1, 2})}[annotation]
    else:
        sent = value
    taken = run(taking(annotation), sent)
    assert taken == value
    assert type(taken) is type(value) or annotation is float


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (str, 1),
        (int, "1"),
        (int, 1.0),
        (int, True),
        (int, None),
        (int, Decimal(1)),
        (float, "1"),
        (float, True),
        (bool, 1),
        (bool, "true"),
        (UUID, "x"),
        (UUID, 7),
        (datetime, 1715000000),
        (datetime, "yesterday"),
        (date, 19000),
        (Decimal, "x"),
        (Decimal, True),
        (Colour, "green"),
        (bytes, "no base64!"),
        (bytes, [1]),
        (tuple[int, str], [1]),
        (tuple[int, str], ["1", "x"]),
        (list[int], ["1"]),
        (list[int], "1"),
        (list[int], {"0": 1}),
        (dict[str, int], {"a": "1"}),
        (dict[str, int], [["a", 1]]),
        (Order, {"id": "00000000-0000-0000-0000-000000000007", "amount": "2"}),
        (Order, {"amount": 2}),
        (list[Order], [{"id": "00000000-0000-0000-0000-000000000007", "amount": "2"}]),
        (Point, {"x": "1"}),
        (Point, {"x": 1, "z": 1}),
        (Literal["a"], "b"),
        (int | None, "1"),
        (Annotated[int, Field(ge=1)], 0),
    ],
    ids=str,
)
def test_types_are_not_converted(annotation: Any, value: object) -> None:
    assert "value" in refused(taking(annotation), value)


def order(number: int, item: str, count: int = 1, *, note: str | None = None) -> tuple[int, str, int, str | None]:
    return number, item, count, note


def test_defaults_and_keywords_work_as_in_python() -> None:
    task = make(order)
    assert run(task, 1, "x") == (1, "x", 1, None)
    assert run(task, 1, item="x", count=2) == (1, "x", 2, None)
    assert run(task, number=1, item="x", note="n") == (1, "x", 1, "n")
    assert run(task, 1, "x", 3) == (1, "x", 3, None)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1,), {}),
        ((1, "x", 1, "n"), {}),
        ((1, "x"), {"extra": 1}),
        ((1, "x"), {"number": 1}),
        ((1, "x"), {"self": 1}),
        ((1, "x"), {"": 1}),
    ],
)
def test_missing_further_and_doubled_arguments_are_refused(args: Any, kwargs: Any) -> None:
    refused(make(order), *args, **kwargs)


def test_a_bound_task_gets_itself_and_its_arguments_are_validated() -> None:
    def bound(self: Task, number: int) -> tuple[str, int]:
        return self.name, number

    task = make(bound, bind=True)
    assert run(task, 1) == (task.name, 1)
    refused(task, "1")
    refused(task, 1, self=2)


def test_a_task_class_is_validated_too() -> None:
    class Pay(Task):
        name = "pay"

        def run(self, amount: int) -> int:
            return amount

    task = app.register_task(Pay())
    strict.make_strict(task)
    assert run(task, 1) == 1
    assert task(1) == 1
    refused(task, "1")
    with pytest.raises(errors.InvalidArguments):
        task("1")


def test_a_bad_argument_is_not_retried_while_a_failure_of_the_task_is() -> None:
    def flaky(number: int) -> None:
        raise OSError("down")

    task = make(flaky, autoretry_for=(Exception,), max_retries=3, retry_backoff=False)
    refused(task, "1")
    task.push_request(id="1", retries=3, called_directly=False, is_eager=True)
    with pytest.raises(OSError, match="down"):
        task.run(1)
    task.pop_request()
    task.push_request(id="1", retries=0, called_directly=False, is_eager=True, args=(1,), kwargs={})
    task.apply_async = task.signature_from_request = lambda *_, **__: _NoSend()
    with pytest.raises(Retry):
        task.run(1)
    task.pop_request()


class _NoSend:
    """A signature that is not sent."""

    def apply(self) -> Any:
        return self

    def get(self) -> None:
        return None

    def apply_async(self) -> None:
        return None


def test_validation_is_put_on_once() -> None:
    task = make(order)
    first = task.run
    strict.make_strict(task)
    assert task.run is first


def test_celerys_own_tasks_are_left_alone() -> None:
    app.finalize()
    for name in [name for name in app.tasks if name.startswith("celery.")]:
        before = app.tasks[name].run
        strict.make_strict(app.tasks[name])
        assert app.tasks[name].run == before


# --- tasks that cannot be validated -----------------------------------------------------------------------------------


def unannotated(value):  # type: ignore[no-untyped-def]  # that is the point
    return value


def half_annotated(first: int, second=1) -> int:  # type: ignore[no-untyped-def]
    return first


def variable(*values: int) -> None: ...


def keywords(**values: int) -> None: ...


def positional(value: int, /) -> None: ...


class Opaque: ...


def opaque(value: Opaque) -> None: ...


def unresolvable(value: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (unannotated, "'value' has no annotation"),
        (half_annotated, "'second' has no annotation"),
        (variable, "'values' is positional-only or variable"),
        (keywords, "'values' is positional-only or variable"),
        (positional, "'value' is positional-only or variable"),
        (opaque, "an annotation cannot be validated"),
    ],
)
def test_a_task_that_cannot_be_validated_is_refused_with_the_reason(function: Any, reason: str) -> None:
    with pytest.raises(errors.ConfigurationRefused, match=reason) as caught:
        make(function)
    assert caught.value.code == "task.unannotated"
    assert function.__name__ in caught.value.setting


def test_an_annotation_that_names_nothing_is_refused_with_the_task_and_the_name() -> None:
    with pytest.raises(errors.ConfigurationRefused, match="Missing") as caught:
        make(unresolvable)
    assert caught.value.code == "task.unannotated"
    assert "unresolvable" in caught.value.setting


def test_a_task_without_parameters_needs_no_annotation() -> None:
    def nothing():  # type: ignore[no-untyped-def]
        return 1

    task = make(nothing)
    assert run(task) == 1
    refused(task, 1)


# --- what an error shows ----------------------------------------------------------------------------------------------


def _shout(value: str) -> str:
    raise ValueError(f"{value} is not good enough")


def _assert(value: str) -> str:
    raise AssertionError(value)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


SECRET = "swordfish"


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, SECRET),
        (UUID, SECRET),
        (datetime, SECRET),
        (bytes, SECRET + "!"),
        (Colour, SECRET),
        (Literal["a"], SECRET),
        (dict[str, int], {SECRET: "x"}),
        (list[dict[str, int]], [{SECRET: "x"}]),
        (Point, {"x": 1, SECRET: 1}),
        (Annotated[str, AfterValidator(_shout)], SECRET),
        (Annotated[str, AfterValidator(_assert)], SECRET),
        (Annotated[Cat | Dog, Discriminator("kind")], {"kind": SECRET}),
        (Annotated[str, Field(pattern="^x")], SECRET),
        (int | bool, SECRET),
    ],
    ids=str,
)
def test_an_error_shows_no_part_of_the_value(annotation: Any, value: object) -> None:
    told = refused(taking(annotation), value)
    assert told.startswith("The task's arguments do not fit its annotations: value")
    assert SECRET not in told


def test_an_error_says_nothing_of_an_argument_that_has_no_parameter() -> None:
    told = refused(make(order), 1, "x", **{SECRET: 1})
    assert SECRET not in told


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)


@given(_ANYTHING)
def test_any_argument_runs_or_is_refused(value: Any) -> None:
    try:
        taken = run(_TAKES_ORDERS, value)
    except errors.InvalidArguments:
        return
    assert all(type(item) is Order for item in taken)


_TAKES_ORDERS = taking(list[Order])
