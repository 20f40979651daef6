"""What topology.toml says is what the broker and the backend are told, and what a worker's policy decides."""

from __future__ import annotations

import pytest

from ..project import errors, identity, policy, render, tasks, topology
from ..service import ROOT, Service

TOPOLOGY = topology.Topology.load(ROOT / "topology.toml")


def test_rendered_permissions_are_those_of_the_topology() -> None:
    assert render.stale(ROOT) == [], "run `make topology` and commit what it writes"


def test_a_client_may_send_this_services_tasks(service: Service) -> None:
    service.send(tasks.thumbnail.thumbnail, "sunset.png")
    assert service.work() == 1
    assert service.quarantined() == []


def test_a_monitor_may_not(service: Service) -> None:
    service.send(tasks.thumbnail.thumbnail, "sunset.png", party=service.party("monitor"))
    assert service.work() == 0
    assert [record["code"] for record in service.quarantined()] == [errors.NotAllowed.code]


@pytest.mark.parametrize("account", sorted(TOPOLOGY.accounts))
def test_nobody_may_send_what_is_not_listed(account: str, service: Service) -> None:
    own = service.worker.identity
    role = account if account in set(identity.Role) else "client"
    signer = identity.Identity.parse(f"{own.audience}/{role}" + ("" if role == account else f"/{account}"))
    with pytest.raises(errors.NotAllowed):
        policy.Policy(TOPOLOGY, own).check(signer, signer, "elsewhere.tasks.task", TOPOLOGY.queues[0].broker_name)
