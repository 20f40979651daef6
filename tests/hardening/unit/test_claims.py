"""The claims: exactly these, of exactly these types, and nothing that Celery could take for its own."""

from __future__ import annotations

import copy
import inspect
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Task
from hypothesis import given
from hypothesis import strategies as st

from ...project import claims, codec, errors

GENUINE: dict[str, Any] = {
    "iss": "spiffe://orders.test/development/orders/client",
    "aud": "spiffe://orders.test/development/orders",
    "iat": 1_700_000_000,
    "exp": 1_700_086_400,
    "jti": "0123456789abcdef",
    "origin": "spiffe://orders.test/development/orders/client",
    "owner": "spiffe://orders.test/development/orders/client",
    "queue": "orders.default",
    "task": {"name": "orders.tasks.pay", "id": "1"},
    "args": [1],
    "kwargs": {"a": 1},
    "embed": {},
}


def _changed(path: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(GENUINE)
    *parents, last = path.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[last] = value
    return changed


def _parse(fields: object) -> claims.TaskClaims:
    return claims.TaskClaims.parse(codec.encode(fields))


def _refused(fields: object) -> str:
    with pytest.raises(errors.BadShape) as caught:
        _parse(fields)
    return str(caught.value)


def test_genuine_claims_parse() -> None:
    parsed = _parse(GENUINE)
    assert parsed.task.name == "orders.tasks.pay"
    assert parsed.task.timelimit == (None, None)
    assert parsed.embed.model_dump() == {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@pytest.mark.parametrize("name", list(GENUINE))
def test_every_claim_is_needed(name: str) -> None:
    fields = copy.deepcopy(GENUINE)
    del fields[name]
    assert name in _refused(fields)


@pytest.mark.parametrize("path", ["extra", "task.extra", "embed.extra", "task.delivery_info", "embed.id", "task.meth"])
def test_a_further_claim_is_refused(path: str) -> None:
    _refused(_changed(path, 1))


_WRONG = [None, True, 1, 1.5, "1", [], {}, [1], {"a": 1}]
_TYPES: dict[str, tuple[type, ...]] = {
    "iss": (str,),
    "aud": (str,),
    "iat": (int,),
    "exp": (int,),
    "jti": (str,),
    "origin": (str,),
    "owner": (str,),
    "queue": (str,),
    "task.name": (str,),
    "task.id": (str,),
    "task.retries": (int,),
    "task.replaced_task_nesting": (int,),
    "task.priority": (int, type(None)),
    "task.group_index": (int, type(None)),
    "task.ignore_result": (bool, type(None)),
    "task.shadow": (str, type(None)),
    "task.reply_to": (str, type(None)),
    "args": (list,),
    "kwargs": (dict,),
    "embed.callbacks": (list, type(None)),
    "embed.chain": (list, type(None)),
}


@pytest.mark.parametrize("path", _TYPES)
@pytest.mark.parametrize("value", _WRONG, ids=repr)
def test_no_claim_is_converted_from_another_type(path: str, value: object) -> None:
    if type(value) in _TYPES[path]:
        _parse(_changed(path, value))
    else:
        _refused(_changed(path, value))


@pytest.mark.parametrize("whole", [None, 1, "x", [], [GENUINE], {}])
def test_what_is_no_object_of_claims_is_refused(whole: object) -> None:
    _refused(whole)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.retries", -1),
        ("task.retries", 10**7),
        ("task.priority", 256),
        ("task.group_index", -1),
        ("task.timelimit", [1]),
        ("task.timelimit", [1, 2, 3]),
        ("task.timelimit", [0, None]),
        ("task.timelimit", [-1, None]),
        ("task.timelimit", [None, "1"]),
        ("task.timelimit", {"0": 1}),
        ("task.name", ""),
        ("task.id", "x" * 256),
        ("task.eta", "tomorrow"),
        ("task.eta", "0001-01-01T00:00:00+14:00"),
        ("task.expires", "9999-12-31T23:59:59-12:00"),
        ("task.expires", "2024-13-01T00:00:00"),
    ],
)
def test_a_value_out_of_range_is_refused(path: str, value: object) -> None:
    _refused(_changed(path, value))


@pytest.mark.parametrize(
    "character", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\ufeff", "\ud800"]
)
@pytest.mark.parametrize("path", ["task.id", "task.name", "task.shadow", "iss", "queue", "task.root_id"])
def test_no_name_or_id_can_hold_what_moves_a_log_line_or_a_cursor(path: str, character: str) -> None:
    assert character not in _refused(_changed(path, f"a{character}b"))


@pytest.mark.parametrize("text", ["gen1@host", "t\u00e4sk", "\u4efb\u52a1", "a b"])
def test_other_letters_are_fine(text: str) -> None:
    assert _parse(_changed("task.shadow", text)).task.shadow == text


# --- what a retry hands to Celery -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["task", "id", "retries", "timelimit", "origin", "owner", "lang", "root_id", "headers", "name", "stamps"]
)
def test_a_header_of_the_callers_own_cannot_have_the_name_of_one_of_celerys(name: str) -> None:
    """A worker that retries the task sends them again: ``task`` would make it sign another task as its own."""
    _refused(_changed("task.headers", {name: "orders.admin.delete"}))


@pytest.mark.parametrize(
    "name",
    [
        *("headers", "routing_key", "exchange", "queue", "link", "chain", "task_id", "serializer", "compression"),
        *("producer", "connection", "retry_policy", "declare", "user_id", "reply_to", "mandatory", "exchange_type"),
        *("application_headers", "time_limit", "shadow", "stamped_headers", "options", "args", "self"),
    ],
)
def test_a_stamp_cannot_be_an_option_of_apply_async(name: str) -> None:
    task = {**GENUINE["task"], "stamped_headers": [name], "stamps": {name: "x"}}
    _refused({**GENUINE, "task": task})


@pytest.mark.parametrize(
    ("stamped", "stamps"), [(["a"], None), (["a"], {}), (None, {"a": 1}), (["a"], {"b": 1}), (["a"], {"a": 1, "b": 1})]
)
def test_stamps_are_those_that_are_named(stamped: object, stamps: object) -> None:
    _refused({**GENUINE, "task": {**GENUINE["task"], "stamped_headers": stamped, "stamps": stamps}})


def test_the_callers_own_headers_and_stamps_stay_and_stay_apart() -> None:
    task = {**GENUINE["task"], "headers": {"traceparent": "00-1"}, "stamped_headers": ["run"], "stamps": {"run": "7"}}
    headers = claims.request_headers(_parse({**GENUINE, "task": task}))
    assert headers["headers"] == {"traceparent": "00-1"}
    assert headers["stamps"] == {"run": "7"}
    assert "traceparent" not in headers
    assert "run" not in headers


@pytest.mark.parametrize("value", [[], {}, [1], {"a": 1}])
def test_a_header_of_the_callers_own_is_a_plain_value(value: object) -> None:
    _refused(_changed("task.headers", {"trace": value}))


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-05-06T07:08:09", datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)),
        ("2024-05-06T07:08:09+02:00", datetime(2024, 5, 6, 5, 8, 9, tzinfo=UTC)),
        ("2024-05-06T07:08:09Z", datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)),
        ("2024-05-06 07:08", datetime(2024, 5, 6, 7, 8, tzinfo=UTC)),
        ("20240506T070809", datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)),
        ("2024-W19-1", datetime(2024, 5, 6, tzinfo=UTC)),
    ],
)
def test_celery_gets_the_very_moment_that_was_judged(text: str, moment: datetime) -> None:
    """Two parsers that read a text differently would make a rule about time worth nothing."""
    parsed = _parse({**GENUINE, "task": {**GENUINE["task"], "eta": text, "expires": text}})
    assert claims.utc(text) == moment
    headers = claims.request_headers(parsed)
    assert headers["eta"] == headers["expires"] == moment.isoformat()


_MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))


@given(_MOMENTS, st.integers(-720, 720))
def test_any_offset_is_the_same_moment(moment: datetime, minutes: int) -> None:
    local = moment.astimezone(timezone(timedelta(minutes=minutes)))
    assert claims.utc(local.isoformat()) == moment


# --- between Celery and the claims ------------------------------------------------------------------------------------


def test_every_field_of_a_published_message_comes_back_in_the_request() -> None:
    headers = {
        "lang": "py",
        "task": "orders.tasks.pay",
        "id": "1",
        "root_id": "2",
        "parent_id": "3",
        "group": "4",
        "group_index": 5,
        "eta": "2024-01-01T00:00:00+00:00",
        "expires": "2025-01-01T00:00:00+00:00",
        "retries": 2,
        "timelimit": [30, 20],
        "shadow": "pay",
        "ignore_result": False,
        "replaced_task_nesting": 1,
        "stamped_headers": ["run"],
        "stamps": {"run": "7"},
        "run": "7",
        "argsrepr": "secret",
        "kwargsrepr": "secret",
        "origin": "gen1@host",
        "traceparent": "00-1",
    }
    properties = {"reply_to": "r", "correlation_id": "c", "app_id": "a", "priority": 3}
    fields = claims.task_fields(headers, {**properties, "delivery_mode": 2})
    assert "secret" not in str(fields)
    rebuilt = claims.request_headers(_parse({**GENUINE, "task": codec.decode(codec.encode(fields))}))
    for name in headers.keys() - {"argsrepr", "kwargsrepr", "origin", "traceparent", "run"}:
        assert rebuilt[name] == headers[name], name
    assert rebuilt["headers"] == {"traceparent": "00-1"}
    assert rebuilt["origin"] == GENUINE["origin"]
    assert rebuilt["argsrepr"] == rebuilt["kwargsrepr"] == "(hidden)"
    assert {name: fields[name] for name in claims.PROPERTIES} == properties


def test_every_option_of_a_task_is_known_to_be_celerys() -> None:
    """A new Celery may have new ones; stamps must not become them."""
    for name in inspect.signature(Task.apply_async).parameters:
        _refused({**GENUINE, "task": {**GENUINE["task"], "stamped_headers": [name], "stamps": {name: 1}}})


# --- what a refusal says ----------------------------------------------------------------------------------------------


def test_a_refusal_names_the_place_and_never_the_value() -> None:
    told = _refused(_changed("task.retries", "swordfish"))
    assert "task.retries: Input should be a valid integer" in told
    assert "swordfish" not in told


def test_a_refusal_repeats_no_key_that_could_shape_a_log_line() -> None:
    told = _refused(_changed("task.x\ny", 1))
    assert "\n" not in told
    assert "task.?" in told
    assert "z" * 41 not in _refused(_changed("z" * 41, 1))


def test_message_ids_are_unique() -> None:
    assert len({claims.new_id() for _ in range(1000)}) == 1000
