"""Stock Flower, live: what it shows and lets do to everybody. Each of these attacks succeeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from celery.events.event import get_exchange

from attacks import suite
from attacks.against_stock import Stock
from attacks.control import tell
from attacks.target import OBSERVER
from stack.process import wait_until
from stack.record import free_ports

from ...service import ROOT
from .pages import Site, received
from .running import SOON


@pytest.fixture(scope="module")
def stock(temporary: Path) -> Iterator[Stock]:
    with suite.servers(temporary / "stock") as stack:
        yield Stock(stack, stack.pki.tls.client(OBSERVER))


@contextmanager
def stock_flower(stock: Stock, *options: str, **environment: str) -> Iterator[tuple[Site, int]]:
    """Run Flower as its own guide does."""
    [port] = free_ports(1)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "celery",
            "-A",
            stock.module,
            "flower",
            "--address=127.0.0.1",
            f"--port={port}",
            *options,
        ],
        cwd=ROOT,
        env={"PATH": os.defpath, "PYTHONPATH": "src", **stock.environment("monitor"), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    site = Site(port)

    def serves() -> bool:
        try:
            return site.ask("/healthcheck")[0] == 200
        except OSError:
            return False

    try:
        wait_until(serves, "stock Flower", SOON)
        yield site, process.pid
    finally:
        process.terminate()
        process.wait(SOON)


def test_stock_flower_shows_forged_tasks_and_sends_real_ones_for_everybody(stock: Stock) -> None:
    with stock_flower(stock, FLOWER_UNAUTHENTICATED_API="true") as (site, _):
        forged = str(uuid4())

        def shown() -> bool:
            with stock.attacker.connection() as connection:
                tell(connection, get_exchange(connection), received(forged, "worker@nowhere"), "task.received")
            return forged in site.tasks()

        wait_until(shown, "the forged task", SOON)
        status, headers, text = site.ask("/api/task/send-task/attacks.pay", method="POST")
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, "*")
        assert json.loads(text)["task-id"]
        _, headers, _ = site.ask("/")
        assert not {"Content-Security-Policy", "X-Frame-Options", "Strict-Transport-Security"} & headers.keys()


def test_stock_flower_with_a_password_lets_guess_it_and_tells_it_to_everyone_on_the_host(stock: Stock) -> None:
    with stock_flower(stock, "--basic-auth=any:secret") as (site, pid):
        assert [site.ask("/", f"guess{number}")[0] for number in range(20)] == [401] * 20
        assert site.ask("/", "secret")[0] == 200
        assert site.ask("/metrics")[0] == site.ask("/static/js/flower.js")[0] == 200
        assert b"any:secret" in Path(f"/proc/{pid}/cmdline").read_bytes()
