"""Flower in a real browser, as `make up` starts it, and stock Flower beside it (FLW-1, FLW-2)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from .baking import PROJECT, TEMPLATE
from .test_project import make

CHROMIUM = Path("/usr/bin/chromium")
HTML = "<img src=x onerror='window.planted=true'><b>bold</b><script>window.planted=true</script>"
#: In a worker's name: one event that it signed, and the same of another task, which nobody did.
REPORT = """
import json, sys, time
from my_service.app import app
from my_service.hardening import control
own, exchange = app.hardening, app.hardening.broker.broadcast("events", "topic")
signed, forged, html = sys.argv[1:]
node = own.signer.identity.account + "@" + html
event = {"type": "task-received", "name": html, "hostname": node, "pid": 1, "retries": 0, "timestamp": time.time()}
event |= {"utcoffset": 0, "clock": 1, "args": html, "kwargs": html}
with app.connection_for_write() as connection, connection.Producer() as producer:
    to = {"exchange": exchange.name, "routing_key": "task.received", "declare": [exchange]}
    producer.publish(json.dumps({**event, "uuid": forged}), content_type="application/json", **to)
    events = [{**event, "uuid": signed}]
    control.publish(producer, control.sign(own, control.Report, node=node, events=events), exchange, "task.received")
"""
SEND = "from my_service.tasks import report; print(report.report.delay().id)"


@pytest.fixture(scope="module")
def browser() -> Path:
    """Install the browser, and what drives it, in an environment of its own."""
    if not CHROMIUM.exists():
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
        if os.getuid() != 0 or not shutil.which("apt-get"):
            pytest.fail(f"Chromium is needed: sudo {' '.join(install)}")
        subprocess.run(["apt-get", "update"], check=True)
        subprocess.run(install, check=True)
    environment = TEMPLATE / "build" / "browser"
    environment.parent.mkdir(exist_ok=True)
    lock = TEMPLATE / "requirements" / "tools" / "browser.txt"
    subprocess.run([sys.executable, PROJECT / "tools" / "venv.py", environment, lock], cwd=TEMPLATE, check=True)
    return environment / "bin" / "python"


def browse(python: Path, address: str, password: Path, pictures: str, *tasks: str) -> dict[str, Any]:
    """Let a person look at a Flower."""
    arguments = [address, str(password), str(TEMPLATE / "reports" / pictures), *tasks]
    done = subprocess.run(
        [python, "-m", "tests.browse", *arguments], cwd=TEMPLATE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def as_role(project: Path, role: str, code: str, *arguments: str) -> str:
    """Run code with a role's environment file."""
    command = f'set -a; . ./.stack/{role}.env; exec .venv/bin/python -c "$0" "$@"'
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "src"}
    done = subprocess.run(
        ["sh", "-c", command, code, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["project", "redis_project"])
def test_a_person_sees_genuine_tasks_and_can_change_nothing(
    broker: str, browser: Path, request: pytest.FixtureRequest
) -> None:
    project: Path = request.getfixturevalue(broker)
    printed = make(project, "up")
    try:
        [line] = [line for line in printed.splitlines() if line.startswith("flower ") and "https://" in line]
        address, password = line.split()[1], Path(line.split()[-1])
        assert line in make(project, "status")
        sent = as_role(project, "client", SEND)
        signed, forged = str(uuid.uuid4()), str(uuid.uuid4())
        as_role(project, "worker", REPORT, signed, forged, HTML)
        seen = browse(browser, address, password, f"flower-{broker.removesuffix('_project')}", sent, signed)
    finally:
        make(project, "down")
    assert "nothing is up" in make(project, "status")

    assert set(seen["stranger"].values()) == set(seen["stranger's posts"].values()) == {401}
    assert (seen["stranger's socket"], seen["socket"]) == (False, False)
    allowed = {path for path, status in seen["person"].items() if status == 200}
    assert allowed == {"/", "/tasks", "/workers", "/metrics", "/static/js/flower.js"}
    assert set(seen["posts"].values()) == {403}
    assert "my_service.tasks.report.report" in seen["rows"][sent]
    assert "SUCCESS" in seen["rows"][sent]
    assert forged not in seen["task table"]
    assert HTML in seen["rows"][signed]
    assert HTML in seen["task"]
    assert (seen["markup"], seen["ran"]) == (0, False)
    assert seen["buttons"] == {"task": 0, "workers": 0, "worker": 0}
    assert seen["noise"] == []  # the policy stands in the way of nothing that Flower does
    assert (seen["injected"], seen["framed"]) == (False, False)
    wrong = seen["guesses"].count(401)  # five, less what the browser asked for by itself: an icon, say
    assert seen["guesses"] == [401] * wrong + [429] * (7 - wrong)
    assert 1 <= wrong <= 5
    assert seen["after guesses"] == 429


@pytest.mark.slow
def test_stock_flower_lets_a_stranger_do_all_of_it(browser: Path, project: Path, tmp_path: Path) -> None:
    make(project, "setup")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(project / ".venv/bin/python"), "-m", "celery", "--broker", "memory://", "flower"]
    command += ["--address=127.0.0.1", f"--port={port}"]
    environment = {"PATH": os.environ["PATH"], "FLOWER_UNAUTHENTICATED_API": "true"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
                time.sleep(0.1)
            password = tmp_path / "password"
            password.write_text("none", encoding="utf-8")
            seen = browse(browser, f"http://127.0.0.1:{port}", password, "flower-stock")
        finally:
            process.terminate()
    assert set(seen["stranger"].values()) == {200}
    assert seen["stranger's posts"]["/api/task/send-task/x"] == 200
    assert (seen["injected"], seen["framed"]) == (True, True)
    assert seen["guesses"] == [200] * 7


# -- oidc: oauth2-proxy itself is not run here, see docs/flower.md

#: What oauth2-proxy v7.15.3 knows of what these files use (`pkg/apis/options`); it refuses to start with other names.
KNOWN = {
    "": {"server", "providers", "upstreamConfig", "injectRequestHeaders"},
    "server": {"secureBindAddress", "tls"},
    "tls": {"key", "cert", "minVersion", "cipherSuites"},
    "providers": {
        *("id", "provider", "clientID", "clientSecretFile", "caFiles", "useSystemTrustStore", "scope"),
        *("code_challenge_method", "allowedGroups", "oidcConfig"),
    },
    "oidcConfig": {
        *("issuerURL", "insecureAllowUnverifiedEmail", "insecureSkipIssuerVerification", "insecureSkipNonce"),
        *("emailClaim", "groupsClaim", "userIDClaim", "audienceClaims", "enabledSigningAlgs"),
    },
    "upstreamConfig": {"upstreams"},
    "upstreams": {"id", "path", "uri", "insecureSkipTLSVerify", "passHostHeader", "proxyWebSockets", "timeout"},
    "injectRequestHeaders": {"name", "preserveRequestValue", "values"},
    "values": {"claimSource"},
    "claimSource": {"claim", "basicAuthPassword"},
    **{name: {"fromFile"} for name in ("key", "cert", "basicAuthPassword")},  # a secret is nowhere but in a file
}
CORE = {
    *("redirect_url", "email_domains", "skip_provider_button"),
    *("cookie_name", "cookie_secret_file", "cookie_secure", "cookie_httponly", "cookie_samesite"),
    *("cookie_refresh", "cookie_expire"),
}
PROXY = PROJECT / "deploy" / "oauth2-proxy"


def names(within: str, value: object) -> set[tuple[str, str]]:
    """Return every name in a document with the one that it is below."""
    if isinstance(value, list):
        return {pair for each in value for pair in names(within, each)}
    if not isinstance(value, dict):
        return set()
    return {(within, name) for name in value} | {pair for name in value for pair in names(name, value[name])}


def test_oauth2_proxy_is_told_nothing_that_it_does_not_know() -> None:
    document = yaml.safe_load((PROXY / "flower.yaml").read_text(encoding="utf-8"))
    assert [pair for pair in names("", document) if pair[1] not in KNOWN[pair[0]]] == []
    assert tomllib.loads((PROXY / "oauth2-proxy.cfg").read_text(encoding="utf-8")).keys() == CORE


def test_oauth2_proxy_lets_in_a_group_and_alone_knows_flower_s_password() -> None:
    document = yaml.safe_load((PROXY / "flower.yaml").read_text(encoding="utf-8"))
    core = tomllib.loads((PROXY / "oauth2-proxy.cfg").read_text(encoding="utf-8"))
    [provider], [upstream], [header] = (
        document["providers"],
        document["upstreamConfig"]["upstreams"],
        document["injectRequestHeaders"],
    )
    assert provider["allowedGroups"]
    assert all(provider["allowedGroups"])
    assert provider["code_challenge_method"] == "S256"
    assert provider["oidcConfig"]["issuerURL"].startswith("https://")
    assert not [name for name, on in provider["oidcConfig"].items() if name.startswith("insecure") and on]
    assert upstream["uri"].startswith("https://")
    assert (upstream["insecureSkipTLSVerify"], upstream["proxyWebSockets"]) == (False, False)
    assert (header["name"], header["preserveRequestValue"]) == ("Authorization", False)
    [value] = header["values"]
    assert value["claimSource"]["basicAuthPassword"] == {"fromFile": "/run/secrets/flower-password"}
    assert document["server"]["tls"]["minVersion"] == "TLS1.3"
    assert core["cookie_name"].startswith("__Host-")
    assert core["cookie_secure"]
    assert core["cookie_httponly"]
    assert core["redirect_url"].startswith("https://")
