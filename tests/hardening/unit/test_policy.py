"""The policy: role by action, with everything that is not written down denied."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...project import errors, identity, policy, topology

BASE = "spiffe://orders.test/production/orders"
RULES = """
application = "orders"
[queues.default]
[queues.heavy]
[pools.worker]
queues = ["default"]
sends = ["orders.tasks.*"]
[pools.importer]
queues = ["heavy"]
[callers.client]
queues = ["default"]
sends = ["orders.tasks.*", "orders.report"]
[callers.billing]
queues = ["heavy"]
sends = ["orders.tasks.bill"]
[callers.operator]
queues = ["default", "heavy"]
sends = ["orders.*"]
[callers.monitor]
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> policy.Policy:
    file = tmp_path_factory.mktemp("policy") / "topology.toml"
    file.write_text(RULES)
    return policy.Policy(topology.Topology.load(Path(file)), _identity("worker"))


def _identity(role: str, base: str = BASE) -> identity.Identity:
    return identity.Identity.parse(f"{base}/{role}")


def _may(rules: policy.Policy, signer: str, task: str, queue: str | None, origin: str | None = None) -> bool:
    try:
        rules.check(_identity(signer), _identity(origin or signer), task, queue)
    except errors.NotAllowed:
        return False
    return True


@pytest.mark.parametrize(
    ("role", "task", "queue", "allowed"),
    [
        ("client", "orders.tasks.pay", "orders.default", True),
        ("client", "orders.report", "orders.default", True),
        ("client", "orders.tasks.pay", None, True),
        ("client", "orders.tasks.pay", "orders.heavy", False),
        ("client", "orders.tasks.pay", "default", False),
        ("client", "orders.tasks.pay", "", False),
        ("client", "orders.reports", "orders.default", False),
        ("client", "orders.admin.delete", "orders.default", False),
        ("client", "xorders.tasks.pay", "orders.default", False),
        ("client", "ORDERS.TASKS.PAY", "orders.default", False),
        ("client", "orders.tasks.pay", "orders.quarantine", False),
        ("client", "celery.chord_unlock", "orders.default", False),
        ("client", "", None, False),
        ("client/billing", "orders.tasks.bill", "orders.heavy", True),
        ("client/billing", "orders.tasks.pay", "orders.heavy", False),
        ("client/billing", "orders.tasks.bill", "orders.default", False),
        ("client/unknown", "orders.tasks.pay", "orders.default", False),
        ("beat", "orders.tasks.pay", "orders.default", False),
        ("monitor", "orders.tasks.pay", "orders.default", False),
        ("monitor", "orders.tasks.pay", None, False),
        ("monitor/billing", "orders.tasks.bill", "orders.heavy", False),
        ("operator", "orders.admin.delete", "orders.heavy", True),
        ("worker", "orders.tasks.pay", "orders.default", True),
        ("worker", "orders.admin.delete", "orders.default", False),
        ("worker/importer", "orders.tasks.pay", "orders.heavy", False),
        ("worker/billing", "orders.tasks.bill", "orders.heavy", False),
        ("worker/client-2", "orders.tasks.pay", "orders.default", False),
        ("client/importer", "orders.tasks.pay", "orders.heavy", False),
    ],
)
def test_each_account_may_send_what_is_written_and_nothing_else(
    rules: policy.Policy, role: str, task: str, queue: str | None, allowed: bool
) -> None:
    for _ in range(2):  # the second answer is remembered
        assert _may(rules, role, task, queue) is allowed


@pytest.mark.parametrize("role", [role.value for role in identity.Role])
@pytest.mark.parametrize(
    "base",
    ["spiffe://orders.test/staging/orders", "spiffe://orders.test/production/other", "spiffe://x/production/orders"],
)
def test_nobody_of_another_environment_application_or_trust_domain_may_send(
    rules: policy.Policy, role: str, base: str
) -> None:
    foreign, own = _identity(role, base), _identity("client")
    for signer, origin in ((foreign, foreign), (foreign, own), (own, foreign), (_identity("worker"), foreign)):
        with pytest.raises(errors.NotAllowed):
            rules.check(signer, origin, "orders.tasks.pay", "orders.default")


@pytest.mark.parametrize("signer", ["client", "operator", "beat", "monitor", "client/billing"])
def test_only_a_worker_sends_for_another(rules: policy.Policy, signer: str) -> None:
    origin = "operator" if signer == "client" else "client"
    assert not _may(rules, signer, "orders.tasks.pay", "orders.default", origin)


def test_a_refusal_names_the_role_and_nothing_that_a_signer_chose(rules: policy.Policy) -> None:
    with pytest.raises(errors.NotAllowed) as caught:
        rules.check(_identity("client"), _identity("client"), "swordfish", "swordfish")
    assert "client may not" in str(caught.value)
    assert "swordfish" not in str(caught.value)


def test_what_a_worker_sends_for_another_both_must_be_allowed(rules: policy.Policy) -> None:
    assert _may(rules, "worker", "orders.tasks.pay", "orders.default", "client")
    assert not _may(rules, "worker", "orders.report", "orders.default", "client")  # the client may, the worker not
    assert not _may(rules, "worker", "orders.tasks.pay", "orders.default", "monitor")  # the worker may
    assert not _may(rules, "worker", "orders.tasks.pay", "orders.default", "client/billing")
    assert not _may(rules, "worker/importer", "orders.tasks.bill", "orders.heavy", "client/billing")
