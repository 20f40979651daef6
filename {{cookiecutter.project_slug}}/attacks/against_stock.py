"""Stock Celery as a target: its account, its RSA signers, and how an attacker writes messages for it.

It has one account at broker and backend, because its guide knows no other way: whoever sends or consumes declares
queues, and everyone must be able to use them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from stack import Stack
from stack.pki import Pair

from .attack import REDIS
from .target import Target
from .wire import Message, Wire

ACCOUNT = VHOST = "stock"
DATABASE = "1"
RULE = f"user {ACCOUNT} on resetpass ~* &* +@all"
_AUTH = {"content_type": "application/data", "content_encoding": "utf-8"}


def definitions(document: dict[str, Any]) -> dict[str, Any]:
    """Give stock a vhost of its own in which its account may do everything, as Celery expects."""
    document["vhosts"].append({"name": VHOST})
    document["users"].append({"name": ACCOUNT, "password_hash": "", "tags": ""})
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    document["permissions"].append({"user": ACCOUNT, "vhost": VHOST, **everything})
    return document


def self_signed(name: str) -> tuple[bytes, bytes]:
    """Return an RSA key and a certificate for it, the only kind that stock takes, in PEM."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


class Stock(Target):
    """The application of `targets/stock.py`."""

    name = "stock"
    module = "attacks.targets.stock"
    queue = "celery"
    other_queue = "reports"
    broadcasts = "/{db}."

    def __init__(self, stack: Stack, observer: Pair) -> None:
        redis = stack.topology.broker == REDIS
        super().__init__(stack, observer, DATABASE if redis else VHOST, ("unacked", "unacked_index"))
        self.folder = stack.folder / "stock-signers"
        self.store = self.folder / "store"
        for folder in (self.folder, self.store):
            stack.account.folder(folder)
        for role in ("client", "worker", "reporter", "shop", "monitor", "operator", "stranger"):
            self._issue(role)
        self.intruder = (self.folder / "stranger.pem",)
        self.account, self.pair = ACCOUNT, stack.pki.tls.client(ACCOUNT)
        self.attacker = self.wire(ACCOUNT, self.pair)
        self.observer.declare(self.other_queue)
        self.results = self.backend(ACCOUNT, self.pair)

    def environment(self, role: str) -> dict[str, str]:
        """See `Target`; TLS and accounts are as good as ours."""
        ours = self.stack.environment("client")
        broker = urlsplit(ours["SECURE_CELERY_BROKER_URL"])
        backend = urlsplit(ours["SECURE_CELERY_RESULT_BACKEND"])
        login = self._login("redis-broker") if broker.scheme == "rediss" else ""
        values = {
            "BROKER_URL": f"{broker.scheme}://{login}{broker.hostname}:{broker.port}/{self.space}",
            "RESULT_BACKEND": f"rediss://{self._login('redis')}{backend.hostname}:{backend.port}/0",
            "TLS_CA": ours["SECURE_CELERY_TLS_CA"],
            "TLS_CERTIFICATE": self.pair.certificate,
            "TLS_KEY": self.pair.key,
            "SECURITY_KEY": self.folder / f"{role}.key",
            "SECURITY_CERTIFICATE": self.store / f"{role}.pem",
            "SECURITY_CERT_STORE": self.store / "*.pem",
        }
        return {f"STOCK_{name}": str(value) for name, value in values.items()}

    def _login(self, server: str) -> str:
        return f"{ACCOUNT}:{self.password(server, ACCOUNT)}@"

    def colleague(self) -> Wire:
        """There is one account for all."""
        return self.attacker

    def _issue(self, role: str) -> None:
        """Make a signer; the stranger's certificate is not in the store."""
        key, certificate = self_signed(f"stock {role}")
        self.stack.account.write(self.folder / f"{role}.key", key)
        store = self.folder if role == "stranger" else self.store
        self.stack.account.write(store / f"{role}.pem", certificate)

    def _auth(self, signer: str, body: bytes, content_type: str = "application/json", names: str = "") -> bytes:
        """Stock's signed form of any bytes; `names` puts another's certificate in."""
        from celery.security.certificate import Certificate
        from celery.security.key import PrivateKey
        from celery.security.serialization import SecureSerializer
        from celery.security.utils import get_digest_algorithm

        key = PrivateKey((self.folder / f"{signer}.key").read_text())
        store = self.folder if (names or signer) == "stranger" else self.store
        certificate = Certificate((store / f"{names or signer}.pem").read_text())
        signature = key.sign(body, get_digest_algorithm())
        packed: str = SecureSerializer()._pack(body, content_type, "utf-8", certificate.get_id(), signature)
        return packed.encode()

    def _message(self, task: str, body: bytes, properties: Mapping[str, Any] = _AUTH, /, **headers: Any) -> Message:
        task_id = str(uuid.uuid4())
        celery = {
            "lang": "py",
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "retries": 0,
            "timelimit": [None, None],
        }
        celery |= {"eta": None, "expires": None, "parent_id": None, "group": None, **headers}
        return Message(body, {**properties, "application_headers": celery}, "", self.queue, str(celery["id"]))

    def retold(self, task: str, /, *args: Any, **claims: Any) -> Iterator[Message]:
        """The signature covers the body only: what is in a header can be rewritten."""
        yield self.capture(task, *args).with_headers(**claims)

    def signed(
        self, signer: str, task: str, /, *args: Any, embed: Mapping[str, Any] | None = None, **claims: Any
    ) -> Message:
        """See `Target`."""
        canvas = {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **(embed or {})}
        body = json.dumps([args, {}, canvas]).encode()
        return self._message(task, self._auth(signer, body), **claims)

    def signed_body(self, signer: str, body: object) -> Iterator[Message]:
        """See `Target`."""
        yield self._message("attacks.pay", self._auth(signer, json.dumps(body).encode()))

    def pickled(self, signer: str, pickle: bytes) -> Iterator[Message]:
        """The inner content type is the signer's to choose."""
        yield self._message("attacks.pay", self._auth(signer, pickle, "application/x-python-serialize"))

    def unsigned(self, task: str, /, *args: Any) -> Iterator[Message]:
        """See `Target`; without `application/text`, which stops the worker (F6.1) before it could run anything."""
        plain = json.dumps([args, {}, {}]).encode()
        for content_type in ("text/plain", "application/json", "application/x-yaml", "application/data"):
            yield self._message(task, plain, {"content_type": content_type, "content_encoding": "utf-8"})

    def misattributed(self, task: str, /, *args: Any) -> Iterator[Message]:
        """See `Target`."""
        body = json.dumps([args, {}, {}]).encode()
        yield self._message(task, self._auth("stranger", body, names="client"))

    def protocol_1(self, task: str, /, *args: Any, told: str) -> Iterator[Message]:
        """`hybrid_to_proto2` lets a header win over the signed name."""
        task_id = str(uuid.uuid4())
        body = json.dumps({"task": task, "id": task_id, "args": args, "kwargs": {}}).encode()
        message = self._message(told, self._auth("client", body))
        yield message.with_properties(application_headers={"task": told, "id": task_id})

    def from_elsewhere(self, task: str, /, *args: Any) -> Iterator[Message]:
        """A caller has one key: what it signed for one application holds in each that trusts it."""
        yield self.capture(task, *args)

    def guises(self, victim: str) -> Iterator[dict[str, Any]]:
        """None is needed: nobody owns an id."""
        yield {}

    def outdated(self, task: str, /, *args: Any) -> Message:
        """Nothing in the message says when it was signed, or until when it holds."""
        return self.capture(task, *args)

    def forged_result(self, signer: str, task_id: str, result: object) -> bytes:
        """Whoever may sign a task may sign a result."""
        meta = {"status": "SUCCESS", "result": result, "traceback": None, "children": [], "task_id": task_id}
        return self._auth(signer, json.dumps(meta).encode())

    def command(self, signer: str, method: str, **arguments: Any) -> Message:
        """See `Target`."""
        told = {"method": method, "arguments": arguments, "destination": None}
        return Message(self._auth(signer, json.dumps(told).encode()), dict(_AUTH), "", "")

    def documented(self) -> Any:
        """Its reference of `broker_use_ssl` says nothing of host names; `targets/stock.py` does better than that."""
        better = ("server_hostname", "ssl_check_hostname")
        shown = {name: value for name, value in self.app.conf.broker_use_ssl.items() if name not in better}
        return self.app.connection_for_write(ssl=shown)

    def quarantined(self) -> list[str]:
        """There is none."""
        return []
