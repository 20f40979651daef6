"""Tell another system that something happened, by webhook. Nobody waits for it, so no result is stored.

Safe to run twice: the receiver sees the same ``Idempotency-Key``, also when it is tried again.
"""

from __future__ import annotations

import json
import socket
import ssl
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Annotated, Any

from celery import Task, shared_task
from pydantic import AnyUrl, Field, UrlConstraints
from urllib3 import HTTPSConnectionPool, Timeout
from urllib3.exceptions import HTTPError, TimeoutError

HttpsUrl = Annotated[AnyUrl, UrlConstraints(max_length=500, allowed_schemes=["https"])]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
PUBLIC_IPV6 = ip_network("2000::/3")  # outside of it, and in 6to4 inside, are IPv4 addresses in disguise


class NotDelivered(Exception):
    """Trying again would not help. No text has the whole address: its path is often a secret."""


class NoAnswer(Exception):
    """The receiver is away or in trouble: it is tried again."""


@shared_task(
    bind=True,
    autoretry_for=(NoAnswer,),
    max_retries=5,
    retry_backoff=2,  # seconds, doubled each time, with jitter
    time_limit=30,
    soft_time_limit=25,
)
def notify(self: Task, url: HttpsUrl, event: Word, subject: Word) -> None:
    """Post the event to a host that the settings list."""
    settings = self.app.hardening.settings
    host = f"{url.host}" if url.port == 443 else f"{url.host}:{url.port}"
    if host not in settings.webhook_hosts:
        raise NotDelivered("the host is not among SECURE_CELERY_WEBHOOK_HOSTS")
    tls = ssl.create_default_context(cafile=settings.webhook_ca)
    body = json.dumps({"id": self.request.id, "event": event, "subject": subject})
    headers = {"Host": host, "Content-Type": "application/json", "Idempotency-Key": self.request.id}
    target = f"{url.path or '/'}?{url.query or ''}".rstrip("?")
    address = checked_address(url, settings.webhook_networks)
    with HTTPSConnectionPool(address, url.port, Timeout(total=10), ssl_context=tls, server_hostname=url.host) as pool:
        try:  # no retry, and so no redirect either; of the answer, only the status is read
            status = pool.urlopen("POST", target, body, headers, retries=False, preload_content=False).status
        except HTTPError as error:
            raise (NoAnswer if isinstance(error, TimeoutError) else NotDelivered)(type(error).__name__) from None
    if not 200 <= status < 300:
        raise (NoAnswer if status >= 500 else NotDelivered)(f"the host answered {status}")


def checked_address(url: AnyUrl, networks: tuple[Any, ...]) -> str:
    """Look the host up once: what is connected to is what was checked, and no second look finds another address."""
    found = [ip_address(entry[4][0]) for entry in socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)]
    for address in found:
        disguised = isinstance(address, IPv6Address) and (address not in PUBLIC_IPV6 or address.sixtofour)
        public = address.is_global and not address.is_multicast and not disguised
        if not public and not any(address in network for network in networks):
            raise NotDelivered("the host is in a network that is not public: see SECURE_CELERY_WEBHOOK_NETWORKS")
    return str(found[0])
