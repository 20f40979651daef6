"""The door: ``harden(app, settings)`` makes an existing Celery application safe, after it was constructed.

Guards against: half-hardened applications. Everything is set here and checked again before a worker starts, so that a
later change of the configuration, or a later ``setup_security()``, is found.
Rests on: Celery's extension points (``amqp_cls``, ``worker_consumer``, the loader's backends); the application keeps
its own Task class (Django's, for example) and its ``shared_task`` tasks.
Controls: SER-1, SIG-1, SIG-2, TLS-1, BRK-1, VAL-1, RES-2, WRK-5.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlsplit

from celery import Celery
from celery.app.defaults import NAMESPACES
from celery.utils.imports import symbol_by_name
from kombu.serialization import registry

from . import audit
from .beat import HardenedBeat, JsonScheduler
from .consumer import HardenedConsumer, Preflight
from .control import SignedControl, SignedEvents
from .envelope import Signer, Type, Verified, Verifier
from .errors import ConfigurationRefused
from .identity import Role
from .intake import RabbitMQ
from .intake_redis import Redis
from .policy import Policy, Rules
from .producer import SigningAMQP, delayed_by_seconds
from .replay import ReplayStore
from .results import BACKENDS, SignedResults
from .settings import PREFIX, Settings
from .strict import make_strict
from .tls import check_options
from .topology import Topology

#: Built-in tasks that stand for others. Their callers wait for results, and have no task of their own to say so on.
_STAND_INS = ("celery.map", "celery.starmap", "celery.chunks", "celery.accumulate")
#: Where Celery looks for addresses before it looks into its configuration.
_ENVIRONMENT = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")
_STOCK_AUTH = "application/data"  # content type of Celery's own signing serializer


@dataclass(frozen=True)
class Hardening:
    """What the parts share; ``app.hardening`` holds it."""

    settings: Settings
    strict_arguments: bool = True

    @property
    def signer(self) -> Signer:
        """This process's signing key, as its file says now."""
        return self.settings.credentials.signer

    @property
    def verifier(self) -> Verifier:
        """Verifies the envelopes of others, as trust and revocations are now."""
        return self.settings.credentials.verifier

    def verify(self, kind: Type, token: bytes | str) -> Verified:
        """Verify an envelope of others; raises as ``Credentials.verify``."""
        return self.settings.credentials.verify(kind, token)

    @cached_property
    def rules(self) -> Rules:
        """What topology.toml says."""
        return Rules(self.settings)

    @property
    def topology(self) -> Topology:
        """Queues, pools and callers, as they were at the start."""
        return self.rules.topology

    @property
    def policy(self) -> Policy:
        """Who may send what, as topology.toml says now."""
        return self.rules.policy

    @cached_property
    def audience(self) -> str:
        """The application that messages go to: our own, or the one that this process calls as another service."""
        return self.topology.audience(self.signer.identity)

    @cached_property
    def works(self) -> bool:
        """Whether this process is one of that application's workers."""
        return self.signer.identity.works_for(self.audience)

    @cached_property
    def queues(self) -> frozenset[str]:
        """Names, on the broker, of all queues that tasks may be sent to."""
        return frozenset(queue.broker_name for queue in self.topology.queues)

    @cached_property
    def consumed(self) -> frozenset[str]:
        """Names, on the broker, of the queues this process's worker pool serves."""
        pool = self.topology.pools.get(self.signer.identity.account) if self.works else None
        return frozenset(self.topology.queue(name).broker_name for name in (pool.queues if pool else ()))

    @cached_property
    def replay_store(self) -> ReplayStore:
        """Where it is noted which messages have run."""
        return self.settings.open_replay_store(self.topology.replays)

    def load(self) -> None:
        """Read every file now, so that a wrong one stops the start and not the first message.

        Raises:
            ConfigurationRefused: one of them is missing, insecure or malformed.
        """
        _ = self.signer, self.verifier, self.topology, self.policy, self.works and self.replay_store
        _ = self.settings.broker_tls, self.settings.result_backend_tls

    def tell_weakenings(self) -> None:
        """Log each setting that is weaker than its default."""
        for weakening in self.settings.weakenings:
            audit.record(audit.Event.WEAKENED, signer=self.signer.identity, setting=weakening)

    @cached_property
    def broker(self) -> RabbitMQ | Redis:
        """How messages travel.

        Raises:
            ConfigurationRefused: the broker's URL is of another kind than the topology says.
        """
        scheme, chosen = urlsplit(self.settings.broker_url).scheme, self.topology.broker
        if {"amqps": "rabbitmq", "rediss": "redis"}.get(scheme, chosen) != chosen:
            reason = f"is {scheme}://, and topology.toml says that the broker is {chosen}"
            raise ConfigurationRefused(PREFIX + "BROKER_URL", reason, "correct one of the two", "config.topology")
        return (Redis if chosen == "redis" else RabbitMQ)(self.settings, self.topology, self.signer.identity)

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold; nothing may set them differently."""
        topology, worker = self.topology, self.works
        return {
            **self.broker.configuration(),
            "result_backend": self.settings.result_backend_address,
            "redis_backend_use_ssl": self.settings.result_backend_tls.redis(),
            "result_backend_transport_options": {
                "global_keyprefix": f"{topology.application}:",
                # While the backend is away, a result waits in its worker; who reads it hears within seconds.
                "retry_policy": {"max_retries": 20 if worker else 3},
            },
            "result_backend_always_retry": worker,
            # JSON everywhere; what is inside an envelope does not choose its format.
            **dict.fromkeys(("task_serializer", "result_serializer", "event_serializer"), "json"),
            "accept_content": ["json"],
            "result_accept_content": ["json"],
            "task_compression": None,
            "result_compression": None,
            "result_extended": False,  # would store arguments beside the result
            "task_protocol": 2,
            "task_always_eager": False,
            "task_send_sent_event": False,  # only workers report
            "control_exchange": topology.celery("control"),
            "event_exchange": topology.celery("events"),
            "worker_consumer": HardenedConsumer,
            "beat_scheduler": JsonScheduler,
            "security_key": str(self.settings.security_key),
            "security_certificate": str(self.settings.security_certificate),
            "security_cert_store": str(self.settings.security_cert_store),
        }

    def defaults(self) -> dict[str, Any]:
        """Return safe defaults that an application may change."""
        queue = self.topology.queues[0].broker_name
        return {
            "task_default_queue": queue,
            "task_default_routing_key": queue,
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
            "task_ignore_result": True,
            "task_time_limit": 300,
            "task_soft_time_limit": 270,
            "worker_prefetch_multiplier": 1,
            "worker_max_tasks_per_child": 1000,
            "worker_max_memory_per_child": 512 * 1024,  # KiB
            "worker_eta_task_limit": 2_000,  # messages that wait in a worker for their time
            "worker_cancel_long_running_tasks_on_connection_loss": True,
            "worker_proc_alive_timeout": 30.0,
            "broker_connection_retry_on_startup": True,
            "beat_schedule_filename": "celerybeat-schedule.json",
            "beat_max_loop_interval": 30,  # seconds between two signs of life
            "result_expires": 3600,
            "result_backend_max_retries": 12,  # 20 to 40 seconds
        }

    def check(self, app: Celery) -> None:
        """Check, before a worker starts, that what ``harden`` set still holds and every task can be validated.

        Raises:
            ConfigurationRefused: something undid it; the sentence names what.
        """
        self.check_configuration(app)
        app.finalize()
        if self.strict_arguments:
            _make_all_strict(app)

    def check_configuration(self, app: Celery) -> None:
        """Check, before a worker starts and before the first message is sent, that the configuration still holds.

        Raises:
            ConfigurationRefused: something changed it; the sentence names what.
        """
        for name, value in self.configuration().items():
            if getattr(app.conf, name) != value:  # an attribute, since some are read from Celery's own environment
                raise ConfigurationRefused(name, "was changed after harden()", "remove the change", "config.changed")
        if _STOCK_AUTH in registry._decoders:
            _refuse_stock_signing()
        if not isinstance(app.backend, SignedResults):
            raise ConfigurationRefused("result_backend", "is not signed", "use rediss://", "config.changed")


def harden(app: Celery, settings: Settings, *, strict_arguments: bool = True) -> None:
    """Harden ``app``. Call it once, after the application has read its own configuration.

    Args:
        app: any Celery application; it may have tasks already.
        settings: where broker, keys and topology are.
        strict_arguments: validate arguments against annotations and refuse tasks without any (VAL-1).

    Raises:
        ConfigurationRefused: a setting is insecure or missing; one sentence with setting, reason, fix, code.
    """
    if getattr(app, "hardening", None) is not None:
        raise ConfigurationRefused("harden", "was called twice on one application", "call it once")
    if app.conf.security_digest != "sha256":
        raise ConfigurationRefused("security_digest", "the algorithm follows from the key", "remove the setting")
    if app.conf.beat_scheduler != NAMESPACES["beat"]["scheduler"].default:
        reason = "another one's schedule would be forgotten"
        raise ConfigurationRefused("beat_scheduler", reason, "put it into `beat_schedule`")
    for name in filter(os.environ.get, _ENVIRONMENT):
        raise ConfigurationRefused(name, "is set, and Celery would use it instead", "unset it, or drop `-b`")
    hardening = Hardening(settings, strict_arguments)
    hardening.load()
    configuration = hardening.configuration()
    for name in ("broker_use_ssl", "redis_backend_use_ssl"):
        check_options(name, app.conf[name], configuration[name])
    # From here on nothing is refused: an application is hardened as a whole or left as it was.
    app.hardening = hardening
    app.loader.override_backends = {**app.loader.override_backends, **BACKENDS}
    for name, mixin in (("amqp", SigningAMQP), ("control", SignedControl), ("events", SignedEvents)):
        theirs = symbol_by_name(getattr(app, f"{name}_cls"))
        setattr(app, f"{name}_cls", type(mixin.__name__, (mixin, theirs), {}))
        app.__dict__.pop(name, None)  # made before, with Celery's own class
    app._pool = app._backend_cache = None
    app._local = threading.local()  # holds each thread's result backend
    app.conf.update(configuration)
    # Below what the application has set itself; add_defaults() would put them above.
    defaults = hardening.defaults()
    if app.conf.task_time_limit or app.conf.task_soft_time_limit:
        defaults.pop("task_time_limit")  # one of ours beside one of theirs could be a pair that Celery refuses
        defaults.pop("task_soft_time_limit")
    app.conf.defaults.insert(-1, defaults)
    app.conf.maps.insert(-1, defaults)
    if app.set_as_current:
        # In every thread but this one shared tasks would belong to Celery's default application, which signs nothing.
        app.set_default()
    app.steps["worker"].add(Preflight)  # tells a worker's weakenings, once its log is open
    if hardening.signer.identity.role is not Role.WORKER:
        hardening.tell_weakenings()
    app.Beat = app.subclass_with_self(HardenedBeat)
    if hardening.topology.broker == "rabbitmq":
        app.send_task = delayed_by_seconds(app)
    app.setup_security = _refuse_stock_signing
    app.on_after_finalize.connect(_keep_results, weak=False)
    if strict_arguments:
        app.on_after_finalize.connect(_make_all_strict, weak=False)


def _keep_results(sender: Celery, **_: Any) -> None:
    for name in _STAND_INS:
        sender.tasks[name].ignore_result = False


def _make_all_strict(sender: Celery, **_: Any) -> None:
    for task in sender.tasks.values():
        make_strict(task)


def _refuse_stock_signing(*_: Any, **__: Any) -> NoReturn:
    reason = "Celery's own signing would put its decoder back, which runs pickle from any trusted signer"
    raise ConfigurationRefused("setup_security", reason, "remove the call; harden() signs", "config.stock-signing")
