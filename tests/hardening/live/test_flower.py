"""Flower, live: what it shows to whom (FLW-1, FLW-2)."""

from __future__ import annotations

import base64
import http.client
import importlib
import json
import os
import ssl
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from flower import urls

from stack import Stack
from stack.process import wait_until

from ... import throw_away
from ...project import Settings, control, hardening, tasks
from ...service import ROOT
from .pages import Site, address, received
from .running import SOON

PACKAGE = hardening.__name__.partition(".")[0]
with throw_away():
    flower = importlib.import_module(f"{PACKAGE}.flower")
NAME = tasks.report.report.name
#: What a person may ask for. Everything else that Flower can do is not for anybody.
SHOWN = {r"/", r"/workers", r"/worker/(.+)", r"/task/(.+)", r"/tasks", r"/tasks/datatable"}
SHOWN |= {r"/static/(.*)", r"/metrics", r"/healthcheck"}
PATTERNS = [handler.regex.pattern.rstrip("$") if hasattr(handler, "regex") else handler[0] for handler in urls.handlers]
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "eA=="}


@pytest.fixture(scope="module")
def site(stack: Stack) -> Site:
    """The project's Flower, as `make up` has started it."""
    settings = stack.environment("flower")
    password = Path(settings["SECURE_CELERY_FLOWER_PASSWORD_FILE"]).read_text(encoding="utf-8")
    return Site(int(settings["SECURE_CELERY_FLOWER_PORT"]), stack.pki.tls.certificate, password)


def party(stack: Stack, role: str) -> Celery:
    """A hardened application of a role."""
    names = {name.removeprefix("SECURE_CELERY_").lower(): value for name, value in stack.environment(role).items()}
    app = Celery(role, set_as_current=False)
    settings: Any = Settings(**names)
    hardening.harden(app, settings)
    return app


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "websocket"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "/favicon.ico", "/../static/x", "//tasks", "/tasks/%2e%2e/broker"])
def test_nothing_is_shown_without_the_login_and_only_what_is_listed_with_it(
    site: Site, pattern: str, method: str
) -> None:
    headers = UPGRADE if method == "websocket" else {"Sec-Fetch-Site": "same-origin"}
    method = "GET" if method == "websocket" else method
    status, _, text = site.ask(address(pattern), method=method, **headers)
    assert status == 401
    assert text in {"Log in.", ""}
    status, _, text = site.ask(address(pattern), site.password, method, **headers)
    reads = method == "GET" and pattern in SHOWN | {"/favicon.ico"}
    if reads or (method, pattern) == ("POST", "/tasks/datatable"):
        assert status == (404 if "(.+)" in pattern else 200)  # there is no worker and no task of that name
    else:
        assert status == 403
        assert text in {"This Flower shows workers and tasks, and nothing else.", ""}


def test_another_site_cannot_ask_in_a_person_s_name(site: Site) -> None:
    path = address("/tasks/datatable")
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        assert site.ask(path, site.password, "POST", **headers)[0] == 403
    assert site.ask(path, site.password, "POST", Origin=f"https://127.0.0.1:{site.port}")[0] == 200


def test_passwords_are_not_guessed(site: Site) -> None:
    """From an address of its own, which is then locked out alone."""
    guesser = "127.0.0.66"
    answers = [site.ask("/", f"guess{number}", source=guesser)[0] for number in range(7)]
    assert answers == [401] * 5 + [429] * 2
    status, headers, _ = site.ask("/", site.password, source=guesser)
    assert (status, headers["Retry-After"]) == (429, "60")
    assert site.ask("/", site.password)[0] == 200


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    """Who may go on, behind a proxy in 10.1.2.0/24, with a clock of its own."""
    password, clock = tmp_path / "password", [1000.0]
    password.write_text("p:" * 16 + "\n", encoding="utf-8")
    password.chmod(0o600)
    monkeypatch.setattr(flower.time, "monotonic", lambda: clock[0])
    settings = flower.FlowerSettings.model_construct(
        flower_address=ip_address("0.0.0.0"),
        flower_proxies=(ip_network("10.1.2.0/24"),),
        flower_password_file=password,
    )
    return lambda: flower.Login(settings), clock


def request(source: str, credentials: str) -> SimpleNamespace:
    token = base64.b64encode(credentials.encode()).decode()
    return SimpleNamespace(remote_ip=source, headers={"Authorization": f"Basic {token}"})


@pytest.mark.parametrize(
    ("source", "status"), [("10.1.2.3", 0), ("127.0.0.1", 0), ("::1", 0), ("10.1.3.3", 403), ("2001:db8::1", 403)]
)
def test_only_this_host_and_the_proxies_may_ask(login: Any, source: str, status: int) -> None:
    assert login[0]().refusal(request(source, "any:" + "p:" * 16)) == status


def test_the_proxy_s_user_and_last_newline_do_not_matter(login: Any) -> None:
    asked = request("10.1.2.3", "ada@example.org:" + "p:" * 16 + "\n")
    deciding = login[0]()
    assert deciding.refusal(asked) == 0
    assert asked.headers["Authorization"] == request("", deciding.credentials).headers["Authorization"]
    for wrong in ("ada:", "ada", "", "ada:" + "p:" * 15, "p:" * 16):
        assert login[0]().refusal(request("10.1.2.3", wrong)) == 401


def test_a_minute_after_too_many_wrong_passwords_it_looks_again(login: Any) -> None:
    deciding, clock = login[0](), login[1]
    right, wrong = request("10.1.2.3", "any:" + "p:" * 16), request("10.1.2.3", "any:wrong")
    answers = [(deciding.refusal(wrong), deciding.refusal(right)) for _ in range(5)]
    assert answers == [(401, 0)] * 4 + [(401, 429)]  # who is logged in there makes no difference
    clock[0] += 59
    assert deciding.refusal(right) == 429
    assert deciding.refusal(request("10.1.2.4", "any:wrong")) == 401
    clock[0] += 2
    assert deciding.refusal(right) == 0
    assert [deciding.refusal(wrong) for _ in range(6)] == [401] * 5 + [429]


def test_the_cookies_key_outlives_a_restart_and_is_not_the_password(login: Any) -> None:
    first, second = login[0](), login[0]()
    assert first.cookie_secret == second.cookie_secret
    assert len(first.cookie_secret) == 64
    assert "p:p" not in first.cookie_secret


@pytest.mark.parametrize("path", ["/", "/nothing", "/broker", "/static/js/flower.js", "/worker/none", "/metrics"])
@pytest.mark.parametrize("login", [True, False])
def test_every_answer_carries_the_security_headers(site: Site, path: str, login: bool) -> None:
    _, headers, _ = site.ask(path, site.password if login else None)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-")
    assert "frame-ancestors 'none'" in policy
    assert "script-src 'self' 'unsafe-inline'" not in policy
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "Tornado" not in headers["Server"]
    assert "Access-Control-Allow-Origin" not in headers
    assert all("Secure" in value for name, value in headers.items() if name == "Set-Cookie")


def test_real_tasks_are_shown_and_forged_ones_are_not(stack: Stack, site: Site) -> None:
    client, worker, monitor = (party(stack, role) for role in ("client", "worker", "monitor"))
    exchange = worker.hardening.broker.broadcast("events", "topic")
    genuine = party(stack, "client").send_task(NAME).id
    wait_until(lambda: site.tasks().get(genuine) == NAME, "a real task", SOON)
    account = worker.hardening.signer.identity.account
    forged, signed = str(uuid4()), str(uuid4())
    plain = {"content_type": "application/json", "declare": [exchange]}
    event = received(forged, f"{account}@nowhere")
    with worker.connection_for_write() as connection, connection.Producer() as producer:
        producer.publish(json.dumps(event), exchange=exchange.name, routing_key="task.received", **plain)
        as_worker = control.Report.signers
        try:
            control.Report.signers = frozenset({*as_worker, client.hardening.signer.identity.role})
            by_client = control.sign(client.hardening, control.Report, node=event["hostname"], events=[event])
        finally:
            control.Report.signers = as_worker
        control.publish(producer, by_client, exchange, "task.received")
        event = received(signed, f"{account}@nowhere")
        by_worker = control.sign(worker.hardening, control.Report, node=event["hostname"], events=[event])
        control.publish(producer, by_worker, exchange, "task.received")
    wait_until(lambda: signed in site.tasks(), "what a worker signed, after the forged ones", SOON)
    assert forged not in site.tasks()
    with pytest.raises(PermissionError):
        monitor.control.broadcast("shutdown")


def test_a_worker_is_shown_without_arguments_and_addresses(stack: Stack, site: Site) -> None:
    def workers() -> list[str]:
        return [each["hostname"] for each in json.loads(site.ask("/?json=1", site.password)[2])["data"]]

    wait_until(lambda: any("-" in each for each in workers()), "a worker's heartbeat", SOON)
    [name] = [each for each in workers() if not each.endswith("@nowhere")]
    status, _, text = site.ask(f"/worker/{name}", site.password)
    assert status == 200
    assert NAME in text  # among the registered tasks, from `inspect`
    assert str(stack.status()[0][1]) not in text  # the broker's port
    assert "worker-shutdown" not in text  # as on any button that changes something


def test_the_password_is_in_one_file_alone(stack: Stack, site: Site) -> None:
    site.ask("/", site.password)
    processes = {pid for process, _ in stack.status() for pid, _ in process.family()}
    for pid in processes:
        for what in ("cmdline", "environ"):
            assert site.password.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
    holding = [
        file
        for file in stack.folder.rglob("*")
        if file.is_file() and site.password.encode() in file.read_bytes() + file.name.encode()
    ]
    assert holding == [stack.folder / "flower.password"]
    assert holding[0].stat().st_mode & 0o7777 == 0o600


def test_it_writes_no_file_and_connects_to_the_broker_alone(stack: Stack, site: Site) -> None:
    site.ask("/tasks", site.password)
    assert not list((stack.folder / "workers" / "flower").rglob("*"))
    [flower] = [process for process, _ in stack.status() if process.name == "flower"]
    broker = next(port for process, port in stack.status() if process.name in {"rabbitmq", "redis-broker"})
    sockets = {os.readlink(each) for each in Path(f"/proc/{flower.pid}/fd").iterdir()}
    ends = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        if f"socket:[{rest[5]}]" in sockets:
            ends.add((state == "0A", *(int(end.partition(":")[2], 16) for end in (local, remote))))
            assert local.startswith("0100007F")
    assert {port for listens, port, _ in ends if listens} == {site.port}
    assert {remote for listens, port, remote in ends if not listens and port != site.port} == {broker}


def test_only_tls_1_3_is_spoken(site: Site) -> None:
    old = ssl.create_default_context(cafile=site.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = http.client.HTTPSConnection("127.0.0.1", site.port, context=old, timeout=SOON)
    with pytest.raises(ssl.SSLError):
        connection.request("GET", "/")
    with pytest.raises((http.client.HTTPException, OSError)):
        Site(site.port).ask("/")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"FLOWER_ADDRESS": "0.0.0.0"}, "FLOWER_ADDRESS: is open to other hosts, and no proxy is named"),
        ({"FLOWER_PASSWORD_FILE": "{short}"}, "FLOWER_PASSWORD_FILE: holds fewer than 32 characters"),
        ({"FLOWER_PASSWORD_FILE": "{open}"}, "every user of this host can access"),
        ({"FLOWER_KEY": "{open}"}, "every user of this host can access"),
        ({"FLOWER_CERTIFICATE": "{ca}"}, "FLOWER_CERTIFICATE: cannot be used with its key"),
        ({"FLOWER_PORT": "0"}, "SECURE_CELERY_FLOWER_PORT"),
        ({"FLOWER_PASSWORD_FILE": None}, "FLOWER_PASSWORD_FILE: is not set"),
        ({"client": "client"}, "is no monitor of the topology"),
    ],
    ids=["open", "short", "readable", "readable-key", "other-certificate", "port", "missing", "role"],
)
def test_it_refuses_to_start_insecurely(
    stack: Stack, temporary: Path, changes: dict[str, str | None], sentence: str
) -> None:
    files = {"short": temporary / "short", "open": temporary / "open", "ca": stack.pki.tls.certificate}
    stack.account.write(files["short"], "x" * 31)
    stack.account.write(files["open"], "x" * 32).chmod(0o644)
    settings = {**stack.environment("flower"), **stack.environment(changes.pop("client", "flower") or "")}
    for name, value in changes.items():
        if value is None:
            del settings[f"SECURE_CELERY_{name}"]
        else:
            settings[f"SECURE_CELERY_{name}"] = value.format(**files)
    done = subprocess.run(
        [sys.executable, "-m", f"{PACKAGE}.flower"],
        cwd=ROOT,
        env={"PATH": os.defpath, "PYTHONPATH": "src", **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON,
        **stack.account.popen_options(),
    )
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
