"""Settings for brokers that somebody else manages: each weaker way is chosen by name, is told, and is the only one."""

from __future__ import annotations

import itertools
import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ...project import Settings, audit, errors, explain, hardening
from ...service import ROOT
from . import test_settings
from .test_settings import _app, _application, _private, _refused

pki, values = test_settings.pki, test_settings.values

WEAKER = hardening.settings.WEAKER
SECRET = "p@ss:w/rd?#"
SWITCHES = [f"{place}_{what}" for place in ("broker", "result_backend") for what in ("auth", "ca", "topology")]
SWITCHES += ["replay_on_outage"]


def weak(switch: str) -> str:
    return {"auth": "password", "ca": "system", "topology": "app", "outage": "accept"}[switch.rpartition("_")[2]]


@pytest.fixture
def managed(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Genuine settings for a managed RabbitMQ and a managed Redis: every switch is the weak one."""
    for name in ("tls_ca", "tls_certificate", "tls_key"):
        del values[name]
    return {
        **values,
        **{switch: weak(switch) for switch in SWITCHES},
        "broker_url": "amqps://shared@127.0.0.1:5671/x",
        "broker_password_file": _private(tmp_path / "broker.password", SECRET.encode()),
        "result_backend": "rediss://127.0.0.1:6380/0",
    }


def strengthened(managed: dict[str, Any], pki: Any, *switches: str) -> dict[str, Any]:
    """Return the settings with these switches left alone, and the files which that needs."""
    values = {name: value for name, value in managed.items() if name not in switches}
    if any(switch.endswith("_ca") for switch in switches):
        values["tls_ca"] = pki.tls.certificate
    if any(switch.endswith("_auth") for switch in switches):
        client = pki.tls.client(managed["security_key"].parent.name)
        values |= {"tls_certificate": client.certificate, "tls_key": client.key}
    if "broker_auth" in switches:
        del values["broker_password_file"]
    if "result_backend_topology" in switches:
        values["result_backend"] = f"rediss://{_application()}.client@127.0.0.1:6380/0"
    if "broker_topology" in switches:
        values["broker_url"] = f"amqps://{_application()}.client@127.0.0.1:5671/x"
    return values


def hardened(values: dict[str, Any]) -> Any:
    app = _app()
    hardening.harden(app, Settings(**values))
    app.hardening.check(app)
    return app


# --- each weaker way is chosen by name --------------------------------------------------------------------------------


def test_nothing_is_weaker_unless_it_is_chosen(values: dict[str, Any]) -> None:
    assert Settings(**values).weakenings == ()


def test_every_switch_has_its_weakening_and_no_other_exists(managed: dict[str, Any]) -> None:
    assert list(WEAKER) == [f"{switch}={weak(switch)}" for switch in SWITCHES]
    read = hardened(managed).hardening.settings
    assert read.weakenings == tuple(f"{switch}: {text}" for switch, text in WEAKER.items())


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_weakens_one_thing(managed: dict[str, Any], pki: Any, switch: str) -> None:
    values = strengthened(managed, pki, *(each for each in SWITCHES if each != switch))
    [weakening] = hardened(values).hardening.settings.weakenings
    assert weakening.startswith(f"{switch}={weak(switch)}: ")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", ["", "none", "off", "Password", "System"])
def test_a_switch_has_two_values(managed: dict[str, Any], switch: str, value: str) -> None:
    assert _refused(managed, **{switch: value}).setting == f"SECURE_CELERY_{switch.upper()}"


@pytest.mark.parametrize("place", ["broker", "result_backend"])
@pytest.mark.parametrize(("name", "what"), [("tls_ca", "ca"), ("tls_certificate", "auth"), ("tls_key", "auth")])
def test_a_file_is_missed_while_one_connection_needs_it(
    managed: dict[str, Any], pki: Any, place: str, name: str, what: str
) -> None:
    switch = f"{place}_{what}"
    values = strengthened(managed, pki, switch)
    hardened(values)
    refusal = _refused(values, **{name: None})
    assert refusal.setting == f"SECURE_CELERY_{name.upper()}"
    assert refusal.reason == "is not set"
    assert f"SECURE_CELERY_{switch.upper()}={weak(switch)}" in refusal.fix


@pytest.mark.parametrize("name", ["tls_ca", "tls_certificate", "tls_key"])
def test_a_file_that_no_connection_uses_is_refused(managed: dict[str, Any], pki: Any, name: str) -> None:
    refusal = _refused(managed, **{name: pki.tls.certificate})
    assert refusal.setting == f"SECURE_CELERY_{name.upper()}"
    assert "leaves it unused" in refusal.reason


def test_a_password_is_missed_where_it_is_the_login(managed: dict[str, Any]) -> None:
    refusal = _refused(managed, broker_password_file=None)
    assert (refusal.setting, refusal.reason) == ("SECURE_CELERY_BROKER_PASSWORD_FILE", "is not set, and is the login")


def test_a_password_is_refused_where_the_certificate_is_the_login(values: dict[str, Any], tmp_path: Path) -> None:
    refusal = _refused(values, broker_password_file=_private(tmp_path / "p", b"x"))
    assert refusal.setting == "SECURE_CELERY_BROKER_PASSWORD_FILE"
    assert "SECURE_CELERY_BROKER_AUTH=password" in refusal.fix


@pytest.mark.parametrize("mode", [0o604, 0o644])
def test_a_password_that_others_can_read_is_refused(managed: dict[str, Any], mode: int) -> None:
    managed["broker_password_file"].chmod(mode)
    assert _refused(managed).code == "config.key-permissions"


def test_a_password_that_changes_later_is_no_changed_setting(managed: dict[str, Any]) -> None:
    """Whoever has just rotated it may call on: the login that was checked at the start is the one that is used."""
    app = hardened(managed)
    managed["broker_password_file"].write_bytes(b"another")
    app.hardening.check_configuration(app)


def test_a_password_in_the_address_is_refused(managed: dict[str, Any]) -> None:
    refusal = _refused(managed, broker_url="amqps://shared:swordfish@127.0.0.1/x")
    assert refusal.code == "config.tls"
    assert "swordfish" not in str(refusal)


# --- accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "default@", "{0}.worker@", "{0}.client@127.0.0.1;rediss://"])
def test_another_account_than_the_topologys_is_refused(values: dict[str, Any], user: str) -> None:
    refusal = _refused(values, result_backend=f"rediss://{user.format(_application())}127.0.0.1:6380/0")
    assert refusal.setting == "SECURE_CELERY_RESULT_BACKEND"
    assert "RESULT_BACKEND_TOPOLOGY=app" in refusal.fix


@pytest.mark.parametrize("user", ["", "shared@", "{0}.worker@"])
def test_a_password_for_another_account_than_the_topologys_is_refused(managed: dict[str, Any], user: str) -> None:
    url = f"amqps://{user.format(_application())}127.0.0.1/x"
    refusal = _refused(managed, broker_topology="operator", broker_url=url)
    assert refusal.setting == "SECURE_CELERY_BROKER_URL"
    assert " BROKER_TOPOLOGY=app" in refusal.fix
    hardened({**managed, "broker_topology": "operator", "broker_url": f"amqps://{_application()}.client@127.0.0.1/x"})


def test_rabbitmq_has_no_account_for_the_nameless(managed: dict[str, Any]) -> None:
    """Without a name the login would be as `guest`."""
    refusal = _refused(managed, broker_url="amqps://127.0.0.1/x")
    assert (refusal.setting, refusal.reason) == ("SECURE_CELERY_BROKER_URL", "names no account")


def test_the_password_is_in_each_address_of_a_failover_list(managed: dict[str, Any]) -> None:
    app = hardened({**managed, "broker_url": "amqps://shared@127.0.0.1/x;amqps://shared@127.0.0.2:5/x"})
    connection = app.connection_for_write()
    for _ in range(2):
        assert (connection.userid, connection.password) == ("shared", SECRET)
        assert SECRET not in connection.as_uri()
        connection.maybe_switch_next()
    assert SECRET not in repr(app.hardening.settings)


@pytest.mark.parametrize(("strong", "method"), [((), "PLAIN"), (("broker_auth",), "EXTERNAL")])
def test_the_login_is_what_was_chosen(managed: dict[str, Any], pki: Any, strong: tuple[str, ...], method: str) -> None:
    app = hardened(strengthened(managed, pki, *strong))
    assert app.connection_for_write().login_method == method


# --- what no switch weakens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=4)))
def test_servers_are_verified_whatever_is_chosen(managed: dict[str, Any], pki: Any, chosen: tuple[bool, ...]) -> None:
    switches = [switch for switch in SWITCHES if switch.endswith(("_auth", "_ca"))]
    strong = {switch for switch, yes in zip(switches, chosen, strict=True) if yes}
    conf = hardened(strengthened(managed, pki, *strong)).conf
    broker, backend = conf.broker_use_ssl, conf.redis_backend_use_ssl
    assert broker["cert_reqs"] is backend["ssl_cert_reqs"] is ssl.CERT_REQUIRED
    assert broker["server_hostname"] is None  # the address's host
    assert backend["ssl_check_hostname"] is True
    assert broker["tls_minimum_version"] is backend["ssl_min_version"] is ssl.TLSVersion.TLSv1_2
    assert broker["ciphers"] == backend["ssl_ciphers"] == hardening.tls.CIPHERS
    assert bool(broker["ca_certs"]) == ("broker_ca" in strong)
    assert bool(backend["ssl_ca_certs"]) == ("result_backend_ca" in strong)
    assert bool(broker["certfile"]) == ("broker_auth" in strong)
    assert bool(backend["ssl_certfile"]) == ("result_backend_auth" in strong)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_caller_tells_what_is_weaker_when_it_starts(
    managed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hardened(managed)
    events = [record.audit for record in caplog.records if record.name == audit.logger.name]  # type: ignore[attr-defined]  # set by audit.record
    told = [event["setting"] for event in events if event["event"] == "hardening.weakened"]
    assert told == [f"{switch}: {text}" for switch, text in WEAKER.items()]  # and none was cut off


def test_who_weakens_nothing_tells_nothing(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    hardened(values)
    assert "hardening.weakened" not in caplog.text


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the settings' environment variables."""

    def set_all(given: dict[str, Any]) -> None:
        for name, value in given.items():
            monkeypatch.setenv(f"SECURE_CELERY_{name.upper()}", str(value))

    return set_all


def test_explain_prints_what_the_settings_weaken(
    managed: dict[str, Any], environment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(managed)
    assert explain.main(["--settings"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"weaker: {switch}: {text}" for switch, text in WEAKER.items()]


def test_explain_says_that_nothing_is_weaker(
    values: dict[str, Any], environment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(values)
    assert explain.main(["--settings"]) == 0
    assert capsys.readouterr().out == "no setting weakens anything\n"


def test_explain_says_what_would_stop_a_process(
    managed: dict[str, Any], environment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    environment({**managed, "tls_ca": "/etc/ca.pem"})
    assert explain.main(["--settings"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert errors.ConfigurationRefused.code in printed.err
    assert "SECURE_CELERY_TLS_CA" in printed.err


def test_status_says_how_to_start_when_nothing_is_up(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stack", "status", "--folder", str(tmp_path / "none")]
    environment = {"PATH": os.defpath}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "nothing is up" in done.stdout
    assert "`make up` starts" in done.stdout
    assert not (tmp_path / "none").exists()
