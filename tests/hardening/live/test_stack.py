"""The stack itself: what it leaves behind (nothing), who it runs as, and what its servers let in.

The servers run the files of ``deploy/``: what holds here of listeners, certificates and rights holds in production.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import redis

from stack import Stack, StackFailed
from stack.account import Account
from stack.process import Process, start, undisturbed, wait_until
from stack.record import free_ports

from ...project import topology
from ...service import ROOT
from .test_backend_accounts import backend

#: Where each server listens, what it answers first, and what is said when its port is taken.
PORTS: dict[str, list[str]] = {
    "rabbitmq": [
        "rabbitmq does not listen on port {}; see ",
        r"redis ended; the last lines of \S+:\n.*Failed listening on port {}",
        r"rabbitmq ended; the last lines of \S+:\n",
        r"rabbitmq ended; the last lines of \S+:\n",
    ],
    "redis": [
        r"redis-broker ended; the last lines of \S+:\n.*Failed listening on port {}",
        r"redis ended; the last lines of \S+:\n.*Failed listening on port {}",
    ],
}
GREETINGS = {
    "rabbitmq": [("rabbitmq", b"AMQP\x00\x00\x09\x01"), ("redis", b"PING\r\n")],
    "redis": [("redis-broker", b"PING\r\n"), ("redis", b"PING\r\n")],
}
BROKER = topology.Topology.load(ROOT / "topology.toml").broker


def family(stack: Stack) -> frozenset[tuple[int, int]]:
    return frozenset().union(*(process.family() for process, _ in stack.status()))


def running(family: Iterable[tuple[int, int]]) -> list[int]:
    """Those that still are what they were; a zombie that nobody has waited for is no more."""
    left = []
    for pid, started in family:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[19]) == started and fields[0] not in "ZX":
            left.append(pid)
    return left


def listening(pids: set[int], protocols: tuple[str, ...] = ("tcp", "udp")) -> set[tuple[str, int]]:
    """Addresses, in the kernel's hexadecimal, and ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                inodes.add(match[1])
    found = set()
    for table in (f"{protocol}{version}" for protocol in protocols for version in ("", "6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] in {"0A", "07"}:  # TCP listens, UDP has no peer
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_down_leaves_no_process_no_port_and_no_key(temporary: Path) -> None:
    stack = Stack(ROOT, temporary / "short-lived")
    stack.up(worker=False)
    started = family(stack)
    ports = {port for _, port in listening({pid for pid, _ in started}, ("tcp",))}
    assert len(ports) == len(PORTS[BROKER])
    stack.down()
    assert running(started) == []
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
    assert {entry.name for entry in stack.folder.iterdir()} == {"logs", "lock", ".gitignore"}
    stack.down()  # and once more, which is harmless


def test_up_twice_is_harmless(servers: Stack) -> None:
    before = servers.status()
    servers.up(worker=False)
    Stack(ROOT, servers.folder).up(worker=False)  # as another command would
    assert servers.status() == before
    assert all(process.alive() for process, _ in before)


def test_up_starts_a_worker_that_has_died_again(stack: Stack) -> None:
    [worker] = [process for process, _ in stack.status() if process.name == "worker"]
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not worker.alive(), "the worker to die", 10)
    others = [process for process, _ in stack.status() if process != worker]
    stack.up()
    processes = [process for process, _ in stack.status()]
    assert all(process.alive() for process in processes)
    assert set(others) < set(processes)
    assert [process.name for process in processes].count("worker") == 1
    assert not worker.family()


def test_two_stacks_at_once_do_not_meet(servers: Stack, temporary: Path) -> None:
    other = Stack(ROOT, temporary / "other")
    other.up(worker=False)
    try:
        assert not {port for _, port in other.status()} & {port for _, port in servers.status()}
        own = other.environment("client")
        files = {"ssl_certfile": own["SECURE_CELERY_TLS_CERTIFICATE"], "ssl_keyfile": own["SECURE_CELERY_TLS_KEY"]}
        with pytest.raises(redis.ConnectionError), backend(servers, "client", **files) as client:
            client.ping()
    finally:
        other.down()
    assert all(process.alive() for process, _ in servers.status())
    assert backend(servers, "client").ping()


@pytest.mark.parametrize(("index", "why"), [*enumerate(PORTS[BROKER])])
def test_a_port_that_is_taken_is_told_and_nothing_is_left(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, index: int, why: str
) -> None:
    stack = Stack(ROOT, temporary / f"without-{index}")
    seen: set[tuple[int, int]] = set()
    remember = stack._record.add
    monkeypatch.setattr(stack._record, "add", lambda process: (remember(process), seen.update(process.family()))[0])
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        taken = squatter.getsockname()[1]
        ports = free_ports(len(PORTS[BROKER]))  # Flower's is the last; it is not started here
        monkeypatch.setattr("stack.stack.free_ports", lambda count: [*ports[:index], taken, *ports[index:]][:count])
        with pytest.raises(StackFailed, match="(?s)" + why.format(taken)):
            stack.up(worker=False)
    assert seen
    assert running(seen) == []
    assert not list(stack.folder.glob("*.env"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing_that_down_does_not_end(temporary: Path, number: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background may ignore it
    folder = temporary / f"interrupted-{number}"
    command = [sys.executable, "-m", "stack", "up", "--folder", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as up:
        stack = Stack(ROOT, folder)
        wait_until(lambda: "redis" in {process.name for process, _ in stack.status()}, "the last server", 30)
        started = family(stack)
        up.send_signal(number)
        _, said = up.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert running(started)
        done = subprocess.run([*command[:3], "down", "--folder", str(folder)], cwd=ROOT, check=False)
        assert done.returncode == 0
    else:
        assert up.returncode == 128 + number, said.decode()
    assert running(started) == []


def test_a_signal_waits_until_what_was_started_is_written_down() -> None:
    steps = []
    before = signal.signal(signal.SIGTERM, lambda *_: steps.append("ended"))
    try:
        with undisturbed():
            steps.append("started")
            signal.raise_signal(signal.SIGTERM)
            steps.append("written down")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps == ["started", "written down", "ended"]


def test_a_signal_that_a_finalizer_swallows_comes_again(tmp_path: Path) -> None:
    """Python prints what is raised in there, and goes on."""
    program = """
        import signal, sys, time
        from stack import Stack, __main__ as command
        class Client:
            def __del__(self): signal.raise_signal(signal.SIGTERM)
        def up(stack, calls):
            Client()
            time.sleep(30)
        Stack.up = up
        sys.argv[1:] = ["up", "--folder", sys.argv[1]]
        command.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "finalizer")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"")


def test_a_process_that_got_the_number_of_ours_is_left_alone(tmp_path: Path) -> None:
    account = Account("tests", os.geteuid(), os.getegid(), switch=False)
    sleeper = start("sleeper", ["sleep", "60"], env={}, cwd=Path("/"), log=tmp_path / "log", account=account)
    Process("ours", sleeper.pid, sleeper.started - 1, sleeper.boot, sleeper.log).stop()
    Process("ours", sleeper.pid, sleeper.started, "another-boot", sleeper.log).stop()
    assert sleeper.alive()
    sleeper.stop()
    assert not sleeper.alive()


def test_what_will_not_end_is_ended_with_its_descendants(tmp_path: Path) -> None:
    account = Account("tests", os.geteuid(), os.getegid(), switch=False)
    # Both ignore SIGTERM; the child is in a session of its own, as Erlang's helpers are.
    script = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork() or os.setsid(); time.sleep(60)"
    command = [sys.executable, "-c", script]
    stubborn = start("stubborn", command, env={}, cwd=Path("/"), log=tmp_path / "log", account=account)
    wait_until(lambda: len(stubborn.family()) == 2, "the child", 10)
    started = stubborn.family()
    stubborn.stop()
    assert running(started) == []


def test_a_path_with_a_space_is_refused(temporary: Path) -> None:
    with pytest.raises(StackFailed, match="white space"):
        Stack(ROOT, temporary / "my stack")


def test_a_folder_with_something_else_in_it_is_refused(temporary: Path) -> None:
    folder = temporary / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(StackFailed, match="not a stack's"):
        Stack(ROOT, folder).up()
    assert (folder / "thesis.txt").read_text() == "years of work"


# -- files and users --------------------------------------------------------------------------------------------------


def test_servers_do_not_run_as_root(servers: Stack) -> None:
    for pid, _ in family(servers):
        uids = re.search(r"^Uid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert uids is not None
        assert "0" not in uids[1].split()


def test_files_are_closed_to_others(servers: Stack) -> None:
    secret = re.compile(r"-key\.pem$|\.password$|\.env$|users\.acl$|cookie$|stack\.json$|definitions\.json$")
    found = 0
    for path in servers.folder.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert not mode & 0o022, path
        if path.is_file() and secret.search(path.name):
            found += 1
            assert not mode & 0o077, path
    assert found > 20
    for authority in ("tls", "signing"):
        assert (servers.folder / "pki" / authority / "ca-key.pem").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("role", ["client", "worker", "beat", "monitor", "operator"])
def test_environment_files_are_read_alike_by_shell_docker_and_systemd(servers: Stack, role: str) -> None:
    file = servers.folder / f"{role}.env"
    for line in file.read_text().splitlines():
        assert re.fullmatch(r"SECURE_CELERY_[A-Z_]+=[A-Za-z0-9@:/._-]+", line)  # nothing that any of them would expand
    shell = subprocess.run(
        ["sh", "-c", 'set -a; . "$1"; env', "sh", file], env={}, capture_output=True, text=True, check=True
    )
    values = dict(line.split("=", 1) for line in shell.stdout.splitlines() if line.startswith("SECURE_CELERY_"))
    assert values == servers.environment(role)


def test_environment_files_hold_no_secret(servers: Stack) -> None:
    passwords = [file.read_text() for file in servers.folder.glob("redis*/*.password")]
    assert len(set(passwords)) == len(passwords) >= 6
    for file in servers.folder.glob("*.env"):
        assert not any(password in file.read_text() for password in passwords)


# -- what the servers listen to ---------------------------------------------------------------------------------------


def test_everything_listens_on_loopback_only(servers: Stack) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, ::1
    found = listening({pid for pid, _ in family(servers)})
    assert {port for _, port in found} >= {port for _, port in servers.status()}
    assert {address for address, _ in found} <= loopback


def test_the_backends_configuration_is_in_force(servers: Stack) -> None:
    expected = {
        "port": "0",
        "tls-auth-clients": "yes",
        "tls-protocols": "TLSv1.2 TLSv1.3",
        "maxmemory": str(256 * 1024 * 1024),
        "maxmemory-policy": "noeviction",
        "maxclients": "1024",
        "enable-debug-command": "no",
        "enable-module-command": "no",
        "enable-protected-configs": "no",
        "save": "",
        "bind": "127.0.0.1",
    }
    for name, value in expected.items():
        assert servers.redis("CONFIG", "GET", name) == f"{name}\n{value}"
    default = servers.redis("ACL", "GETUSER", "default").splitlines()
    assert "off" in default
    assert "-@all" in default


def handshake(port: int, context: ssl.SSLContext, first: bytes) -> bytes:
    """Connect, speak first, and return what comes back: nothing if the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as tls:
        tls.sendall(first)  # TLS 1.3 clients learn of a refusal only when they read
        return tls.recv(64)


@pytest.mark.parametrize(("name", "first"), GREETINGS[BROKER])
def test_no_certificate_a_foreign_one_and_old_tls_are_refused(servers: Stack, name: str, first: bytes) -> None:
    port = {process.name: port for process, port in servers.status()}[name]
    assert port

    def context(pair: Any = None, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # this is about whom the server lets in
        context.minimum_version = min(newest, ssl.TLSVersion.TLSv1_2)
        context.maximum_version = newest
        context.set_ciphers("ALL:@SECLEVEL=0")
        if pair:
            context.load_cert_chain(pair.certificate, pair.key)
        return context

    foreign = servers.pki.authority(f"foreign-{name}").client(servers.topology.account("client"))
    own = servers.pki.tls.client(f"test-{name}")
    assert handshake(port, context(own), first)
    assert handshake(port, context(own, ssl.TLSVersion.TLSv1_2), first)
    for refused in (context(), context(foreign), context(own, ssl.TLSVersion.TLSv1_1)):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(port, refused, first)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(first)
        try:
            answer = plain.recv(64)
        except ConnectionResetError:
            answer = b""
    assert not answer or answer[0] == 21  # nothing, or a TLS alert
