"""An advisory service on loopback, which speaks as much of the OSV protocol as pip-audit asks for."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Service:
    """What is known about each name and version, what was asked, and whether it answers at all."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.asked: set[tuple[str, str]] = set()
        self.status = 200
        self.url = ""

    def plant(self, name: str, version: str, **fields: Any) -> None:  # noqa: ANN401
        """Publish an advisory about one version."""
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}]
        affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}]
        advisory = {"id": "GHSA-plan-ted1-0000", "summary": f"{name} is unsafe", "affected": affected}
        self.known[name, version] = {**advisory, "schema_version": "1.7.0", **fields}

    @property
    def environment(self) -> dict[str, str]:
        """What tells pip-audit to ask here."""
        return {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": self.url}


@contextmanager
def serve() -> Iterator[Service]:
    """Answer on a free port until the block ends."""
    service = Service()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pin = (query["package"]["name"], query["version"])
            service.asked.add(pin)
            body = json.dumps({"vulns": [service.known[pin]]} if pin in service.known else {}).encode()
            self.send_response(service.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        service.url = f"http://127.0.0.1:{server.server_port}/v1/query"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def advisories() -> Iterator[Service]:
    """Run an advisory service that knows nothing yet."""
    with serve() as service:
        yield service
