"""The policy: role by action, with everything that is not written down denied."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ...project import errors, identity, policy, topology

BASE = "spiffe://orders.test/production/orders"
RULES = """
application = "orders"
trust_domain = "orders.test"
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
controls = ["revoke", "re*d", "ping"]
[callers.monitor]
controls = ["*"]
[callers.shop]
identity = "spiffe://shop.test/{environment}/shop/worker"
queues = ["heavy"]
sends = ["orders.tasks.ship"]
"""
SHOP = "spiffe://shop.test/production/shop"


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


def test_another_service_may_send_what_is_written_for_it_and_speaks_for_nobody(rules: policy.Policy) -> None:
    shop = _identity("worker", SHOP)
    for _ in range(2):  # the second answer is remembered
        rules.check(shop, shop, "orders.tasks.ship", "orders.heavy")
    for origin in (_identity("worker"), _identity("client"), _identity("client", SHOP), _identity("worker/web", SHOP)):
        with pytest.raises(errors.NotAllowed, match="on behalf"):
            rules.check(shop, origin, "orders.tasks.ship", "orders.heavy")
    for task, queue in (("orders.tasks.pay", "orders.heavy"), ("orders.tasks.ship", "orders.default")):
        with pytest.raises(errors.NotAllowed):
            rules.check(shop, shop, task, queue)


def test_what_another_service_started_a_worker_may_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_text(
        RULES.replace('["heavy"]\nsends = ["orders.tasks.ship"]', '["default"]\nsends = ["orders.tasks.ship"]')
    )
    rules = policy.Policy(topology.Topology.load(tmp_path / "topology.toml"), _identity("worker"))
    shop = _identity("worker", SHOP)
    rules.check(_identity("worker"), shop, "orders.tasks.ship", "orders.default")
    with pytest.raises(errors.NotAllowed):
        rules.check(_identity("worker"), shop, "orders.tasks.pay", "orders.default")


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://shop.test/staging/shop/worker",
        "spiffe://shop.test/production/shop/client",
        "spiffe://shop.test/production/shop/operator",
        "spiffe://shop.test/production/shop/worker/shop",
        "spiffe://shop.test/production/shops/worker",
        "spiffe://orders.test/production/shop/worker",
        "spiffe://x.shop.test/production/shop/worker",
        "spiffe://orders.test/production/orders/client/shop",
        "spiffe://orders.test/production/orders/worker/shop",
        "spiffe://shop.test/production/orders/worker",
        "spiffe://shop.test/production/orders/client",
    ],
)
def test_nobody_who_is_nearly_that_service_has_its_rights(rules: policy.Policy, uri: str) -> None:
    shop, other = _identity("worker", SHOP), identity.Identity.parse(uri)
    rules.check(shop, shop, "orders.tasks.ship", "orders.heavy")  # remembered, for this identity alone
    with pytest.raises(errors.NotAllowed):
        rules.check(other, other, "orders.tasks.ship", "orders.heavy")


# --- remote control ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "method", "allowed"),
    [
        ("operator", "revoke", True),
        ("operator", "revoked", True),
        ("operator", "reserved", True),
        ("operator", "ping", True),
        ("operator", "shutdown", False),
        ("operator", "revoke_by_stamped_headers", False),
        ("operator", "conf", False),
        ("monitor", "ping", True),
        ("monitor", "revoke", False),
        ("monitor", "*", False),
        ("client", "ping", False),
        ("worker", "ping", False),
        ("operator/alice", "ping", False),
        ("client/operator-2", "ping", False),
    ],
)
def test_a_command_needs_the_role_and_the_stanza(rules: policy.Policy, role: str, method: str, allowed: bool) -> None:
    assert rules.decide_command(_identity(role), method).allowed is allowed


def test_nobody_commands_who_is_not_written_down(tmp_path: Path) -> None:
    rules = _rules(tmp_path, RULES.replace("controls = ", "#"))
    for role in ("operator", "monitor"):
        for method in policy.COMMANDS[_identity(role).role]:
            assert not rules.decide_command(_identity(role), method).allowed


# --- rate -------------------------------------------------------------------------------------------------------------


def _rules(folder: Path, text: str) -> policy.Policy:
    (folder / "topology.toml").write_text(text)
    return policy.Policy(topology.Topology.load(folder / "topology.toml"), _identity("worker"))


def _limited(folder: Path, who: str, rate: str) -> policy.Policy:
    return _rules(folder, RULES.replace(f"{who}]", f"{who}]\nrate = {rate}", 1))


def _admitted(rules: policy.Policy, signer: str, task: str = "orders.tasks.pay", origin: str | None = None) -> bool:
    uris = {"iss": str(_identity(signer)), "origin": str(_identity(origin or signer))}
    claims: Any = SimpleNamespace(**uris, task=SimpleNamespace(name=task))
    try:
        rules.admit(claims)
    except errors.RateExceeded:
        return False
    return True


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time stand still, and go on by so many seconds when told."""
    now = [time.monotonic()]
    monkeypatch.setattr("kombu.utils.limits.monotonic", lambda: now[0])

    def go(seconds: float) -> None:
        now[0] += seconds

    return go


@pytest.mark.parametrize(("rate", "seconds"), [("5/s", 1), ("5/m", 60), ("5/h", 3600)])
def test_no_more_is_admitted_than_the_rate(
    tmp_path: Path, later: Callable[[float], None], rate: str, seconds: int
) -> None:
    rules = _limited(tmp_path, "client", f'"{rate}"')
    assert [_admitted(rules, "client") for _ in range(8)] == 5 * [True] + 3 * [False]
    later(seconds / 5 * 0.9)
    assert not _admitted(rules, "client")
    later(seconds / 5 * 0.2)
    assert [_admitted(rules, "client") for _ in range(2)] == [True, False]
    later(100 * seconds)
    assert sum(_admitted(rules, "client") for _ in range(100)) == 5


@pytest.mark.parametrize("pool_rate", ["", '"9/m"'])
def test_who_has_no_rate_of_its_own_is_not_counted(
    tmp_path: Path, later: Callable[[float], None], pool_rate: str
) -> None:
    rules = _limited(tmp_path, "client", '"1/h"')
    assert all(_admitted(rules, who) for who in ("client/billing", "operator", "worker") for _ in range(1000))
    assert [_admitted(rules, "client") for _ in range(2)] == [True, False]


def test_a_rate_can_be_of_some_tasks_and_of_all(tmp_path: Path, later: Callable[[float], None]) -> None:
    rules = _limited(tmp_path, "client", '{ "orders.tasks.pay" = "2/h", "orders.tasks.*" = "3/h", "*" = "5/h" }')
    assert [_admitted(rules, "client", "orders.tasks.pay") for _ in range(3)] == [True, True, False]
    assert [_admitted(rules, "client", "orders.tasks.bill") for _ in range(2)] == [True, False]
    assert [_admitted(rules, "client", "orders.report") for _ in range(3)] == [True, True, False]


def test_a_message_that_a_worker_sends_for_another_counts_for_both(
    tmp_path: Path, later: Callable[[float], None]
) -> None:
    rules = _limited(tmp_path, "client", '"2/h"')
    assert [_admitted(rules, "worker", origin="client") for _ in range(3)] == [True, True, False]
    assert not _admitted(rules, "client")
    rules = _limited(tmp_path, "pools.worker", '"2/h"')
    assert [_admitted(rules, "worker", origin=who) for who in ("client", "beat", "operator")] == [True, True, False]


def test_what_one_limit_refuses_is_counted_for_no_other(tmp_path: Path, later: Callable[[float], None]) -> None:
    rules = _limited(tmp_path, "client", '{ "orders.tasks.pay" = "1/h", "*" = "3/h" }')
    assert [_admitted(rules, "client", "orders.tasks.pay") for _ in range(10)] == [True] + 9 * [False]
    assert [_admitted(rules, "client", "orders.report") for _ in range(3)] == [True, True, False]


def test_a_message_that_was_counted_can_be_given_back(tmp_path: Path, later: Callable[[float], None]) -> None:
    rules = _limited(tmp_path, "client", '"1/h"')
    uri = str(_identity("client"))
    claims: Any = SimpleNamespace(iss=uri, origin=uri, task=SimpleNamespace(name="orders.tasks.pay"))
    for bucket in rules.admit(claims):
        bucket.can_consume(-1)
    assert [_admitted(rules, "client") for _ in range(2)] == [True, False]


# --- cost -------------------------------------------------------------------------------------------------------------


def _operations(what: Callable[[], object]) -> int:
    """Count the calls that something makes, of Python's and of C's functions."""
    calls: Counter[str] = Counter()
    sys.setprofile(lambda _, event, __: calls.update([event]))
    try:
        what()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def _many(number: int) -> str:
    names = [f"orders.area{each}.task" for each in range(number)] + [f"orders.area{each}.*.x" for each in range(number)]
    callers = "".join(
        f'[callers.c{each}]\nidentity = "spiffe://o.test/{{environment}}/o{each}/client"\nqueues = ["heavy"]\n'
        f"sends = {names[:1]!r}\n"
        for each in range(number)
    )
    return RULES.replace('sends = ["orders.tasks.*", "orders.report"]', f"sends = {names!r}") + callers


@pytest.mark.parametrize("task", ["orders.area1.task", "orders.area1.y.x", "orders.nothing"])
def test_a_decision_costs_the_same_with_a_hundred_times_as_many_rules(tmp_path: Path, task: str) -> None:
    costs = []
    for number in (5, 500):
        rules = _rules(tmp_path, _many(number))
        _may(rules, "client", "orders.other", "orders.default")  # its stanza was looked up for another task
        first, again = (_operations(lambda r=rules: _may(r, "client", task, "orders.default")) for _ in range(2))
        assert again < first
        costs.append((first, again))
    (first, again), (first_of_many, again_of_many) = costs
    assert first_of_many <= 1.2 * first
    assert again_of_many <= 1.2 * again


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    """A signer chooses the names in its canvas."""
    rules = _rules(tmp_path, RULES)
    for number in range(3 * policy._REMEMBERED):
        _may(rules, "client", f"orders.tasks.{number}", None)
    assert rules.decide.cache_info().currsize == policy._REMEMBERED
