"""Settings: where the broker, the keys and the topology are, read from the environment and refused when insecure.

Guards against: a service that starts with plain text, an unverified server, a readable key or a forgotten file.
Rests on: secrets being files. The environment names paths; no secret is ever a value in it.
Controls: TLS-1, TLS-2, TLS-3, SIG-2, DAT-3.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import quote, urlsplit, urlunsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from .claims import places
from .envelope import CHAIN_MAX, Signer, Verifier
from .errors import ConfigurationRefused, InvalidIdentity
from .files import read_private_file, read_public_file
from .tls import TLS, check_url
from .topology import Topology
from .trust import Trust

PREFIX = "SECURE_CELERY_"


class Settings(BaseSettings):
    """The hardening layer's settings; each is the environment variable ``SECURE_CELERY_<NAME>``.

    Raises:
        ConfigurationRefused: a setting is missing, malformed or insecure; one sentence.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, hide_input_in_errors=True)

    #: Where messages may go. Only a subclass in a test may widen this; no environment variable can.
    broker_schemes: ClassVar[frozenset[str]] = frozenset({"amqps", "rediss"})
    result_schemes: ClassVar[frozenset[str]] = frozenset({"rediss"})

    broker_url: str
    #: Redis has no login by certificate; RabbitMQ needs no password.
    broker_password_file: Path | None = None
    result_backend: str
    result_backend_password_file: Path
    topology: Path

    tls_ca: Path
    tls_certificate: Path
    tls_key: Path

    # Celery's own names for the signing files.
    security_key: Path
    security_key_password_file: Path | None = None
    security_certificate: Path
    security_cert_store: Path

    #: Longest message, in bytes, judged before anything of it is read.
    message_max_bytes: Annotated[int, Field(ge=1024, le=64 * 1024 * 1024)] = 1024 * 1024
    #: How long a message is valid after it was sent (or after its ETA), in seconds.
    message_max_age: Annotated[int, Field(ge=1, le=30 * 86_400)] = 86_400
    #: How far in the future an ETA or countdown may lie, in seconds.
    message_max_delay: Annotated[int, Field(ge=0, le=365 * 86_400)] = 7 * 86_400
    #: How far the clocks of two machines may differ, in seconds.
    clock_skew: Annotated[int, Field(ge=0, le=300)] = 30

    def __init__(self, **values: Any) -> None:
        """Read the environment; ``values`` win over it."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            field = str(error.errors(include_input=False)[0]["loc"][0])
            raise ConfigurationRefused(
                PREFIX + field.upper(),
                "is not set" if error.errors()[0]["type"] == "missing" else places(error),
                "set it, or load the role's .env file",
            ) from None
        check_url(PREFIX + "BROKER_URL", self.broker_url, self.broker_schemes)
        check_url(PREFIX + "RESULT_BACKEND", self.result_backend, self.result_schemes)

    @cached_property
    def tls(self) -> TLS:
        """The TLS client of this process."""
        return TLS(ca=self.tls_ca, certificate=self.tls_certificate, key=self.tls_key)

    @cached_property
    def signer(self) -> Signer:
        """The signing key and certificate of this process."""
        return load_signer(self.security_key, self.security_certificate, self.security_key_password_file)

    @cached_property
    def verifier(self) -> Verifier:
        """What verifies the envelopes of others."""
        return Verifier(Trust.load(self.security_cert_store), self.message_max_bytes)

    @cached_property
    def rules(self) -> Topology:
        """The topology; its application must be the one this process's certificate names."""
        topology = Topology.load(self.topology)
        if topology.application != self.signer.identity.application:
            raise ConfigurationRefused(
                PREFIX + "TOPOLOGY",
                f"it is of application {topology.application!r}, the signing certificate of another",
                "use the topology and the certificate of one application",
            )
        return topology

    def result_backend_url(self) -> str:
        """Return the result backend's URL with its password, for Celery alone; never log it."""
        return _with_password(self.result_backend, "RESULT_BACKEND_PASSWORD_FILE", self.result_backend_password_file)

    def broker_address(self) -> str:
        """Return the broker's URL; Redis's with its password, for Celery alone, so never log it.

        Raises:
            ConfigurationRefused: the broker is Redis and there is no password file.
        """
        if urlsplit(self.broker_url).scheme != "rediss":
            return self.broker_url
        if self.broker_password_file is None:
            raise ConfigurationRefused(
                PREFIX + "BROKER_PASSWORD_FILE", "is not set, and Redis has no login by certificate", "set it"
            )
        return _with_password(self.broker_url, "BROKER_PASSWORD_FILE", self.broker_password_file)


def _with_password(address: str, setting: str, file: Path) -> str:
    password = read_private_file(PREFIX + setting, file)
    url = urlsplit(address)
    user = quote(url.username or "", safe="")
    host = url.netloc.rpartition("@")[2]
    secret = quote(password.decode().strip(), safe="")
    return urlunsplit(url._replace(netloc=f"{user}:{secret}@{host}"))


def load_signer(key: Path, certificate: Path, password_file: Path | None = None) -> Signer:
    """Load a signing key and its certificate chain (PEM, leaf first).

    Raises:
        ConfigurationRefused: a file is missing, readable by others, malformed, or they do not belong together.
    """
    setting = PREFIX + "SECURITY_KEY"
    password = None
    if password_file is not None:
        password = read_private_file(setting + "_PASSWORD_FILE", password_file).strip()
    try:
        private = load_pem_private_key(read_private_file(setting, key), password)
    except (TypeError, ValueError) as error:
        raise ConfigurationRefused(
            setting, f"{key} is not a PEM private key that the password opens", "check the file and its password"
        ) from error
    try:
        chain = x509.load_pem_x509_certificates(read_public_file(PREFIX + "SECURITY_CERTIFICATE", certificate))
    except ValueError as error:
        raise ConfigurationRefused(
            PREFIX + "SECURITY_CERTIFICATE", f"{certificate} is not a PEM certificate", "name the right file"
        ) from error
    now = datetime.now(UTC)
    if not all(each.not_valid_before_utc <= now <= each.not_valid_after_utc for each in chain):
        raise ConfigurationRefused(
            PREFIX + "SECURITY_CERTIFICATE",
            f"{certificate} has expired or is not valid yet",
            "renew it, or set the clock",
        )
    if len(chain) > CHAIN_MAX:
        raise ConfigurationRefused(
            PREFIX + "SECURITY_CERTIFICATE",
            f"{certificate} holds {len(chain)} certificates, and no reader accepts more than {CHAIN_MAX}",
            "keep the signer's own and its intermediate ones",
        )
    try:
        return Signer(private, chain)
    except TypeError as error:
        raise ConfigurationRefused(
            setting, f"{error} or is not Ed25519, P-256 or RSA", "issue key and certificate together"
        ) from error
    except InvalidIdentity as error:
        raise ConfigurationRefused(PREFIX + "SECURITY_CERTIFICATE", str(error), error.fix) from error
