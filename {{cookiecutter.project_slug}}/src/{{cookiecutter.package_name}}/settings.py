"""This service's settings. The hardening layer's come first; add your own as fields.

A field ``report_folder: Path`` is read from ``SECURE_CELERY_REPORT_FOLDER``. Secrets are paths of files, never values.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from . import hardening

#: A list in the environment.
COMMAS = BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)


class Settings(hardening.Settings):
    """Read from the environment; an insecure value ends the start with one sentence."""

    #: Where uploaded objects lie; tasks only read there.
    upload_folder: Path = Path("/var/lib", __package__, "uploads")
    #: Where thumbnails and reports are written.
    output_folder: Path = Path("/var/lib", __package__, "output")

    #: Whether workers report what they do, without arguments and results, to monitors such as Flower.
    events: bool = False

    #: Who may get webhooks: `hooks.example.org,10.1.2.3:8443`. While nobody is listed, none is sent.
    webhook_hosts: Annotated[frozenset[str], NoDecode, COMMAS] = frozenset()
    #: Networks that are not public and where a listed host may be all the same: `10.1.0.0/16`.
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, COMMAS] = ()
    #: The CAs that issued the listed hosts' certificates; the system's, if it is not set.
    webhook_ca: Path | None = None
