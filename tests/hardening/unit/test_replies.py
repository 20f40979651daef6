"""Replies: a worker signs its own, and whoever asked gets those alone, whatever else is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ...project import codec, control, envelope
from .room import HOUR, NODE, Role, Room, Type


def answer(room: Room, value: Any) -> Any:
    """Let the worker answer; return what who asked gets."""
    mailbox = room.service.worker.app.control.mailbox
    sent: list[tuple[Any, ...]] = []
    node = room.new_node()
    node.mailbox = SimpleNamespace(**{**vars(mailbox), "_send": lambda *args: sent.append(args)})
    node.mailbox._publish_reply = type(mailbox)._publish_reply.__get__(node.mailbox)
    node.handlers = {"ping": lambda _: value}
    node.channel = None
    node.handle_message(node._admitted(room.message(room.fields())))
    ((body, exchange, key, _),) = sent
    assert (exchange.name, key) == (room.service.rules.celery("replies"), "operator")
    reply, signer = control.verify(room.party("operator").app.hardening, control.Reply, body)
    assert (reply.ticket, reply.node, signer.role) == ("ticket", NODE, Role.WORKER)
    return reply.reply


@pytest.mark.parametrize("value", [{"ok": "pong"}, [], None, "x"])
def test_a_reply_is_signed_by_the_worker_for_its_node_and_for_the_ticket(room: Room, value: Any) -> None:
    assert answer(room, value) == value


@pytest.mark.parametrize("value", [object(), "x" * 2_000_000])
def test_what_cannot_be_sent_is_an_error_and_no_crash(room: Room, value: Any) -> None:
    assert answer(room, value) == {"error": "it cannot be sent"}


def asked(room: Room, *answers: Callable[[str], tuple[Any, dict[str, Any]]], **options: Any) -> Any:
    """Ask as the operator over the in-memory broker, where each answer waits once the command is out."""
    app = room.party("operator").app
    with app.connection_for_write() as connection:
        mailbox = app.control.mailbox(connection)

        exchange = room.service.rules.celery("replies")

        def send(command: bytes, *_: Any) -> None:
            ticket = codec.decode(room.party("monitor").app.hardening.verifier.verify(Type.CONTROL, command).payload)
            with connection.Producer() as producer:
                for make in answers:
                    body, properties = make(ticket["ticket"])
                    options = {"content_type": envelope.CONTENT_TYPE, "content_encoding": "utf-8", **properties}
                    producer.publish(body, exchange=exchange, routing_key="operator", **options)

        mailbox._send = send
        return mailbox._broadcast("ping", reply=True, timeout=0.2, **options)


def genuine(room: Room, node: str = NODE, role: str = "worker", **changes: Any) -> Any:
    def make(ticket: str) -> tuple[Any, dict[str, Any]]:
        fields = {**room.registered(role), "ticket": ticket, "node": node, "reply": "pong", **changes}
        return room.party(role).signer.sign(Type.REPLY, codec.encode(fields)), {}

    return make


def test_replies_of_workers_are_returned_once_for_each_node(room: Room) -> None:
    both = asked(room, genuine(room), genuine(room), genuine(room, "worker.2@test"))
    assert both == [{NODE: "pong"}, {"worker.2@test": "pong"}]
    assert asked(room) == []


def test_a_node_that_was_not_asked_answers_in_vain(room: Room) -> None:
    assert asked(room, genuine(room, "worker.9@x"), genuine(room), destination=[NODE]) == [{NODE: "pong"}]


FOREIGN: dict[str, Callable[[Room], Any]] = {
    "unsigned": lambda _: lambda ticket: (json.dumps({"worker@forged": ticket}), {"content_type": "application/json"}),
    "pickled": lambda _: lambda ticket: (b"\x80", {"content_type": "application/x-python-serialize"}),
    "garbage": lambda _: lambda ticket: ("\xff", {}),
    "by a client": lambda room: genuine(room, "client@forged", "client"),
    "by a monitor": lambda room: genuine(room, "monitor@forged", "monitor"),
    "for another pool's node": lambda room: genuine(room, "batch@forged"),
    "for a name that looks like the pool's": lambda room: genuine(room, "worker2@forged"),
    "to another question": lambda room: genuine(room, "worker.9@forged", ticket="other"),
    "an hour old": lambda room: genuine(room, "worker.9@forged", iat=room.node._started - HOUR),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_reply_is_not_returned_and_hides_no_genuine_one(room: Room, name: str) -> None:
    foreign = FOREIGN[name](room)
    assert asked(room, foreign, foreign, genuine(room), limit=1) == [{NODE: "pong"}]
    assert asked(room, foreign) == []
