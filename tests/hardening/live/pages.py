"""Flower as a browser sees it: what the tests of ours and of stock Flower share."""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import time
from pathlib import Path
from typing import Any

from .running import SOON


def address(pattern: str) -> str:
    """Return an address that a route of Flower answers."""
    if pattern.startswith("/static"):
        return "/static/js/flower.js"
    query = "?draw=1&start=0&length=9&order%5B0%5D%5Bcolumn%5D=0" if pattern.endswith("datatable") else ""
    return re.sub(r"\(.*\)|\.\*$", "nothing", pattern).replace("/?", "") + query


class Site:
    """A Flower as a browser sees it."""

    def __init__(self, port: int, ca: Path | None = None, password: str = "") -> None:
        self.port = port
        self.ca = ca
        self.password = password

    def ask(
        self, path: str, password: str | None = None, method: str = "GET", source: str = "127.0.0.1", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Ask for a page; return status, headers and text."""
        if password is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(f'any:{password}'.encode()).decode()}"
        options: dict[str, Any] = {"timeout": SOON, "source_address": (source, 0)}
        if self.ca:
            context = ssl.create_default_context(cafile=self.ca)
            connection: Any = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, **options)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, **options)
        try:
            connection.request(method, path, headers=headers, body="" if method == "POST" else None)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode(errors="replace")
        finally:
            connection.close()

    def tasks(self) -> dict[str, str]:
        """The tasks that are shown: names by id."""
        status, _, text = self.ask(address("/tasks/datatable").replace("length=9", "length=999"), self.password)
        assert status == 200
        return {task["uuid"]: task["name"] for task in json.loads(text)["data"]}


def received(task_id: str, hostname: str, name: str = "attacks.wipe") -> dict[str, Any]:
    """An event as workers send it."""
    return {
        **{"type": "task-received", "uuid": task_id, "name": name, "hostname": hostname, "pid": 1, "retries": 0},
        **{"timestamp": time.time(), "utcoffset": 0, "clock": 1, "args": "[]", "kwargs": "{}"},
    }
