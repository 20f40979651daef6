"""What topology.toml may say, and that every slip is refused with the place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...project import errors, identity, topology

GOOD = """
application = "shop"
[queues.default]
[queues.slow]
delivery_limit = 2
max_length_bytes = 1000000
[pools.worker]
queues = ["default"]
sends = ["shop.*"]
sends_to = ["default", "slow"]
[pools.heavy]
queues = ["slow"]
[callers.client]
queues = ["default"]
sends = ["shop.tasks.*"]
[callers.monitor]
"""


def load(folder: Path, text: str) -> topology.Topology:
    file = folder / "topology.toml"
    file.write_text(text, encoding="utf-8")
    return topology.Topology.load(file)


def test_everything_the_file_says_is_there(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    assert [queue.broker_name for queue in shop.queues] == ["shop.default", "shop.slow"]
    assert shop.queue("slow").delivery_limit == 2
    assert (shop.vhost, shop.exchange, shop.dead, shop.quarantine) == ("shop", "shop", "shop.dead", "shop.quarantine")
    assert list(shop.accounts) == ["worker", "heavy", "client", "monitor"]
    assert shop.account("client") == "shop.client"
    assert shop.callers["client"].sends == ("shop.tasks.*",)


def test_a_pool_publishes_to_its_own_queues_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).pools["worker"].publishes_to == ("default", "slow")
    without = load(tmp_path, GOOD.replace('sends_to = ["default", "slow"]', ""))
    assert without.pools["worker"].publishes_to == ("default",)


def test_who_sends_nothing_publishes_nowhere(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    assert shop.pools["heavy"].publishes_to == ()
    assert shop.callers["monitor"].publishes_to == ()


def test_the_topology_cannot_be_changed(tmp_path: Path) -> None:
    shop = load(tmp_path, GOOD)
    with pytest.raises(TypeError):
        shop.callers["intruder"] = shop.callers["client"]  # type: ignore[index]  # that is the point
    with pytest.raises(AttributeError):
        shop.callers["client"].sends = ("*",)  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('application = "shop"', "", "application"),
        ('application = "shop"', 'application = "Shop"', "application"),
        ('application = "shop"', 'application = "sh.op"', "application"),
        ('application = "shop"', 'application = "shop-"', "application"),
        ('application = "shop"', f'application = "{"s" * 41}"', "application"),
        ('application = "shop"', "application = 7", "application"),
        ('application = "shop"', 'application = "shop"\nallow_all = true', "top level"),
        ("[queues.default]\n[queues.slow]\ndelivery_limit = 2\nmax_length_bytes = 1000000", "", "queues"),
        ('application = "shop"', 'application = "shop"\nbroker = "kafka"', "broker"),
        ('application = "shop"', 'application = "shop"\nbroker = ["redis"]', "broker"),
        ("[queues.default]", "[queues.default]\nexclusive = true", "queues.default"),
        ("[queues.default]", "[queues.default]\n[queues.dead]", "queues.dead"),
        ("[queues.default]", "[queues.default]\n[queues.quarantine]", "queues.quarantine"),
        ("[queues.default]", "[queues.default]\n[queues.nobodys]", "queues.nobodys"),
        ("[queues.default]", '[queues."a.b"]\n[queues.default]', "queues.'a.b'"),
        ("[queues.default]", '[queues."#"]\n[queues.default]', "queues.'#'"),
        ("delivery_limit = 2", "delivery_limit = 0", "queues.slow.delivery_limit"),
        ("delivery_limit = 2", "delivery_limit = true", "queues.slow.delivery_limit"),
        ("delivery_limit = 2", 'delivery_limit = "2"', "queues.slow.delivery_limit"),
        ('[pools.heavy]\nqueues = ["slow"]', "[pools.heavy]\nqueues = []", "pools.heavy.queues"),
        ('[pools.heavy]\nqueues = ["slow"]', '[pools.heavy]\nqueues = ["sloow"]', "pools.heavy.queues"),
        ('[pools.heavy]\nqueues = ["slow"]', '[pools.heavy]\nqueues = "slow"', "pools.heavy.queues"),
        ('sends_to = ["default", "slow"]', 'sends_to = ["elsewhere"]', "pools.worker.sends_to"),
        ('sends_to = ["default", "slow"]', 'sends-to = ["default"]', "pools.worker"),
        ("[pools.heavy]", "[pools.client]", "client"),
        ("[pools.heavy]", "[pools.operator]", "operator"),
        ("[callers.client]", "[callers.heavy]", "heavy"),
        ("[callers.client]", "[callers.Client]", "callers.'Client'"),
        ("[callers.client]", f"[callers.{'c' * 24}]", "callers."),
        ('sends = ["shop.tasks.*"]', 'sends = ["*"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', 'sends = ["[a-z]*"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', 'sends = ["shop.a", "shop.a"]', "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', "sends = [1]", "callers.client.sends"),
        ('sends = ["shop.tasks.*"]', "sends = []", "callers.client"),
        ('sends = ["shop.tasks.*"]', 'send = ["shop.tasks.*"]', "callers.client"),
        ("[callers.monitor]", 'monitor = "none"', "callers.client"),
        ("[callers.monitor]", "[callers.monitor", "TOML"),
    ],
)
def test_a_slip_is_refused_with_its_place(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert old in GOOD
    with pytest.raises(errors.ConfigurationRefused) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert caught.value.code == "config.topology"
    assert str(tmp_path / "topology.toml") in str(caught.value)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


LINES = """\
application = "shop"

# Queues.
[queues.default]

[queues.slow]
delivery_limit = 2
[pools.worker]
queues = [
    "default",  # ]
    "slow",
]
sends = ["shop.*"]
rate = "10/s"
[callers.client]
queues = ["default"]
sends = [
    "shop.tasks.*",
]
rate = { "shop.tasks.report" = "5/m", "*" = "100/m" }
[callers.monitor]
controls = ["ping"]
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"shop"', '"Shop"', 1),
        ('application = "shop"\n', 'application = "shop"\n\nallow = 1', 3),
        ("[queues.default]", "[queues.Default]", 4),
        ("[queues.default]", "[queues.default]\n[queues.nobodys]", 5),
        ("delivery_limit = 2", "delivery_limit = 0", 7),
        ("delivery_limit = 2", "delivery-limit = 2", 7),
        ('    "slow",', '    "sloow",', 9),
        ('sends = ["shop.*"]', 'sends = ["*"]', 13),
        ('sends = ["shop.*"]', 'sends_to = ["x"]', 13),
        ('rate = "10/s"', 'rate = "10"', 14),
        ('rate = "10/s"', 'rate = "0/s"', 14),
        ('rate = "10/s"', 'rate = "-1/s"', 14),
        ('rate = "10/s"', 'rate = "1.5/s"', 14),
        ('rate = "10/s"', 'rate = "10/d"', 14),
        ('rate = "10/s"', 'rate = "10/s/s"', 14),
        ('rate = "10/s"', "rate = 10", 14),
        ('rate = "10/s"', 'rate = ["10/s"]', 14),
        ('rate = "10/s"', 'rate = { "?" = "10/s" }', 14),
        ('rate = "10/s"', 'rate = { "*" = 1 }', 14),
        ('rate = "10/s"', 'controls = ["ping"]', 14),
        ("[callers.client]", "[callers.worker]", 15),
        ("[callers.client]", '[callers.client]\nidentity = "x"', 15),
        ("[callers.client]", '[callers.client]\ncontrols = ["ping"]', 16),
        ('queues = ["default"]', 'queues = ["default", "default"]', 16),
        ('    "shop.tasks.*",', '    "",', 17),
        ('"5/m"', '"5/x"', 20),
        ("[callers.monitor]", "[callers.monitor]\nqueues = []\nsends = 1", 23),
        ('controls = ["ping"]', "controls = [1]", 22),
        ('controls = ["ping"]', "controls = true", 22),
    ],
)
def test_a_slip_is_refused_with_its_line(tmp_path: Path, old: str, new: str, line: int) -> None:
    load(tmp_path, LINES)
    assert old in LINES
    for newline in ("\n", "\r\n"):
        with pytest.raises(errors.ConfigurationRefused) as caught:
            load(tmp_path, LINES.replace(old, new, 1).replace("\n", newline))
        assert f"topology.toml, line {line}: " in str(caught.value)


def test_a_line_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="at line 7,"):
        load(tmp_path, LINES.replace("delivery_limit = 2", "delivery_limit ="))


def test_a_long_list_is_no_long_look_for_a_line(tmp_path: Path) -> None:
    names = "".join(f'    "shop.tasks.t{number}",\n' for number in range(5000))
    text = LINES.replace('    "shop.tasks.*",\n', names).replace('controls = ["ping"]', "controls = 1")
    parsed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        loads = topology.tomllib.loads
        patch.setattr(topology.tomllib, "loads", lambda text: (parsed.append(len(text)), loads(text))[1])
        with pytest.raises(errors.ConfigurationRefused, match="line 5021: "):
            load(tmp_path, text)
    assert sum(parsed) < 4 * len(text)


def test_rates_and_commands_are_what_the_file_says(tmp_path: Path) -> None:
    shop = load(tmp_path, LINES)
    assert shop.pools["worker"].limits == (topology.Limit("*", 10, 1),)
    limits = (topology.Limit("shop.tasks.report", 5, 60), topology.Limit("*", 100, 60))
    assert shop.callers["client"].limits == limits
    assert shop.callers["monitor"].controls == ("ping",)
    assert shop.callers["client"].controls == shop.callers["monitor"].limits == ()


FOREIGN = """
application = "shop"
trust_domain = "shop.test"
[queues.default]
[pools.worker]
queues = ["default"]
[callers.client]
queues = ["default"]
sends = ["shop.tasks.*"]
[callers.pay]
identity = "spiffe://pay.test/{environment}/pay/worker/eu"
queues = ["default"]
sends = ["shop.tasks.refund"]
"""
PAY = "spiffe://pay.test/{environment}/pay/worker/eu"


def test_another_service_is_one_exact_identity_in_the_readers_environment(tmp_path: Path) -> None:
    shop = load(tmp_path, FOREIGN)
    assert str(shop.callers["pay"].identity) == PAY
    own = identity.Identity.parse("spiffe://shop.test/staging/shop/worker")
    for environment in ("staging", "production"):
        caller = identity.Identity.parse(PAY.format(environment=environment))
        assert shop.audience(caller) == f"spiffe://shop.test/{environment}/shop"
        assert (shop.stanza(caller, own) is shop.callers["pay"]) is (environment == "staging")
        assert shop.stanza(caller, caller) is shop.callers["pay"]
    for uri in ("spiffe://shop.test/staging/shop/client/pay", "spiffe://pay.test/staging/shop/client/pay"):
        assert shop.stanza(identity.Identity.parse(uri), own) is None
    assert shop.stanza(own, own) is shop.pools["worker"]


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('trust_domain = "shop.test"', "", "trust_domain"),
        ('trust_domain = "shop.test"', 'trust_domain = ""', "trust_domain"),
        ('trust_domain = "shop.test"', 'trust_domain = "Shop.test"', "trust_domain"),
        ('trust_domain = "shop.test"', 'trust_domain = "*"', "trust_domain"),
        ('trust_domain = "shop.test"', "trust_domain = 1", "trust_domain"),
        ("[callers.pay]", "[callers.operator]", "callers.operator"),
        ("[callers.pay]", "[callers.beat]", "callers.beat"),
        ("[callers.pay]", "[callers.worker]", "worker"),
        ("[pools.worker]", "[pools.pay]", "pay"),
        ("{environment}", "*", "callers.pay.identity"),
        ("{environment}", "production", "callers.pay.identity"),
        ("{environment}", "any", "callers.pay.identity"),
        ("{environment}", "{environment}-{environment}", "callers.pay.identity"),
        ("{environment}", "x{environment}", "callers.pay.identity"),
        ("{environment}/pay", "production/{environment}", "callers.pay.identity"),
        ("/pay/worker/eu", "/*/worker/eu", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay/*", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay/worker/*", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay/worker/{environment}", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay/operator", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay/monitor/eu", "callers.pay.identity"),
        ("/pay/worker/eu", "/pay", "callers.pay.identity"),
        ("spiffe://pay.test/", "spiffe://*/", "callers.pay.identity"),
        ("spiffe://pay.test/", "", "callers.pay.identity"),
        (f'"{PAY}"', "true", "callers.pay.identity"),
        (f'"{PAY}"', f'["{PAY}"]', "callers.pay.identity"),
        ("pay.test/{environment}/pay/", "shop.test/{environment}/shop/", "callers"),
        ("pay.test/{environment}/pay/", "pay.test/{environment}/shop/", "callers"),
        ('sends = ["shop.tasks.refund"]', "", "callers.pay"),
        (
            "[callers.pay]",
            f'[callers.again]\nidentity = "{PAY}"\nqueues = ["default"]\nsends = ["a"]\n[callers.pay]',
            "twice",
        ),
        ('queues = ["default"]\nsends = ["shop.tasks.refund"]', "", "callers.pay"),
        ("[callers.client]", '[callers.client]\nidentity = "spiffe://a.test/{environment}/a/client"', "callers.client"),
    ],
)
def test_a_slip_about_another_service_is_refused_with_its_place(tmp_path: Path, old: str, new: str, where: str) -> None:
    assert old in FOREIGN
    with pytest.raises(errors.ConfigurationRefused) as caught:
        load(tmp_path, FOREIGN.replace(old, new, 1))
    assert caught.value.code == "config.topology"
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_another_service_gets_to_know_has_no_pools_and_nobody_else_may_leave_them_out(tmp_path: Path) -> None:
    before, _, after = FOREIGN.partition("[callers.client]")
    theirs = before.partition("[pools.worker]")[0] + "[callers.pay]" + after.partition("[callers.pay]")[2]
    known = load(tmp_path, theirs)
    assert (known.pools, list(known.accounts)) == ({}, ["pay"])
    for text in (theirs + '[callers.client]\nqueues = ["default"]\nsends = ["a"]', theirs.partition("[callers")[0]):
        with pytest.raises(errors.ConfigurationRefused, match="pools"):
            load(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationRefused, match="No such file"):
        topology.Topology.load(tmp_path / "topology.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topology.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.ConfigurationRefused, match="not valid TOML"):
        topology.Topology.load(tmp_path / "topology.toml")
