"""The one place where TLS settings are made, for the broker, the result backend and Redis Sentinel.

Guards against: connections that look protected and are not. Celery's own ways of asking for TLS verify no
host name (``amqps://``, ``broker_use_ssl=True``), nothing at all (``rediss://`` as a broker, an
``ssl_version`` in the options) or do not encrypt (``broker_use_ssl=True`` with Redis), and a parameter in a
URL overrides the settings. redis-py *adds* the CA to the operating system's store, so that any public CA could vouch
for the server, and waits for ever for a handshake.
Rests on: explicit options for each driver, the server's name taken from the URL, URLs that carry an address
and nothing else. ``server_hostname: None`` means the URL's host, and kombu writes the first one into the
dictionary it was given: the connection class must give every (re)connection a copy of its own.
Controls: TLS-1, TLS-2, TLS-3.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .errors import ConfigurationRefused
from .files import read_private_file, read_public_file

#: The floor. There is no ceiling: TLS 1.3 is used where both ends have it.
MINIMUM_VERSION = ssl.TLSVersion.TLSv1_2

#: For TLS 1.2: authenticated encryption and forward secrecy only. TLS 1.3 has no other suites and ignores it.
CIPHERS = ":".join(
    f"ECDHE-{key}-{suite}"
    for suite in ("AES256-GCM-SHA384", "CHACHA20-POLY1305", "AES128-GCM-SHA256")
    for key in ("ECDSA", "RSA")
)

#: Seconds. A server that speaks no TLS may take Redis's greeting for a long line, and wait for its end.
HANDSHAKE_TIMEOUT = 5.0

CA_SETTING = "SECURE_CELERY_TLS_CA"
CERTIFICATE_SETTING = "SECURE_CELERY_TLS_CERTIFICATE"
KEY_SETTING = "SECURE_CELERY_TLS_KEY"


@dataclass(frozen=True)
class TLS:
    """Files of one TLS client, checked when the object is made: whoever holds one can build options from it.

    Args:
        ca: certificates that may sign the server's; ``None`` means the operating system's store.
        certificate: this client's certificate, then its intermediates.
        key: its private key, unencrypted.

    Raises:
        ConfigurationRefused: ``config.tls``, ``config.file`` or ``config.key-permissions``.
    """

    ca: Path | None
    certificate: Path | None
    key: Path | None

    def __post_init__(self) -> None:
        """Refuse files that could only fail later, in a handshake, without saying why."""
        if self.ca is None:
            _check_system_store()
        else:
            _certificates(CA_SETTING, self.ca)
        if self.certificate is not None and self.key is not None:
            _check_pair(self.certificate, self.key)
        elif self.key is not None:
            raise _refuse(CERTIFICATE_SETTING, "a key is set without its certificate", "set both or neither")
        elif self.certificate is not None:
            raise _refuse(KEY_SETTING, "a certificate is set without its key", "set both or neither")

    def amqp(self) -> dict[str, Any]:
        """Options of py-amqp for ``broker_use_ssl`` with an ``amqps://`` URL."""
        return {
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": None,  # the URL's host; without the key py-amqp checks no name at all
            "ca_certs": _text(self.ca),  # None: py-amqp loads the system's store
            "certfile": _text(self.certificate),
            "keyfile": _text(self.key),
            "ciphers": CIPHERS,
            "tls_minimum_version": MINIMUM_VERSION,
        }

    def redis(self) -> dict[str, Any]:
        """Options of redis-py for ``redis_backend_use_ssl``, and ``broker_use_ssl`` with a ``rediss://`` URL.

        redis-py adds ``ssl_ca_certs`` to the system's store instead of replacing it: the class
        ``VerifiedSSLConnection`` trusts nothing else.
        """
        return {
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_check_hostname": True,
            "ssl_ca_certs": _text(self.ca),
            "ssl_certfile": _text(self.certificate),
            "ssl_keyfile": _text(self.key),
            "ssl_ciphers": CIPHERS,
            "ssl_min_version": MINIMUM_VERSION,
        }

    def sentinel(self) -> dict[str, Any]:
        """Options for ``sentinel_kwargs``: discovery makes connections of its own, plain by default."""
        return {"ssl": True, **self.redis()}


def check_url(setting: str, url: str, schemes: frozenset[str]) -> None:
    """Refuse a server's address that is plain, or that carries more than an address.

    Every part of a failover list (``a;b``) is checked. The refusal never repeats the URL: it may hold a
    password.

    Args:
        setting: the name a person set, for the refusal.
        url: what they set it to.
        schemes: what is accepted, for example ``frozenset({"amqps"})``; compared exactly.

    Raises:
        ConfigurationRefused: ``config.tls``.
    """
    wanted = " or ".join(f"{scheme}://" for scheme in sorted(schemes))
    if not isinstance(url, str) or not url.strip():
        raise _refuse(setting, "no address is set", f"set an address that starts with {wanted}")
    for address in url.split(";"):
        scheme, separator, _ = address.partition("://")
        if not separator or scheme not in schemes:
            named = separator and scheme.replace("+", "").isalnum()  # anything else may be part of a password
            shown = f"{scheme}://" if named else "an address without a scheme"
            raise _refuse(setting, f"{shown} is not a protected connection", f"use {wanted}")
        if any(character.isspace() or not character.isprintable() for character in address):
            raise _refuse(setting, "the address holds white space or control characters", "remove them")
        try:
            parts = urlsplit(address)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise _refuse(setting, "the address has a malformed host or port", "write host:port") from None
        if not host:
            raise _refuse(setting, "the address names no host, and a default one would be used", "name the host")
        if port == 0:
            raise _refuse(setting, "the address has port 0", "name the server's TLS port")
        if parts.password is not None:
            reason = "the address holds a password, and addresses end up in logs and process lists"
            raise _refuse(setting, reason, "put it into a file and name that in the setting for the password's file")
        if "ssl_" in parts.query.lower():
            reason = "an ssl_* parameter in the address overrides the settings that verify the server"
            raise _refuse(setting, reason, f"remove it and set {CA_SETTING} instead")
        if "?" in address or "#" in address:
            raise _refuse(setting, "parameters in the address override settings", "remove them, from the ? or # on")


def check_options(setting: str, value: object, expected: Mapping[str, Any]) -> None:
    """Refuse TLS options that something else has set: only the builder's own may stand.

    Args:
        setting: ``broker_use_ssl`` or ``redis_backend_use_ssl``.
        value: what the application's configuration holds.
        expected: what the builder makes.

    Raises:
        ConfigurationRefused: ``config.tls``.
    """
    if value is None or value is False or value == {} or value == expected:
        return
    reason = "options set by hand leave out or override what verifies the server"
    if value is True:
        reason = "True verifies no host name with RabbitMQ and does not encrypt at all with Redis"
    raise _refuse(setting, reason, f"remove it and set {CA_SETTING} instead")


def _certificates(setting: str, path: Path) -> list[x509.Certificate]:
    content = read_public_file(setting, path)
    if b"PRIVATE KEY-----" in content:
        raise _refuse(setting, f"{path} holds a private key", "keep it in a file of its own and replace it")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise _refuse(setting, f"{path} holds no valid PEM certificate", "name one that does") from None


def _check_pair(certificate: Path, key: Path) -> None:
    leaf = _certificates(CERTIFICATE_SETTING, certificate)[0]
    content = read_private_file(KEY_SETTING, key)
    if b"ENCRYPTED" in content:
        # OpenSSL would ask for the passphrase on the terminal, and a service would wait there for ever.
        raise _refuse(KEY_SETTING, f"{key} needs a passphrase", "store it unencrypted, for this process only")
    try:
        private = load_pem_private_key(content, password=None)
    except (ValueError, UnsupportedAlgorithm):
        raise _refuse(KEY_SETTING, f"{key} holds no valid PEM private key", "name one that does") from None
    if private.public_key() != leaf.public_key():
        raise _refuse(KEY_SETTING, f"{key} does not match the certificate {certificate}", "name its own key")
    now, since, until = datetime.now(UTC), leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now > until:
        raise _refuse(CERTIFICATE_SETTING, f"{certificate} expired at {until:%Y-%m-%d %H:%M} UTC", "renew it")
    if now < since:
        reason = f"{certificate} is not valid before {since:%Y-%m-%d %H:%M} UTC"
        raise _refuse(CERTIFICATE_SETTING, reason, "check the clock")


def _check_system_store() -> None:
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not (paths.capath and any(Path(paths.capath).iterdir())):
        reason = "no file is set and this system's certificate store is empty"
        raise _refuse(CA_SETTING, reason, "set the file with the server's CA, or install the system's CA certificates")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _refuse(setting: str, reason: str, fix: str) -> ConfigurationRefused:
    return ConfigurationRefused(setting, reason, fix, "config.tls")


class VerifiedSSLConnection(redis.SSLConnection):
    """A TLS connection whose verification no option, URL parameter or default can weaken.

    Celery's Redis backend takes its connection class from ``connection_class_ssl``, and for ``rediss://``
    from ``_params_from_url``: a subclass of the backend has to name this class in both places.
    """

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED, and the host name is checked
        context.minimum_version = MINIMUM_VERSION
        context.set_ciphers(CIPHERS)
        if self.ca_certs is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(self.ca_certs)
        if self.certfile is not None:
            context.load_cert_chain(self.certfile, self.keyfile)
        sock.settimeout(HANDSHAKE_TIMEOUT)
        try:
            protected = context.wrap_socket(sock, server_hostname=self.host)
        except TimeoutError:
            reason = f"began no TLS handshake in {HANDSHAKE_TIMEOUT:.0f} s: is it a plain-text port?"
            raise redis.ConnectionError(f"{self.host}:{self.port} {reason}") from None
        protected.settimeout(self.socket_timeout)
        return protected
