"""Keys, certificates and trust change while tasks are on their way: nothing is lost, nothing is wrongly refused.

What is counted are effects: how often a task ran, and how many messages the quarantine holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery
from PIL import Image

from stack import Stack
from stack.pki import Authority, Pair

from ...project import Settings, errors, hardening, tasks
from ...service import ROOT
from .everything import application, within
from .rotation import (
    add,
    all_ran,
    everyone_looks,
    holder,
    ran,
    refused,
    said,
    send,
    serial,
    settings_of,
    settled,
    until_refused,
)
from .running import SOON, Running

MANY = 300


@pytest.fixture(scope="module")
def running(temporary: Path) -> Iterator[Running]:
    """A stack of this module's own, since it revokes what the others sign with."""
    with Running(temporary / "rotation") as running:
        yield running


@pytest.fixture(autouse=True)
def undisturbed(running: Running) -> Iterator[None]:
    """See that the worker serves in the end, and never ended."""
    pid = running.worker.pid
    yield
    assert within(SOON, lambda: add(running.caller("client"), running) == 3)
    assert running.worker.alive()
    assert running.worker.pid == pid


# --- rotation ---------------------------------------------------------------------------------------------------------


def test_keys_are_rotated_under_load(running: Running, key: str) -> None:
    """The client's and the worker's, twice; in the end what they had is revoked, so that none of it is in use."""
    caller, names = running.caller("client"), [f"{key}.{number}" for number in range(MANY)]
    signing = running.stack.pki.signing.folder
    before, results, had = refused(running), [], []
    for number, name in enumerate(names):
        if number in {MANY // 3, 2 * MANY // 3}:
            for role in ("client", "worker"):
                had.append(Pair(signing / f"{role}.pem", signing / f"{role}-key.pem").serial)
                running.stack.rotate(role)
        send(running, caller, [name])
        if number % 3 == 0:
            results.append(running.task("counted", caller).delay(f"{name}.result"))
    assert all_ran(running, names)
    assert [result.get(timeout=SOON) for result in results] == [f"{names[3 * at]}.result" for at in range(MANY // 3)]
    assert ran(running, names) == [1] * MANY
    assert settled(running)
    assert refused(running) == before
    assert len({*had}) == 4
    assert within(SOON, lambda: add(caller, running) == 3)
    everyone_looks()
    running.stack.pki.revoke(*had)
    again = [f"{name}.again" for name in names[:20]]
    send(running, caller, again)
    assert all_ran(running, again)
    for _ in range(20):  # from every process of the pool
        assert add(caller, running) == 3
    assert refused(running) == before


def replace(running: Running, role: str, pair: Pair, *, only: str = "") -> None:
    """Put another pair where a role has its own: the key, then the certificate, or one of them."""
    signing = running.stack.pki.signing.folder
    if only != "certificate":
        running.stack.account.write(signing / f"{role}-key.pem", pair.key.read_bytes())
    if only != "key":
        (signing / "new.pem").write_bytes(pair.certificate.read_bytes())
        (signing / "new.pem").rename(signing / f"{role}.pem")


@pytest.mark.parametrize(("first", "second"), [("key", "certificate"), ("certificate", "key")])
def test_half_of_a_new_pair_stops_nothing(running: Running, key: str, first: str, second: str) -> None:
    caller = running.caller("client")
    before = refused(running)
    refusals, loads = (said(running, f"credentials.{what}") for what in ("refused", "loaded"))
    pairs = {role: running.stack.issue(role, f"half-{role}-{first}") for role in ("client", "worker")}
    for role, pair in pairs.items():
        replace(running, role, pair, only=first)
    names = [f"{key}.{number}" for number in range(30)]
    assert within(SOON, lambda: add(caller, running) == 3 and said(running, "credentials.refused") > refusals)
    send(running, caller, names)
    assert all_ran(running, names)
    assert add(caller, running) == 3
    for role, pair in pairs.items():
        replace(running, role, pair, only=second)
    assert within(SOON, lambda: add(caller, running) == 3 and said(running, "credentials.loaded") > loads)
    assert within(SOON, lambda: caller.hardening.signer.chain[0].serial_number == pairs["client"].serial)
    assert refused(running) == before


# --- another CA -------------------------------------------------------------------------------------------------------


@contextmanager
def second_ca(running: Running) -> Iterator[Authority]:
    """Trust a second CA beside the first; in the end everything is as it was."""
    store, second = running.stack.pki.store, running.stack.pki.authority("signing-2")
    first = {file: file.read_bytes() for file in store.iterdir()}
    (store / "second.crl").write_bytes(second.revocations.read_bytes())
    (store / "second.pem").write_bytes(second.certificate.read_bytes())
    try:
        yield second
    finally:
        caller, loads = running.caller("client"), said(running, "credentials.loaded")
        for file, content in first.items():
            file.write_bytes(content)
        assert within(SOON, lambda: add(caller, running) == 3 and said(running, "credentials.loaded") > loads)
        for role in ("client", "worker"):
            running.stack.rotate(role)
        caller, refusals = running.caller("client"), said(running, "credentials.loaded")
        assert within(SOON, lambda: add(caller, running) == 3 and said(running, "credentials.loaded") > refusals)
        everyone_looks()
        for name in ("second.pem", "second.crl"):
            (store / name).unlink()


def test_a_new_ca_takes_over_without_a_gap(running: Running, key: str, tmp_path: Path) -> None:
    caller, before = running.caller("client"), refused(running)
    late, _ = holder(running, "client", "late", tmp_path)  # keeps a certificate of the old CA
    with second_ca(running) as second:
        names = [f"{key}.{number}" for number in range(60)]
        for number, name in enumerate(names):
            if number in {20, 40}:
                role = {20: "client", 40: "worker"}[number]
                replace(running, role, second.signer(role, running.stack.identity(role)))
            send(running, caller, [name])
            send(running, late, [f"{name}.late"])
        assert all_ran(running, [*names, *(f"{name}.late" for name in names)])
        assert within(SOON, lambda: add(caller, running) == 3)
        assert refused(running) == before
        everyone_looks()
        for name in ("ca.pem", "ca.crl"):
            (running.stack.pki.store / name).unlink()
        probes = until_refused(running, late, key)
        old, new = ([f"{key}.{kind}.{number}" for number in range(50)] for kind in ("old", "new"))
        for pair in zip(old, new, strict=True):
            send(running, late, [pair[0]])
            send(running, caller, [pair[1]])
        assert all_ran(running, new)
        assert settled(running)
        assert ran(running, old) == [0] * len(old)
        assert within(SOON, lambda: refused(running) == before + ran(running, probes + old).count(0))
        assert ran(running, new) == [1] * len(new)
        assert add(caller, running) == 3


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_stolen_key_is_revoked_under_load(running: Running, key: str, tmp_path: Path) -> None:
    caller, (thief, stolen) = running.caller("client"), holder(running, "client", f"stolen-{key}", tmp_path)
    kinds = {
        kind: [f"{key}.{kind}.{number}" for number in range(MANY // 3)]
        for kind in ("before", "waiting", "waiting.stolen", "good", "bad")
    }
    send(running, thief, kinds["before"])
    assert all_ran(running, kinds["before"])
    for good, bad in zip(kinds["waiting"], kinds["waiting.stolen"], strict=True):  # signed before the revocation
        send(running, caller, [good], queue="slow")
        send(running, thief, [bad], queue="slow")
    before = refused(running)
    running.stack.revoke(serial(stolen))
    probes = until_refused(running, thief, key)
    for good, bad in zip(kinds["good"], kinds["bad"], strict=True):
        send(running, caller, [good])
        send(running, thief, [bad])
    with running.batch():
        assert all_ran(running, [*kinds["good"], *kinds["waiting"]])
        assert settled(running)
        assert settled(running, "slow")
    revoked = kinds["waiting.stolen"] + kinds["bad"]
    assert ran(running, revoked) == [0] * len(revoked)
    assert within(SOON, lambda: refused(running) == before + ran(running, probes + revoked).count(0))
    for kind in ("before", "waiting", "good"):
        assert ran(running, kinds[kind]) == [1] * len(kinds[kind])
    own = {"security_key": stolen.key, "security_certificate": stolen.certificate}
    with pytest.raises(errors.ConfigurationRefused, match="has been revoked"):
        application(Settings(**settings_of(running.stack) | own))


def test_a_message_that_waits_for_its_time_is_refused_then(running: Running, key: str, tmp_path: Path) -> None:
    """With Redis the worker has it already, and had admitted it."""
    caller, (thief, stolen) = running.caller("client"), holder(running, "client", f"early-{key}", tmp_path)
    before = refused(running)
    send(running, thief, [f"{key}.bad"], countdown=5)
    send(running, caller, [f"{key}.good"], countdown=5)
    assert settled(running)
    running.stack.revoke(serial(stolen))
    assert running.count(f"{key}.good") == 0
    assert running.happens(f"{key}.good")
    assert within(SOON, lambda: refused(running) == before + 1)
    assert running.count(f"{key}.bad") == 0


def test_a_revoked_workers_results_are_refused_until_it_has_a_new_key(running: Running) -> None:
    caller = running.caller("client")
    result = running.task("add", caller).delay(1, 2)
    assert result.get(timeout=SOON) == 3
    running.stack.revoke("worker")
    with pytest.raises(errors.RevokedSigner):
        within(SOON, lambda: caller.AsyncResult(result.id).get(timeout=SOON) != 3)
    with pytest.raises(errors.RevokedSigner):
        running.task("add", caller).delay(1, 2).get(timeout=SOON)  # told while it waits, and at once
    running.stack.rotate("worker")
    assert within(SOON, lambda: _tried(lambda: add(running.caller("client"), running)) == 3)


def _tried(what: Callable[[], int]) -> int | None:
    try:
        return what()
    except errors.RevokedSigner:
        return None


@pytest.mark.parametrize("damage", ["half", "gone", "foreign"])
def test_a_broken_list_revokes_no_less(running: Running, key: str, tmp_path: Path, damage: str) -> None:
    caller, (thief, stolen) = running.caller("client"), holder(running, "client", f"broken-{key}", tmp_path)
    file, before = running.stack.pki.store / "ca.crl", refused(running)
    running.stack.revoke(serial(stolen))
    probes = until_refused(running, thief, key)
    content, refusals = file.read_bytes(), said(running, "credentials.refused")
    try:
        if damage == "gone":
            file.unlink()
        elif damage == "half":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.write_bytes(running.stack.pki.authority("foreign").revocations.read_bytes())
        assert within(SOON, lambda: add(caller, running) == 3 and said(running, "credentials.refused") > refusals)
        names = [f"{key}.{number}" for number in range(10)]
        send(running, thief, names)
        assert within(SOON, lambda: refused(running) == before + ran(running, probes + names).count(0))
        assert ran(running, names) == [0] * len(names)
    finally:
        file.write_bytes(content)


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_a_worker_connects_with_the_certificate_that_is_there(running: Running) -> None:
    """Half of a new pair, then one of a foreign CA, then the right one: each is what the next connection shows."""
    caller, account = running.caller("client"), str(running.stack.topology.account("worker"))
    tls = running.stack.pki.tls.folder
    foreign = running.stack.pki.authority("foreign").client(account)
    assert add(caller, running) == 3

    def disconnect() -> None:
        running.broker.disconnect("worker")
        running.stack.redis("CLIENT", "KILL", "USER", account)

    def lost() -> int:
        log = running.worker.log.read_text(encoding="utf-8", errors="replace")
        return log.count("Cannot connect to") + log.count("Connection to broker lost")

    for wrong in (("key",), ("key", "certificate")):
        for part in wrong:
            name = f"{account}-key.pem" if part == "key" else f"{account}.pem"
            content = getattr(foreign, part).read_bytes()
            running.stack.account.write(tls / name, content)
        count = lost()
        disconnect()
        assert within(SOON, lambda count=count: lost() > count + 1)  # it cannot come back with these
    running.stack.rotate("worker")
    assert within(2 * SOON, lambda: add(caller, running) == 3)


# --- from the command line --------------------------------------------------------------------------------------------


def test_the_commands_issue_rotate_and_revoke(stack: Stack) -> None:
    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stack", *arguments, "--folder", str(stack.folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (1 if "no role" in done.stderr else 0), done.stderr
        return done.stdout + done.stderr

    values = settings_of(stack)
    upload = stack.folder / "uploads" / "sunset.png"
    Image.new("RGB", (64, 48), "orange").save(upload)
    upload.chmod(0o644)

    def works() -> bool:
        app = Celery("client", set_as_current=False)
        hardening.harden(app, Settings(**values))
        return bool(app.tasks[tasks.thumbnail.thumbnail.name].delay(upload.name).get(timeout=SOON))

    assert works()
    before = Pair(Path(values["security_certificate"]), Path(values["security_key"])).serial
    assert f"{before:x}" in command("rotate", "client")
    assert within(SOON, works)
    assert f"{before:x} is revoked" in command("revoke", f"{before:x}")
    assert works()
    assert "sign as client" in command("issue", "client")
    assert "there are" in command("issue", "nobody")
    command("revoke", "client")
    with pytest.raises(errors.ConfigurationRefused, match="has been revoked"):
        works()
    command("rotate", "client")
    assert within(SOON, works)


def test_the_workers_account_cannot_read_a_cas_key(running: Running) -> None:
    account = running.stack.account
    for authority in ("tls", "signing"):
        file = running.stack.pki.folder / authority / "ca-key.pem"
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_uid == os.geteuid()
        if account.switch:
            done = subprocess.run(["cat", file], capture_output=True, check=False, **account.popen_options())
            assert done.returncode != 0
