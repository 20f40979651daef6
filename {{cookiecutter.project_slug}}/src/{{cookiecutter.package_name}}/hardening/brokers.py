"""How messages travel: what Celery has to be told for RabbitMQ and for Redis.

Guards against: an account that could declare, and publishing to the default exchange of RabbitMQ, which reaches
every queue; on Redis, a message that is lost with its worker, or kept from the next one for an hour.
Rests on: queues that the operator has declared (topology.toml). Redis has no exchanges: there the queue's name is the
route; its ACL decides who may push to which.
Controls: BRK-1, BRK-2, BRK-6, TLS-1.
"""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlsplit

from kombu import Exchange, Queue

from .errors import ConfigurationRefused
from .identity import Identity
from .settings import PREFIX, Settings
from .topology import Topology

#: Seconds after which Redis gives away what a worker holds that no longer says that it lives.
VISIBILITY_TIMEOUT = 60
#: Seconds to wait for any answer of Redis. No connection hangs on a server that has stopped.
ANSWER_TIMEOUT = 10
_SCHEMES = {"amqps": "rabbitmq", "rediss": "redis"}


class Broker(Protocol):
    """What the hardening layer asks of a broker."""

    exchange: str

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold."""


class RabbitMQ:
    """A topic exchange of the application's own, quorum queues, login by certificate, confirmed publishing."""

    def __init__(self, settings: Settings, topology: Topology, own: Identity) -> None:
        self._settings, self._topology, self._own = settings, topology, own
        self.exchange = topology.exchange

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold."""
        exchange = Exchange(self.exchange, type="topic", no_declare=True)
        return {
            **_address(self._settings.broker_address()),
            "broker_use_ssl": self._settings.tls.amqp(),
            "broker_login_method": "EXTERNAL",  # by certificate; the name is only for logs
            "broker_user": self._topology.account(self._own.account),
            "broker_transport_options": {"confirm_publish": True},
            **_queues(self._topology, exchange, {"x-queue-type": "quorum"}),
            "worker_detect_quorum_queues": True,
        }


class Redis:
    """One list for each queue, and what a pool's workers hold in a hash of the pool's own."""

    exchange = ""

    def __init__(self, settings: Settings, topology: Topology, own: Identity) -> None:
        self._settings, self._topology, self._own = settings, topology, own

    def configuration(self) -> dict[str, Any]:
        """Return the Celery settings that must hold."""
        held, since = self._topology.held(self._own.account)
        return {
            **_address(self._settings.broker_address()),
            "broker_use_ssl": self._settings.tls.redis(),
            "broker_transport_options": {
                "visibility_timeout": VISIBILITY_TIMEOUT,
                "unacked_restore_interval": VISIBILITY_TIMEOUT / 6,
                "unacked_key": held,
                "unacked_index_key": since,
                "dead_queue": self._topology.dead,
                "quarantine_queue": self._topology.quarantine,
                "delivery_limits": {queue.broker_name: queue.delivery_limit for queue in self._topology.queues},
                "priority_steps": [0],  # one list for each queue: a list for each priority would be a key more to guard
                "socket_connect_timeout": 5,
                "socket_timeout": ANSWER_TIMEOUT,
                "socket_keepalive": True,
            },
            **_queues(self._topology, Exchange("", type="direct", no_declare=True), None),
        }


def of(settings: Settings, topology: Topology, own: Identity) -> Broker:
    """Return the topology's broker.

    Raises:
        ConfigurationRefused: the broker's URL is another one's.
    """
    scheme = urlsplit(settings.broker_url).scheme
    if _SCHEMES.get(scheme, topology.broker) != topology.broker:
        raise ConfigurationRefused(
            PREFIX + "BROKER_URL",
            f"is {scheme}://, and topology.toml says that the broker is {topology.broker}",
            "correct one of the two",
            "config.topology",
        )
    return (Redis if topology.broker == "redis" else RabbitMQ)(settings, topology, own)


def _address(url: str) -> dict[str, Any]:
    return dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url"), url)


def _queues(topology: Topology, exchange: Exchange, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Declared by the operator (topology.toml); no account may declare anything."""
    return {
        "task_queues": [
            Queue(
                queue.broker_name,
                exchange,
                alias=queue.name,
                routing_key=queue.broker_name,
                queue_arguments=arguments,
                no_declare=True,
            )
            for queue in topology.queues
        ],
        "task_default_exchange": exchange.name,
        "task_default_exchange_type": exchange.type,
        "task_create_missing_queues": False,
    }
