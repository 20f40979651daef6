"""Settings: where the broker, the keys and the topology are, read from the environment and refused when insecure.

Guards against: a service that starts with plain text, an unverified server, a readable key or a forgotten file; a
weaker way of connecting that nobody chose; a stolen key that signs until every worker was restarted, and half of a
replaced key and certificate.
Rests on: secrets being files. The environment names paths; no secret is ever a value in it. The signing files are
looked at when they are used, at most once a second, by each process for itself.
Controls: TLS-1, TLS-2, TLS-3, BRK-7, SIG-2, SIG-6, DAT-3.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from . import audit
from .claims import places
from .envelope import CHAIN_MAX, Signer, Type, Verified, Verifier
from .errors import ConfigurationRefused, InvalidIdentity, MessageRefused, UntrustedSigner
from .files import Watched, read_private_file, read_public_file
from .replay import RedisStore, ReplayStore
from .tls import TLS, check_url
from .topology import Topology
from .trust import SignerCertificate, Trust

PREFIX = "SECURE_CELERY_"
_CERTIFICATE = PREFIX + "SECURITY_CERTIFICATE"
Auth = Literal["certificate", "password"]
Authority = Literal["file", "system"]
Declared = Literal["operator", "app"]

_PLACES = ("broker", "result_backend")
#: What a managed broker or backend may need, or work that may not wait, and what is weaker then; nothing else is.
WEAKER = {
    f"{place}_{choice}": weaker
    for place in _PLACES
    for choice, weaker in (
        ("auth=password", "whoever copies or guesses the password is let in; no certificate is asked for"),
        ("ca=system", "any authority that this system trusts can vouch for the server, not yours alone"),
        ("topology=app", "one account reads, empties and deletes all; only signatures and policy part its users"),
    )
} | {"replay_on_outage=accept": "while the store of replays is away, a captured message can run again"}


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
    #: Where workers note which messages have run: a Redis that they share; callers need none.
    replay_store: str | None = None
    replay_store_password_file: Path | None = None
    #: While it is away, let messages wait for it, or run without knowing whether they are copies.
    replay_on_outage: Literal["refuse", "accept"] = "refuse"
    topology: Path
    heartbeat_file: Path | None = None  # signs of life for the health check (heartbeat.py)

    # For brokers and result backends that somebody else manages; each second value is weaker (see WEAKER).
    broker_auth: Auth = "certificate"
    broker_ca: Authority = "file"
    broker_topology: Declared = "operator"
    result_backend_auth: Auth = "certificate"
    result_backend_ca: Authority = "file"
    result_backend_topology: Declared = "operator"

    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
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
        prefix = values.get("_env_prefix", PREFIX)
        try:
            super().__init__(**values)
        except ValidationError as error:
            field = str(error.errors(include_input=False)[0]["loc"][0])
            reason = "is not set" if error.errors()[0]["type"] == "missing" else places(error)
            raise ConfigurationRefused(prefix + field.upper(), reason, "set it, or load the role's .env file") from None
        check_url(prefix + "BROKER_URL", self.broker_url, self.broker_schemes)
        check_url(prefix + "RESULT_BACKEND", self.result_backend, self.result_schemes)
        if self.replay_store is not None:
            check_url(prefix + "REPLAY_STORE", self.replay_store, frozenset({"rediss"}))
        self._check_files(prefix)

    def _check_files(self, prefix: str) -> None:
        """Refuse a file that is missing without the choice that says so, and one that the choices leave unused."""
        for name, choice, strong, weak in (
            ("tls_ca", "ca", "file", "system"),
            ("tls_certificate", "auth", "certificate", "password"),
            ("tls_key", "auth", "certificate", "password"),
        ):
            users = [place for place in _PLACES if getattr(self, f"{place}_{choice}") == strong]
            given = getattr(self, name) is not None
            if users and not given:
                others = " and ".join(f"{prefix}{place}_{choice}".upper() + f"={weak}" for place in users)
                raise ConfigurationRefused(prefix + name.upper(), "is not set", f"set it, or {others}")
            if given and not users:
                reason = f"is set, and {choice}={weak} leaves it unused"
                raise ConfigurationRefused(prefix + name.upper(), reason, "remove it")
        login = self.broker_auth == "password" or self.broker_url.startswith("rediss:")
        if login != (self.broker_password_file is not None):
            reason = "is not set, and is the login" if login else "is set, and the certificate is the login"
            fix = "set it" if login else f"remove it, or set {prefix}BROKER_AUTH=password"
            raise ConfigurationRefused(prefix + "BROKER_PASSWORD_FILE", reason, fix)

    @property
    def weakenings(self) -> tuple[str, ...]:
        """What these settings give up, as ``setting=value: what is weaker``; empty where nothing is."""
        chosen = {f"{name}={getattr(self, name)}" for name in type(self).model_fields}
        return tuple(f"{choice}: {weaker}" for choice, weaker in WEAKER.items() if choice in chosen)

    @cached_property
    def broker_tls(self) -> TLS:
        """The TLS client of this process at the broker."""
        return self._tls(self.broker_ca, self.broker_auth)

    @cached_property
    def result_backend_tls(self) -> TLS:
        """The TLS client of this process at the result backend."""
        return self._tls(self.result_backend_ca, self.result_backend_auth)

    def _tls(self, ca: Authority, auth: Auth) -> TLS:
        certificate, key = (self.tls_certificate, self.tls_key) if auth == "certificate" else (None, None)
        return TLS(ca=self.tls_ca if ca == "file" else None, certificate=certificate, key=key)

    @cached_property
    def credentials(self) -> Credentials:
        """The signing key and certificate of this process, and whom it trusts."""
        return Credentials(self)

    def read_topology(self) -> Topology:
        """Read the topology: of the application that this process's certificate names, or of one that it may call.

        Raises:
            ConfigurationRefused: it says something wrong, is of neither, or every user of this host can replace it.
        """
        content, own = read_public_file(PREFIX + "TOPOLOGY", self.topology), self.credentials.signer.identity
        topology = Topology.parse(str(self.topology), content)
        stanza = topology.stanza(own, own)
        if topology.audience(own) != own.audience and stanza is None:
            reason = f"it is of {topology.audience(own)}, of which the signer {own} is neither a part nor a caller"
            fix = "use the topology and the certificate of one application, or what that application lets callers know"
            raise ConfigurationRefused(PREFIX + "TOPOLOGY", reason, fix)
        account = topology.account(stanza.name if stanza else own.account)
        if self.broker_password_file:
            _check_account("BROKER_URL", self.broker_url, self.broker_topology, account)
        if self.result_backend.startswith("rediss:"):
            _check_account("RESULT_BACKEND", self.result_backend, self.result_backend_topology, account)
        return topology

    @cached_property
    def result_backend_address(self) -> str:
        """The result backend's URL with its password as it was first: for Celery alone; never log it."""
        return _with_password(self.result_backend, "RESULT_BACKEND_PASSWORD_FILE", self.result_backend_password_file)

    def open_replay_store(self, prefix: str) -> ReplayStore:
        """Return where workers note which messages have run.

        Args:
            prefix: of all keys.

        Raises:
            ConfigurationRefused: it is not set, or its password file cannot be read.
        """
        if self.replay_store is None or self.replay_store_password_file is None:
            reason = "it or its password file is not set, and a worker could not tell a copy from a new message"
            raise ConfigurationRefused(PREFIX + "REPLAY_STORE", reason, "set both")
        address = _with_password(self.replay_store, "REPLAY_STORE_PASSWORD_FILE", self.replay_store_password_file)
        return RedisStore(address, self.result_backend_tls, prefix)

    @cached_property
    def broker_address(self) -> str:
        """The broker's URL, with the password as it was first if that is the login: for Celery alone; never log it."""
        if self.broker_password_file is None:
            return self.broker_url
        return _with_password(self.broker_url, "BROKER_PASSWORD_FILE", self.broker_password_file)


def _check_account(setting: str, address: str, declared: Declared, account: str) -> None:
    """Refuse a login to another account than the topology's, where an operator has made that one."""
    users = {urlsplit(part).username for part in address.split(";")}
    if declared == "operator" and users != {account}:
        reason = f"does not log in as {account}, this certificate's account in the topology"
        fix = f"write {account}@ before the host, or choose {setting.removesuffix('_URL')}_TOPOLOGY=app"
        raise ConfigurationRefused(PREFIX + setting, reason, fix)
    if None in users and address.startswith("amqps:"):
        raise ConfigurationRefused(PREFIX + setting, "names no account", "write it and @ before the host")


def _with_password(address: str, setting: str, file: Path) -> str:
    secret = quote(read_private_file(PREFIX + setting, file).decode().strip(), safe="")
    # In each address of a failover list: kombu forgets, for the second one, a password that it was given beside them.
    return ";".join(
        urlunsplit(url._replace(netloc=f"{user}:{secret}@{host}"))
        for url in map(urlsplit, address.split(";"))
        for user, _, host in (url.netloc.rpartition("@"),)
    )


class Credentials(Watched):
    """This process's signing key and the signers it trusts, as the files say now.

    Trust comes first and alone: a revocation waits for nothing. A key waits for its certificate, and for trust in it.
    """

    #: Seconds between two warnings that something runs out.
    WARN = 6 * 3600.0

    def __init__(self, settings: Settings) -> None:
        """Read everything.

        Raises:
            ConfigurationRefused: a file is missing, readable by others or malformed, the key is not the certificate's,
                or the certificate is not one that the store accepts now.
        """
        self._settings = settings
        self._next_warning = 0.0
        names = "security_key", "security_key_password_file", "security_certificate", "security_cert_store"
        paths = (getattr(settings, name) for name in names)
        super().__init__("credentials", paths, trust=self._load_trust, signer=self._load_signer)
        self._trust = Trust.load(settings.security_cert_store)
        self._verifier = Verifier(self._trust, settings.message_max_bytes)
        self._signer = load_signer(settings)
        self._own: SignerCertificate | None = self._accepted(self._signer)
        if self._trust.unlisted:
            audit.record(audit.Event.WEAKENED, setting="security_cert_store", reason="a CA has no revocation list")

    @property
    def signer(self) -> Signer:
        """This process's key and certificate."""
        self.look()
        return self._signer

    @property
    def verifier(self) -> Verifier:
        """Verifies the envelopes of others; another one after each change, since the old one remembers."""
        self.look()
        return self._verifier

    def verify(self, kind: Type, token: bytes | str) -> Verified:
        """Verify an envelope; the files are looked at first when its signer is unknown: its CA may be a new one.

        Raises:
            MessageRefused: a leaf that says why, as ``Verifier.verify``.
        """
        verifier = self.verifier
        try:
            return verifier.verify(kind, token)
        except UntrustedSigner:
            self.reload_if(False)
            if self._verifier is verifier:
                raise
            return self._verifier.verify(kind, token)

    def check(self) -> None:
        """Check that whoever trusts whom we trust accepts what is signed now.

        Raises:
            ConfigurationRefused: our own certificate is revoked, has expired or is not trusted any more.
        """
        self.look()
        if self._own is None or not self._own.not_before <= time.time() <= self._own.not_after:
            self._accepted(self._signer)

    def look(self) -> None:
        """Load what has changed, and warn of what runs out."""
        super().look()
        if (now := time.monotonic()) >= self._next_warning:
            self._next_warning = now + self.WARN
            self._warn()

    def _load_trust(self) -> None:
        trust = Trust.load(self._settings.security_cert_store)
        trust.check_follows(self._trust)
        self._trust, self._own = trust, None
        self._verifier = Verifier(trust, self._settings.message_max_bytes)

    def _load_signer(self) -> None:
        signer = load_signer(self._settings)
        if signer.identity != self._signer.identity:
            raise ConfigurationRefused(_CERTIFICATE, "names another signer than before", "restart this process with it")
        self._own = self._accepted(signer)
        self._signer = signer

    def _accepted(self, signer: Signer) -> SignerCertificate:
        try:
            own = self._trust.certificate(signer.chain)
            own.check_issue(int(time.time()))
        except MessageRefused as refusal:
            reason = f"every reader would refuse it: {refusal}, of {self._settings.security_certificate}"
            raise ConfigurationRefused(_CERTIFICATE, reason, refusal.fix, "config.certificate") from None
        return own

    def _warn(self) -> None:
        now, own = time.time(), self._own
        # Tools renew when a third is left; at a quarter they have failed to.
        if own and own.not_after - now < (own.not_after - own.not_before) / 4:
            audit.record(audit.Event.CREDENTIALS_EXPIRING, what="the signing certificate", at=int(own.not_after))
        for due in (each.due.timestamp() for each in self._trust.lists.values()):
            if due < now:
                audit.record(audit.Event.CREDENTIALS_EXPIRING, what="a revocation list", at=int(due))


def load_signer(settings: Settings) -> Signer:
    """Load the signing key and its certificate chain (PEM, leaf first).

    Raises:
        ConfigurationRefused: a file is missing, readable by others, malformed, or they do not belong together.
    """
    key, certificate = settings.security_key, settings.security_certificate
    setting, password_file, password = PREFIX + "SECURITY_KEY", settings.security_key_password_file, None
    if password_file is not None:
        password = read_private_file(setting + "_PASSWORD_FILE", password_file).strip()
    try:
        private = load_pem_private_key(read_private_file(setting, key), password)
    except (TypeError, ValueError) as error:
        reason = f"{key} is not a PEM private key that the password opens"
        raise ConfigurationRefused(setting, reason, "check the file and its password") from error
    try:
        chain = x509.load_pem_x509_certificates(read_public_file(_CERTIFICATE, certificate))
    except ValueError as error:
        raise ConfigurationRefused(_CERTIFICATE, f"{certificate} is no PEM certificate", "name another file") from error
    if len(chain) > CHAIN_MAX:
        reason = f"{certificate} holds {len(chain)} certificates, and no reader accepts more than {CHAIN_MAX}"
        raise ConfigurationRefused(_CERTIFICATE, reason, "keep the signer's own and its intermediate ones")
    try:
        return Signer(private, chain)
    except TypeError as error:
        reason = f"{error} or is not Ed25519, P-256 or RSA"
        raise ConfigurationRefused(setting, reason, "issue key and certificate together") from error
    except InvalidIdentity as error:
        raise ConfigurationRefused(_CERTIFICATE, str(error), error.fix) from error
