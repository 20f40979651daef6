"""Every code that can be seen can be looked up."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from ...project import errors, explain

SOURCE = Path(inspect.getfile(errors)).parent
CODE = re.compile(r"[a-z]+(\.[a-z-]+)+")
LEAVES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.Refused)]


def _codes() -> dict[str, str]:
    """Return every code that the package sets or passes, by walking its source."""
    found = {}
    for module in sorted(SOURCE.glob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            values: list[ast.expr] = []
            match node:
                case ast.Call(func=ast.Name(id="ConfigurationRefused") | ast.Attribute(attr="ConfigurationRefused")):
                    values = [*node.args[3:4], *(key.value for key in node.keywords if key.arg == "code")]
                case ast.Assign(targets=[ast.Name(id="code")], value=value):
                    values = [value]
            for value in values:
                if isinstance(value, ast.Constant):
                    found[value.value] = module.name
    return found


def test_the_walk_sees_the_codes() -> None:
    assert {"config.tls", "worker.root", "message.signature", "config.trust", "queue.unknown"} <= _codes().keys()


@pytest.mark.parametrize("code", sorted(_codes()))
def test_every_code_in_the_source_is_explained(code: str) -> None:
    cause, fix = explain.catalogue()[code]
    assert cause.strip().endswith(".")
    assert fix.strip()


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_every_refusal_says_its_cause_and_its_fix(leaf: type[errors.Refused]) -> None:
    assert "code" in vars(leaf), "a code of its own"
    assert CODE.fullmatch(leaf.code) or leaf is errors.Refused
    assert "__doc__" in vars(leaf)
    assert (leaf.__doc__ or "").partition("\n")[0].endswith((".", ";"))
    assert "fix" in vars(leaf), "a fix of its own"


def test_no_two_refusals_share_a_code() -> None:
    codes = [leaf.code for leaf in LEAVES]
    assert len(set(codes) | errors.CONFIGURATION_CODES.keys() - {"config.invalid"}) == len(codes) + len(
        errors.CONFIGURATION_CODES.keys() - {"config.invalid"}
    )


def test_every_configuration_code_is_used() -> None:
    assert errors.CONFIGURATION_CODES.keys() - {"config.invalid"} <= _codes().keys()


def test_a_code_is_printed_with_cause_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["message.signature"]) == 0
    printed = capsys.readouterr().out
    assert "The signature does not fit the message." in printed
    assert "Fix: " in printed


def test_without_a_code_all_are_listed_one_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(explain.catalogue())
    assert all(len(line.split()) > 2 for line in lines)


def test_an_unknown_code_is_an_error_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["no.such"]) == 1
    assert "is no code" in capsys.readouterr().err


def test_a_refusal_is_one_line_with_its_code() -> None:
    for leaf in LEAVES:
        if leaf is not errors.ConfigurationRefused:
            text = str(leaf("detail"))
            assert text.endswith(f": detail [{leaf.code}]")
            assert "\n" not in text


def test_a_configuration_refusal_is_one_sentence_that_celery_prints() -> None:
    from celery.exceptions import SecurityError

    refusal = errors.ConfigurationRefused("broker_url", "is plain", "use amqps://", "config.tls")
    assert str(refusal) == "broker_url: is plain; use amqps:// [config.tls]"
    assert isinstance(refusal, SecurityError)


# --- who may what, and why --------------------------------------------------------------------------------------------

RULES = """\
application = "shop"
trust_domain = "shop.test"
[queues.default]
[queues.slow]
[pools.worker]
queues = ["default", "slow"]
sends = ["shop.tasks.*"]

[callers.client]
queues = ["default"]
sends = [
    "shop.tasks.pay",
]
[callers.billing]
queues = ["default"]
sends = ["shop.tasks.bill"]
[callers.operator]
controls = ["revoke"]
[callers.monitor]
[callers.mall]
identity = "spiffe://mall.test/{environment}/mall/worker"
queues = ["default"]
sends = ["shop.tasks.pay"]
"""
SHOP = "spiffe://shop.test/production/shop"


@pytest.mark.parametrize(
    ("signer", "asked", "allowed", "reason"),
    [
        ("client", ("--task", "shop.tasks.pay"), True, "line 11: callers.client.sends"),
        (f"{SHOP}/client", ("--task", "shop.tasks.pay"), True, "line 11: callers.client.sends"),
        ("client", ("--task", "shop.tasks.pay", "--queue", "default"), True, "line 11: callers.client.sends"),
        ("client", ("--task", "shop.tasks.pay", "--queue", "shop.default"), True, "line 11: callers.client.sends"),
        ("client", ("--task", "shop.tasks.pay", "--queue", "slow"), False, "line 10: callers.client.queues"),
        ("client", ("--task", "shop.tasks.bill"), False, "line 11: callers.client.sends"),
        ("billing", ("--task", "shop.tasks.bill"), True, "line 16: callers.billing.sends"),
        ("client/billing", ("--task", "shop.tasks.bill"), True, "line 16: callers.billing.sends"),
        (f"{SHOP}/client/billing", ("--task", "shop.tasks.pay"), False, "line 16: callers.billing.sends"),
        ("worker", ("--task", "shop.tasks.pay", "--queue", "slow"), True, "line 7: pools.worker.sends"),
        ("monitor", ("--task", "shop.tasks.pay"), False, "line 19: callers.monitor"),
        ("beat", ("--task", "shop.tasks.pay"), False, "no stanza"),
        ("mall", ("--task", "shop.tasks.pay"), True, "line 23: callers.mall.sends"),
        ("spiffe://mall.test/x/mall/worker", ("--task", "shop.tasks.pay"), True, "line 23: callers.mall.sends"),
        ("spiffe://mall.test/x/mall/client", ("--task", "shop.tasks.pay"), False, "no stanza"),
        ("spiffe://mall.test/x/shop/client", ("--task", "shop.tasks.pay"), False, "no stanza"),
        ("operator", ("--method", "revoke"), True, "line 18: callers.operator.controls"),
        ("operator", ("--method", "shutdown"), False, "line 18: callers.operator.controls"),
        ("monitor", ("--method", "ping"), False, "line 19: callers.monitor.controls"),
        ("operator/alice", ("--method", "revoke"), False, "no stanza"),
        ("nobody", ("--method", "revoke"), False, "no stanza"),
    ],
)
def test_a_right_is_explained_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], signer: str, asked: tuple[str, ...], allowed: bool, reason: str
) -> None:
    file = tmp_path / "topology.toml"
    file.write_text(RULES)
    code = explain.main(["--signer", signer, *asked, "--topology", str(file)])
    said = capsys.readouterr().out
    assert (code, "is allowed" in said, "is refused" in said) == (0 if allowed else 1, allowed, not allowed)
    assert reason in said
    assert str(file) in said


def test_the_environment_names_the_topology(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "topology.toml").write_text(RULES)
    monkeypatch.setenv("SECURE_CELERY_TOPOLOGY", str(tmp_path / "topology.toml"))
    assert explain.main(["--signer", "client", "--task", "shop.tasks.pay"]) == 0
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize("signer", ["spiffe://x", "Client", "client/a/b", "*"])
def test_who_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], signer: str) -> None:
    (tmp_path / "topology.toml").write_text(RULES)
    assert explain.main(["--signer", signer, "--task", "a", "--topology", str(tmp_path / "topology.toml")]) == 1
    assert "signer.identity" in capsys.readouterr().err


def test_a_wrong_topology_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "topology.toml").write_text(RULES.replace('"shop.tasks.bill"', '"*"'))
    assert explain.main(["--signer", "client", "--task", "a", "--topology", str(tmp_path / "topology.toml")]) == 1
    assert "topology.toml, line 16: callers.billing.sends" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--signer", "client"], ["--task", "a"], ["--method", "a"]])
def test_half_a_question_is_told_so(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        explain.main(arguments)
    with pytest.raises(SystemExit):
        explain.main(["--signer", "client", "--task", "a", "--method", "b"])
