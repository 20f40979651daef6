"""The same two tasks under each profile: ``PROFILE`` is ``json``, ``auth``, ``signed`` or ``guarded``.

All have the same TLS, client certificate, exchange, quorum queue, confirmed publishing, prefetch, limits and late
acknowledgement. What differs is what is compared: unsigned JSON, Celery's own signing, and the hardening layer without
and with its replay guard.
"""

from __future__ import annotations

import logging
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from celery import Celery
from celery.worker.consumer.consumer import Consumer
from kombu import Exchange

from . import parts

package = os.environ["BENCH_PACKAGE"]
hardening = import_module(f"{package}.hardening")
intake = import_module(f"{package}.hardening.intake")
PROFILE = os.environ["PROFILE"]
if "BENCH_PARTS" in os.environ:
    parts.watch(package, Path(os.environ["BENCH_PARTS"]))
for name in ("celery.app.trace", "celery.worker.strategy"):  # two lines for each task
    logging.getLogger(name).setLevel(logging.WARNING)


class StockConsumer(Consumer):
    """Celery's consumer, without the step that declares what the operator has declared."""

    class Blueprint(Consumer.Blueprint):
        """The same steps as the hardened worker has."""

        default_steps = tuple(
            step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")
        )


class NoGuard:
    """A replay store that lets everything run."""

    def claim(self, name: str, worker: str, seconds: int) -> str:
        """Let it run."""
        return "ours"

    def done(self, name: str, seconds: int) -> None:
        """Forget it."""

    def release(self, name: str, worker: str) -> None:
        """Forget it."""

    def renew(self, worker: str, seconds: int) -> bool:
        """Be alive."""
        return True


def stock(app: Celery, settings: Any) -> None:
    """Set Celery up with the means that it has itself; TLS is verified as well as it can."""
    own, rules = settings.credentials.signer.identity.account, settings.read_topology()
    exchange = Exchange(rules.exchange, type="topic", no_declare=True)
    app.conf.update(
        broker_url=settings.broker_url,
        broker_login_method="EXTERNAL",
        broker_user=rules.account(own),
        broker_use_ssl={**settings.broker_tls.amqp(), "server_hostname": "127.0.0.1"},
        broker_transport_options={"confirm_publish": True},
        result_backend=settings.result_backend_address,
        redis_backend_use_ssl=settings.result_backend_tls.redis(),
        result_backend_transport_options={"global_keyprefix": f"{rules.application}:"},
        result_expires=3600,
        worker_consumer=StockConsumer,
        worker_enable_remote_control=False,
        worker_detect_quorum_queues=True,
        **intake.queues(rules, exchange, {"x-queue-type": "quorum"}),
    )
    if PROFILE == "auth":
        folder = Path(os.environ["BENCH_AUTH"])
        app.conf.update(
            security_key=str(folder / "key.pem"),
            security_certificate=str(folder / "certificate.pem"),
            security_cert_store=str(folder / "store" / "*.pem"),
            task_serializer="auth",
            result_serializer="auth",
            event_serializer="auth",
            accept_content=["auth"],
        )
        app.setup_security()


app = Celery("benchmarks", set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=10,
    # Ours has these by default, and they would be measured: a new process after each thousand tasks, and timers.
    worker_max_tasks_per_child=1_000_000,
    worker_max_memory_per_child=512 * 1024,
    task_time_limit=300,
    task_soft_time_limit=270,
    task_default_queue=f"bench.{PROFILE}",
    task_default_routing_key=f"bench.{PROFILE}",
)
if PROFILE in {"json", "auth"}:
    stock(app, hardening.Settings())
else:
    hardening.harden(app, hardening.Settings())
    if PROFILE == "signed":
        app.hardening.__dict__["replay_store"] = NoGuard()


@app.task(name="benchmarks.nothing", shared=False)
def nothing(number: int, text: str) -> None:  # allow limits: they would be measured too
    """Do nothing."""


@app.task(name="benchmarks.echo", shared=False, ignore_result=False)
def echo(number: int) -> int:  # allow limits: they would be measured too
    """Return what came."""
    return number


@app.task(name="benchmarks.mark", shared=False)
def mark(file: str) -> None:  # allow limits: they would be measured too
    """Write down what the worker has used until now: seconds of wall clock and of CPU, and this child's PSS in KiB."""
    parent = os.getppid()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ticks = 0
    for process in (parent, *children):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime (proc_pid_stat(5))
    pss = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    values = (time.time(), ticks / os.sysconf("SC_CLK_TCK"), float(pss.split()[1]))
    Path(file).write_text(" ".join(map(str, values)))
