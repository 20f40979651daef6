"""The service's own tasks, through signing, gate and strict arguments: the pattern for yours."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import urllib3
from PIL import Image

from stack.pki import Pki

from .. import SELF
from ..project import errors, tasks
from ..service import Service

notify, report, thumbnail = tasks.notify, tasks.report, tasks.thumbnail


@dataclass
class Receiver:
    """An HTTPS server on an address of this machine; it answers with ``status`` and notes what arrived."""

    pki: Pki
    address: str = "127.0.0.1"
    port: int = 0
    status: list[int] = field(default_factory=lambda: [204])
    location: str = ""
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def __enter__(self) -> Receiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.seen.append((self.path, dict(self.headers), body))
                statuses = receiver.status
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                self.send_header("Location", receiver.location)
                self.send_header("Content-Length", str(1 << 40))
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        pair = self.pki.tls.server(f"hooks-{self.address}", ("127.0.0.1", "hooks.test"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        self.server = ThreadingHTTPServer((self.address, self.port), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with Receiver(Pki(tmp_path / "web", SELF)) as receiver:
        yield receiver


@pytest.fixture
def service(tmp_path: Path, receiver: Receiver) -> Service:
    """The service, with folders of its own and one listed receiver, which is on this machine."""
    for name in ("uploads", "output"):
        (tmp_path / name).mkdir()
    return Service(
        tmp_path,
        upload_folder=tmp_path / "uploads",
        output_folder=tmp_path / "output",
        webhook_hosts=f"127.0.0.1:{receiver.port},hooks.test:{receiver.port}",
        webhook_networks="127.0.0.1/32",
        webhook_ca=receiver.pki.tls.certificate,
    )


@pytest.fixture
def uploads(service: Service, tmp_path: Path) -> Path:
    return tmp_path / "uploads"


@pytest.fixture
def output(service: Service, tmp_path: Path) -> Path:
    return tmp_path / "output"


def run(service: Service, task: Any, *args: Any) -> Any:
    """Send a task, let the worker do it, and return the result of the worker's own backend."""
    result = service.client.app.tasks[task.name].apply_async(args, ignore_result=False)
    service.work()
    return result


# -- thumbnail --------------------------------------------------------------------------------------------------------


def png() -> bytes:
    Image.new("RGB", (640, 480), "teal").save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a small file that says it is a huge image, and that would be one if it were decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit for each pixel
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_thumbnail_returns_checksum_and_size_and_writes_a_small_image(
    service: Service, uploads: Path, output: Path
) -> None:
    content = png()
    (uploads / "sunset.png").write_bytes(content)
    result = service.send(thumbnail.thumbnail, "sunset.png")
    assert service.work() == 1
    name = f"{hashlib.sha256(content).hexdigest()}.png"
    assert result.get(timeout=1) == {"sha256": name.removesuffix(".png"), "bytes": len(content), "thumbnail": name}
    with Image.open(output / name) as small:
        assert small.size == (256, 192)


def test_thumbnail_of_the_same_content_is_made_once(service: Service, uploads: Path, output: Path) -> None:
    for name in ("one.png", "two.png"):
        (uploads / name).write_bytes(png())
    results = [run(service, thumbnail.thumbnail, "one.png").get(timeout=1)]
    [made] = output.iterdir()
    first = made.stat()
    results += [run(service, thumbnail.thumbnail, name).get(timeout=1) for name in ("one.png", "two.png")]
    assert results[0] == results[1] == results[2]
    [made] = output.iterdir()
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@pytest.mark.parametrize("key", ["../secret.png", "/etc/passwd", "a/b.png", "..", ".hidden", "", "a\nb", "a\0b", 5])
def test_thumbnail_takes_no_other_key_and_its_refusal_does_not_repeat_it(
    service: Service, uploads: Path, output: Path, key: Any
) -> None:
    (uploads.parent / "secret.png").write_bytes(png())
    result = run(service, thumbnail.thumbnail, key)
    with pytest.raises(errors.InvalidArguments, match="key: ") as caught:
        result.get(timeout=1)
    assert "secret" not in str(caught.value)
    assert not [*output.iterdir()]


def test_thumbnail_follows_no_link_and_reads_no_pipe(service: Service, uploads: Path, output: Path) -> None:
    (uploads.parent / "secret.png").write_bytes(png())
    (uploads / "link.png").symlink_to("../secret.png")
    os.mkfifo(uploads / "pipe.png")
    os.write(os.open(uploads / "pipe.png", os.O_RDWR), png())
    for key in ("link.png", "pipe.png"):
        assert run(service, thumbnail.thumbnail, key).failed()
    assert not [*output.iterdir()]


@pytest.mark.parametrize("side", [5_000, 40_000])
def test_thumbnail_decodes_no_bomb(
    service: Service, uploads: Path, output: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self.size))
    content = bomb(side, side)
    assert len(content) < 1_000_000
    (uploads / "bomb.png").write_bytes(content)
    result = run(service, thumbnail.thumbnail, "bomb.png")
    assert "pixels" in str(result.result)
    assert not decoded
    assert not [*output.iterdir()]


def test_thumbnail_reads_no_more_than_its_limit(
    service: Service, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnail, "MAX_BYTES", len(png()) - 1)
    (uploads / "large.png").write_bytes(png())
    assert "larger than" in str(run(service, thumbnail.thumbnail, "large.png").result)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM"])
def test_thumbnail_knows_two_formats(service: Service, uploads: Path, output: Path, kind: str) -> None:
    """Each decoder is code that reads a stranger's bytes."""
    Image.new("RGB", (10, 10)).save(uploads / "image.png", kind)
    assert run(service, thumbnail.thumbnail, "image.png").failed()
    assert not [*output.iterdir()]


# -- notify -----------------------------------------------------------------------------------------------------------


def hook(receiver: Receiver, host: str = "127.0.0.1", path: str = "/hook?token=swordfish") -> str:
    return f"https://{host}:{receiver.port}{path}"


def test_notify_posts_the_event_once_and_stores_nothing(service: Service, receiver: Receiver) -> None:
    result = service.send(notify.notify, hook(receiver), "stored", "sunset.png")
    assert service.work() == 1
    [(path, headers, body)] = receiver.seen
    assert path == "/hook?token=swordfish"
    assert headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert headers["Idempotency-Key"] == result.id
    assert json.loads(body) == {"id": result.id, "event": "stored", "subject": "sunset.png"}
    assert result.state == "PENDING"


def test_notify_tries_again_with_the_same_key_and_a_bound(service: Service, receiver: Receiver) -> None:
    receiver.status = [503, 500, 204]
    service.send(notify.notify, hook(receiver), "stored", "a")
    assert service.work() == 3
    assert len({headers["Idempotency-Key"] for _, headers, _ in receiver.seen}) == 1
    receiver.status = [503]
    service.send(notify.notify, hook(receiver), "stored", "b")
    assert service.work() == 1 + notify.notify.max_retries
    assert len(receiver.seen) == 3 + 1 + notify.notify.max_retries


def test_notify_tries_again_when_nobody_answers(service: Service, receiver: Receiver) -> None:
    receiver.__exit__()
    service.send(notify.notify, hook(receiver), "stored", "a")
    assert service.work() == 1 + notify.notify.max_retries


@pytest.mark.parametrize("status", [302, 307, 308, 400, 404, 429])
def test_notify_follows_no_redirect_and_tries_no_refusal_again(
    service: Service, receiver: Receiver, status: int
) -> None:
    with Receiver(receiver.pki) as private:
        receiver.status, receiver.location = [status], hook(private)
        result = run(service, notify.notify, hook(receiver), "stored", "a")
        assert len(receiver.seen) == 1
        assert f"answered {status}" in str(result.result)
        assert not private.seen
        if status in {307, 308}:  # which its HTTP client would follow, unless it is told not to
            with urllib3.PoolManager(ca_certs=str(receiver.pki.tls.certificate)) as stock:
                stock.request("POST", hook(receiver), body=b"x", preload_content=False)
            assert private.seen


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",  # the same host, another port
        "https://elsewhere.test:{port}/",
        "https://hooks.test.elsewhere.test:{port}/",
        "https://hooks.test:{port}@elsewhere.test/",
        "https://localhost:{port}/",
        "https://2130706433/",  # 127.0.0.1, port 443
    ],
)
def test_notify_reaches_no_host_that_is_not_listed(service: Service, receiver: Receiver, url: str) -> None:
    result = run(service, notify.notify, url.format(port=receiver.port), "stored", "a")
    assert "WEBHOOK_HOSTS" in str(result.result)
    assert not receiver.seen


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "file:///etc/passwd", "hooks.test", "https://", 5])
def test_notify_takes_only_https(service: Service, receiver: Receiver, url: Any) -> None:
    url = url.format(port=receiver.port) if isinstance(url, str) else url
    with pytest.raises(errors.InvalidArguments, match="url: "):
        run(service, notify.notify, url, "stored", "a").get(timeout=1)
    assert not receiver.seen


def named(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, ...]) -> None:
    """Let `hooks.test` have these addresses: those of the first answer, then those of the second, ..."""
    genuine, left = socket.getaddrinfo, [*answers]

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "hooks.test":
            return genuine(host, port, *args, **kwargs)
        found = left.pop(0) if len(left) > 1 else left[0]
        return [entry for address in found for entry in genuine(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


PRIVATE = "127.0.0.2 10.0.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fd00::1 fe80::1"
DISGUISED = "::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::"


@pytest.mark.parametrize("address", [*PRIVATE.split(), *DISGUISED.split()])
def test_notify_reaches_no_private_network(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Though its name is listed: who has the name may let it lead anywhere, also beside a good address."""
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: tried.append(to))
    for answer in ((address,), ("127.0.0.1", address)):
        named(monkeypatch, answer)
        result = run(service, notify.notify, hook(receiver, "hooks.test"), "stored", "a")
        assert "not public" in str(result.result)
    assert not tried


def test_notify_connects_to_the_address_it_has_checked(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, ("127.0.0.1",), ("127.0.0.2",))
    with Receiver(receiver.pki, "127.0.0.2", receiver.port) as private:
        service.send(notify.notify, hook(receiver, "hooks.test"), "stored", "a")
        assert service.work() == 1
        assert len(receiver.seen) == 1
        assert not private.seen


def test_notify_verifies_the_receivers_name_and_chain(
    service: Service, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: genuine("127.0.0.1", *a, **k))
    for host, ca in (("wrong.test", receiver.pki), ("hooks.test", Pki(tmp_path / "foreign", SELF))):
        strict = Service(
            tmp_path / host,
            webhook_hosts=f"{host}:{receiver.port}",
            webhook_networks="127.0.0.1/32",
            webhook_ca=ca.tls.certificate,
        )
        result = run(strict, notify.notify, hook(receiver, host), "stored", "a")
        assert "SSLError" in str(result.result)
    assert not receiver.seen


def test_notify_takes_no_proxy_from_the_environment(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    service.send(notify.notify, hook(receiver), "stored", "a")
    assert service.work() == 1
    assert len(receiver.seen) == 1


def test_notify_shows_nobody_the_address(service: Service, receiver: Receiver) -> None:
    receiver.status = [400]
    result = run(service, notify.notify, hook(receiver), "stored", "a")
    assert "answered 400" in f"{result.traceback}"
    assert "swordfish" not in f"{result.result} {result.traceback}"


def test_nobody_is_notified_until_a_host_is_listed(service: Service, tmp_path: Path, receiver: Receiver) -> None:
    quiet = Service(tmp_path / "quiet")
    assert "WEBHOOK_HOSTS" in str(run(quiet, notify.notify, hook(receiver), "stored", "a").result)
    assert not receiver.seen


# -- report -----------------------------------------------------------------------------------------------------------


def test_report_counts_a_days_uploads_once(service: Service, uploads: Path, output: Path) -> None:
    day = date(2026, 1, 2)
    for name, moment in (("a", datetime(2026, 1, 2, 1)), ("b", datetime(2026, 1, 2, 23)), ("c", datetime(2026, 1, 3))):
        (uploads / name).write_bytes(b"12345")
        seconds = moment.replace(tzinfo=UTC).timestamp()
        os.utime(uploads / name, (seconds, seconds))
    result = service.send(report.report, day)
    assert service.work() == 1
    [written] = output.iterdir()
    assert written.name == "report-2026-01-02.json"
    assert json.loads(written.read_text()) == {"day": "2026-01-02", "uploads": 2, "bytes": 10}
    first = written.stat()
    service.send(report.report, day)
    assert service.work() == 1
    assert (written.stat().st_ino, written.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert result.state == "PENDING"


def test_report_is_about_yesterday_when_beat_sends_it(service: Service, output: Path) -> None:
    before = datetime.now(UTC).date()
    [entry] = [entry for entry in tasks.app.conf.beat_schedule.values() if entry["task"] == report.report.name]
    service.party("beat").app.send_task(entry["task"], entry.get("args"), **entry["options"])
    assert service.work() == 1
    days = {before - timedelta(days=1), datetime.now(UTC).date() - timedelta(days=1)}  # midnight may have passed
    assert [written.name for written in output.iterdir()] in [[f"report-{day}.json"] for day in days]


def test_report_is_tried_again_and_not_for_ever(service: Service, output: Path) -> None:
    output.rmdir()
    service.send(report.report, date(2026, 1, 2))
    assert service.work() == 1 + report.report.max_retries
