"""A worker's node and whoever may knock at it: what the tests of remote control share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.control import Panel
from kombu import Exchange

from ...project import claims, codec, control, envelope, errors, identity
from ...service import Party, Service
from .desk import Desk, delivered

Role, Type = identity.Role, envelope.Type
NODE = "worker@test"
HOUR = 3600


class Room:
    """A worker's node, and everyone who may knock."""

    def __init__(self, service: Service) -> None:
        self.service, self.desk = service, Desk(service)
        self.parties: dict[str, Party] = {"client": service.client, "worker": service.worker}
        channel = service.worker.app.connection_for_write().default_channel
        for what, kind in (("control", "fanout"), ("replies", "topic"), ("events", "topic")):
            Exchange(service.rules.celery(what), kind)(channel).declare()
        self.node = self.new_node()

    def new_node(self) -> Any:
        state = SimpleNamespace(app=self.service.worker.app)
        return self.service.worker.app.control.mailbox.Node(NODE, state=state, handlers=Panel.data)

    def party(self, role: str) -> Party:
        if role not in self.parties:
            self.parties[role] = self.service.party(role)
        return self.parties[role]

    def fields(self, role: str = "operator", method: str = "ping", **changes: Any) -> dict[str, Any]:
        return {
            **self.registered(role),
            **{"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None},
            "ticket": "ticket",
            **changes,
        }

    def registered(self, role: str) -> dict[str, Any]:
        """Return the claims that every message has."""
        own, now = self.party(role).identity, self.node._started
        times = {"iat": now, "exp": now + control.Claims.lifetime}
        return {**times, "iss": str(own), "aud": own.audience, "jti": claims.new_id()}

    def message(self, fields: dict[str, Any], role: str = "operator", kind: Type = Type.CONTROL) -> Any:
        return arrives(self.party(role).signer.sign(kind, codec.encode(fields)))

    def admitted(self, role: str = "operator", **changes: Any) -> Any:
        return self.node._admitted(self.message(self.fields(role, **changes), role))


def arrives(body: Any, **properties: Any) -> Any:
    return delivered(body, **{"content_type": envelope.CONTENT_TYPE, **properties})


@pytest.fixture(scope="module")
def one_room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(Service(tmp_path_factory.mktemp("control")))


@pytest.fixture
def room(one_room: Room) -> Room:
    one_room.node = one_room.new_node()
    return one_room


def refused(code: type[errors.MessageRefused]) -> Any:
    return pytest.raises(code)
