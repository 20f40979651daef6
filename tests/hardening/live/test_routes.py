"""Who may send one task reaches no other one, and no id of another caller, whatever a message is made of.

Each route is taken twice: by the client, who may send the task at its end, so that it is seen to be one, and by the
shop, who may not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, chord, group
from celery.result import AsyncResult

from ...project import claims, codec, envelope, errors
from .everything import within
from .running import SOON, TASKS, Running

CLIENT = "spiffe://everything.test/development/everything/client"
ADD, FORBIDDEN = f"{TASKS}.add", f"{TASKS}.counted"
DEEP = 30  # each level of canvas is three of JSON, of which codec.DEPTH_MAX allows a hundred


@pytest.fixture(scope="module")
def shop(running: Running) -> Celery:
    """Who may send few tasks."""
    return running.caller("shop")


class Canvas:
    """What routes are made of: a task that anyone may send, one that fails, and the end, which not everyone may."""

    def __init__(self, app: Celery, key: str) -> None:
        self.app, self.key = app, key
        self.end, self.add, self.fails = self.task("counted", key), self.task("add", 1, 2), self.task("add", "1", 2)

    def task(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(f"{TASKS}.{name}", args, immutable=True, **options)

    def then(self, *links: Any) -> Any:
        return self.task("add", 1, 2, link=list(links))

    def chain(self, *signatures: Any) -> Any:
        return chain(*signatures, app=self.app)

    def group(self, *signatures: Any) -> Any:
        return group(*signatures, app=self.app)

    def chord(self, header: list[Any], body: Any) -> Any:
        return chord(header, body, app=self.app)

    def each(self, kind: str, *rest: Any) -> Any:
        return getattr(self.app.tasks[FORBIDDEN], kind)(*rest)

    def deep(self, wrap: Callable[[Any], Any]) -> Any:
        signature = self.end
        for _ in range(DEEP):
            signature = wrap(signature)
        return signature


ROUTES: dict[str, Callable[[Canvas], Any]] = {
    "itself": lambda c: c.end,
    "map": lambda c: c.each("map", [c.key]),
    "starmap": lambda c: c.each("starmap", [[c.key]]),
    "chunks": lambda c: c.each("chunks", [[c.key]], 1),
    "link": lambda c: c.then(c.end),
    "link_error": lambda c: c.fails.set(link_error=[c.end]),
    "link of a link": lambda c: c.then(c.then(c.end)),
    "link_error of a link": lambda c: c.then(c.fails.set(link_error=[c.end])),
    "map in a link": lambda c: c.then(c.each("map", [c.key])),
    "starmap in a link": lambda c: c.then(c.each("starmap", [[c.key]])),
    "chunks in a link": lambda c: c.then(c.each("chunks", [[c.key]], 1)),
    "chain": lambda c: c.chain(c.add, c.end),
    "chain in a link": lambda c: c.then(c.chain(c.add, c.end)),
    "chain in a link's options": lambda c: c.then(c.task("add", 1, 2, chain=[c.end])),
    "group": lambda c: c.group(c.end, c.add),
    "group in a chain": lambda c: c.chain(c.add, c.group(c.add, c.end)),
    "group in a link": lambda c: c.then(c.group(c.add, c.end)),
    "header of a chord": lambda c: c.chord([c.end, c.add], c.add),
    "header of a chord in a link": lambda c: c.then(c.chord([c.add, c.end], c.add)),
    "header of a chord in a chain": lambda c: c.chain(c.add, c.chord([c.add, c.end], c.add), c.add),
    "body of a chord": lambda c: c.chord([c.add], c.end),
    "body of a chord in a link": lambda c: c.then(c.chord([c.add, c.add], c.end)),
    "body of a chord in a chain": lambda c: c.chain(c.add, c.chord([c.add, c.add], c.end)),
    "body of a chord in a body": lambda c: c.chord([c.add], c.chord([c.add], c.end)),
    "link_error of a chord": lambda c: c.chord([c.fails], c.add.clone().on_error(c.end)),
    "links nested to the limit": lambda c: c.deep(c.then),
    "groups nested to the limit": lambda c: c.then(c.deep(c.group)),
    "link of a task that is retried": lambda c: c.task("again", uuid4().hex, 0, link=[c.end]),
    "chain of a task that is retried": lambda c: c.chain(c.task("again", uuid4().hex, 0), c.end),
    "link of a task that is replaced": lambda c: c.task("becomes", 1, 2, link=[c.end]),
    "chain of a task that is replaced": lambda c: c.chain(c.task("becomes", 1, 2), c.end),
}


def first(result: Any) -> Any:
    """Return the result of what is sent first."""
    while result.parent:
        result = result.parent
    return getattr(result, "results", [result])[0]


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_is_closed_to_who_may_not_send_what_is_at_its_end(
    running: Running, shop: Celery, key: str, route: str
) -> None:
    ROUTES[route](Canvas(running.client, key)).apply_async()
    assert running.happens(key)
    theirs = uuid4().hex
    with pytest.raises(errors.NotAllowed):
        first(ROUTES[route](Canvas(shop, theirs)).apply_async()).get(timeout=SOON)
    assert running.count(theirs) == 0


def test_a_link_that_is_renamed_by_its_own_headers_is_judged_by_its_new_name(running: Running, shop: Celery) -> None:
    def renamed(app: Celery) -> AsyncResult:
        key = uuid4().hex
        link = Canvas(app, key).task("again", key, 0, headers={"task": f"{TASKS}.flaky"}, task_id=key)
        assert Canvas(app, key).then(link).apply_async().get(timeout=SOON) == 3
        return AsyncResult(key, app=app)

    assert renamed(running.client).get(timeout=SOON) == 0  # what `flaky` returns
    refused = renamed(shop)
    with pytest.raises(errors.NotAllowed):
        refused.get(timeout=SOON)
    assert running.count(str(refused.id)) == 0


# -- what may be a name, and is none -----------------------------------------------------------------------------------


def send(app: Celery, task: dict[str, Any], *args: Any, **embed: Any) -> AsyncResult:
    """Sign and send any claims, past everything that an honest caller's Celery and ours would refuse."""
    signer, now = app.hardening.signer, int(time.time())
    task = {"name": ADD, "id": uuid4().hex, **task}
    own = str(signer.identity)
    fields = {"iss": own, "origin": own, "owner": own, "aud": app.hardening.audience, "jti": claims.new_id()}
    fields |= {"iat": now, "exp": now + 600, "queue": "everything.default", "task": task}
    payload = codec.encode({**fields, "args": args or (1, 2), "kwargs": {}, "embed": embed})
    with app.connection_for_write() as connection:
        connection.Producer().publish(
            signer.sign(envelope.Type.TASK, payload),
            exchange=app.hardening.broker.exchange,
            routing_key="everything.default",
            content_type=envelope.CONTENT_TYPE,
            content_encoding="utf-8",
        )
    return AsyncResult(task["id"], app=app)


@pytest.mark.parametrize("name", ["shadow", "reply_to", "correlation_id", "app_id", "root_id", "parent_id", "group"])
def test_a_field_that_is_no_tasks_name_is_not_taken_for_one(shop: Celery, name: str) -> None:
    assert send(shop, {name: FORBIDDEN}).get(timeout=SOON) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"headers": {"task": FORBIDDEN}},
        {"stamps": {"task": FORBIDDEN}, "stamped_headers": ["task"]},
        {"stamps": {"link": [{"task": FORBIDDEN}]}, "stamped_headers": ["link"]},
        {"argsrepr": FORBIDDEN},
        {"task": FORBIDDEN},
        {"callbacks": [{"task": FORBIDDEN}]},
    ],
    ids=str,
)
def test_a_field_that_would_hide_a_task_is_refused(shop: Celery, fields: dict[str, Any]) -> None:
    refused = send(shop, fields)
    for _ in range(3):
        assert send(shop, {}).get(timeout=SOON) == 3
    assert refused.state == "PENDING"  # had it been let in, it would have run, and first


# -- the ids of others -------------------------------------------------------------------------------------------------


def add(task_id: str, *args: Any, **options: Any) -> dict[str, Any]:
    """A signature with another one's id, as no Celery makes it unless it is asked to."""
    return {"task": ADD, "args": args or [5, 5], "options": {"task_id": task_id, **options}, "immutable": True}


#: By place: what the shop sends, with the client's id in it.
CLAIMS: dict[str, Callable[[Celery, str], Any]] = {
    "task": lambda app, victim: send(app, {"id": victim}, 5, 5),
    "a task that fails": lambda app, victim: send(app, {"id": victim}, "5", 5),
    "a task that is refused": lambda app, victim: send(app, {"id": victim, "name": FORBIDDEN}),
    "a task that has expired": lambda app, victim: send(app, {"id": victim, "expires": "2001-01-01T00:00:00+00:00"}),
    "a task that is retried": lambda app, victim: send(app, {"id": victim, "name": f"{TASKS}.again"}, victim, 0),
    "link": lambda app, victim: send(app, {}, callbacks=[add(victim)]),
    "chain": lambda app, victim: send(app, {}, chain=[add(victim)]),
    "chain of a task that fails": lambda app, victim: send(app, {}, "1", 2, chain=[add(victim)]),
    "chain of a task that is replaced": lambda app, victim: send(
        app, {"name": f"{TASKS}.becomes"}, chain=[add(victim, link=[add(victim)])]
    ),
    "body of a chord that fails": lambda app, victim: chord(
        [app.signature(ADD, ("1", 2))], app.signature(ADD, (5,), task_id=victim), app=app
    ).apply_async(),
    "link in the owner's name": lambda app, victim: send(
        app, {}, callbacks=[add(victim, headers={"owner": CLIENT, "origin": CLIENT})]
    ),
}


@pytest.mark.parametrize("place", CLAIMS)
def test_an_id_of_anothers_is_ones_own_wherever_it_is_put(running: Running, shop: Celery, key: str, place: str) -> None:
    victim = running.task("held").delay(key)
    assert running.happens(f"{key}.started")
    CLAIMS[place](shop, victim.id)
    assert within(SOON, AsyncResult(victim.id, app=shop).ready)  # as the shop sees its own task of this id
    assert victim.state == "STARTED"
    running.go(key)
    assert victim.get(timeout=SOON) == key


def test_a_group_of_anothers_cannot_be_joined_nor_restored(running: Running, shop: Celery, key: str) -> None:
    body = running.task("echo").s()
    victim = chord([running.task("held").s(key), running.task("add").s(1, 1)], body, app=running.client).apply_async()
    victim.parent.save()
    assert running.happens(f"{key}.started")
    gid = victim.parent.id
    for index in range(2):
        send(shop, {"group": gid, "group_index": index}, 5, 5, chord=add(victim.id, chord_size=2)).get(timeout=SOON)
    assert shop.GroupResult.restore(gid) is None
    assert not victim.ready()
    running.go(key)
    assert victim.get(timeout=SOON) == [key, 2]
