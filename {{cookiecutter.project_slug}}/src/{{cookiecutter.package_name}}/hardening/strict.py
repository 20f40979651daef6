"""Strict arguments: a task runs only with what its annotations ask for.

Guards against: arguments of a wrong or unexpected type reaching business code, and errors that show their values.
Rests on: Pydantic in strict mode over the task's own signature. JSON has no tuples, dates or enums of its own, so they
are read from their JSON form; nothing else is converted (``"1"`` is no int).
Controls: VAL-1.

The wrapper replaces ``task.run`` outside of ``autoretry_for``, so a bad argument fails at once and is not retried.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NotRequired

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # Pydantic needs this one before Python 3.12

from .claims import places
from .errors import ConfigurationRefused, InvalidArguments

#: Celery's built-in tasks have no annotations; what they carry is judged by the policy.
_BUILTIN = "celery."
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_typed_dict: Any = TypedDict  # called at run time: mypy wants literals
_CONFIG = ConfigDict(extra="forbid", val_json_bytes="base64")


def make_strict(task: Any) -> None:
    """Make ``task`` validate its arguments before it runs.

    Raises:
        ConfigurationRefused: an argument has no annotation, or one that Pydantic cannot validate.
    """
    if task.name.startswith(_BUILTIN) or getattr(task.run, "strict", False):
        return
    task.run = _validated(task.name, task.run)


def _validated(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    try:
        signature = inspect.signature(run, eval_str=True)
    except NameError as error:
        raise _refuse(name, f"an annotation names what the task's module lacks ({error})", "import it there") from error
    arguments = _schema(name, list(signature.parameters.values()))

    @wraps(run)
    def strict_run(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
            valid = arguments.validate_json(pydantic_core.to_json(given, bytes_mode="base64"), strict=True)
        except ValidationError as error:
            raise InvalidArguments(places(error, shown=1)) from None  # below the parameter, names can be a dict's keys
        except (TypeError, ValueError):
            raise InvalidArguments("they do not fit the task's parameters") from None
        return run(**valid)

    strict_run.strict = True  # type: ignore[attr-defined]  # marks the wrapper, so that it is put on once
    return strict_run


def _schema(name: str, parameters: list[inspect.Parameter]) -> TypeAdapter[dict[str, Any]]:
    """Return what validates a task's arguments by name; a parameter with a default may be absent."""
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind not in _NAMED:
            raise _refuse(name, f"parameter {parameter.name!r} is positional-only or variable", "name each parameter")
        if parameter.annotation is inspect.Parameter.empty:
            raise _refuse(name, f"parameter {parameter.name!r} has no annotation", "annotate it")
        optional = parameter.default is not inspect.Parameter.empty
        fields[parameter.name] = NotRequired[parameter.annotation] if optional else parameter.annotation
    arguments: Any = _typed_dict("arguments", fields)
    arguments.__pydantic_config__ = _CONFIG
    try:
        return TypeAdapter(arguments)
    except Exception as error:  # Pydantic raises several kinds for what it cannot make a schema of
        raise _refuse(name, f"an annotation cannot be validated ({type(error).__name__})", "use a JSON type") from error


def _refuse(name: str, reason: str, fix: str) -> ConfigurationRefused:
    return ConfigurationRefused(f"task {name}", reason, fix, "task.unannotated")
