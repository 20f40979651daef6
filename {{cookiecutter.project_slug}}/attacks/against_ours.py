"""The hardened application as a target: its accounts, its signers, and how an attacker writes messages for it.

Insiders sign with the project's own signer, so that what they send is refused for what it says and for nothing else;
whoever holds no trusted key builds envelopes by hand.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from stack import Stack
from stack.pki import Pair

from . import PACKAGE
from .attack import REDIS
from .target import Target
from .wire import Message, Wire

_TASK, _RESULT, _CONTROL = "celery-task+jws", "celery-result+jws", "celery-control+jws"
_JOSE = {"content_type": "application/jose", "content_encoding": "utf-8"}
_AUDIENCE = "spiffe://victim.test/development/victim"

_DEAD = "dead letter"


class Ours(Target):
    """The application of `targets/ours.py`."""

    name = "ours"
    module = "attacks.targets.ours"
    queue = "victim.default"
    other_queue = "victim.reports"
    broadcasts = "/."

    def __init__(self, stack: Stack, observer: Pair) -> None:
        topology = stack.topology
        space = "0" if topology.broker == REDIS else topology.vhost
        super().__init__(stack, observer, space, topology.held("worker"))
        settings = {role: stack.environment(role) for role in stack.topology.accounts}
        self.signers = {
            role: Pair(Path(one["SECURE_CELERY_SECURITY_CERTIFICATE"]), Path(one["SECURE_CELERY_SECURITY_KEY"]))
            for role, one in settings.items()
        }
        signing, stranger = stack.pki.signing, stack.pki.authority("stranger")
        self.signers |= {
            "stranger": stranger.signer("stranger", f"{_AUDIENCE}/client"),
            "staging": signing.signer("staging", f"{_AUDIENCE.replace('development', 'staging')}/client"),
            "neighbour": signing.signer(
                "neighbour", f"{_AUDIENCE.replace('development/victim', 'development/other')}/client"
            ),
        }
        self.account, self.pair = topology.account("client"), self.client("client")
        self.attacker = self.wire(self.account, self.pair)
        self.store, self.intruder = stack.pki.store, (stranger.certificate, stranger.revocations)
        self.results = self.backend(topology.account("worker"), self.client("worker"))
        self._refused: list[str] = []

    def environment(self, role: str) -> dict[str, str]:
        """See `Target`."""
        return self.stack.environment(role)

    def client(self, role: str) -> Pair:
        """A role's TLS certificate and key."""
        own = self.environment(role)
        return Pair(Path(own["SECURE_CELERY_TLS_CERTIFICATE"]), Path(own["SECURE_CELERY_TLS_KEY"]))

    def colleague(self) -> Wire:
        """See `Target`."""
        return self.wire(self.stack.topology.account("worker"), self.client("worker"))

    # -- envelopes ----------------------------------------------------------------------------------------------------

    def _identity(self, signer: str) -> str:
        names = self._chain(signer)[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(names.get_values_for_type(x509.UniformResourceIdentifier)[0])

    def _chain(self, signer: str) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(self.signers[signer].certificate.read_bytes())

    def _key(self, signer: str) -> Any:
        return load_pem_private_key(self.signers[signer].key.read_bytes(), None)

    def _sign(self, signer: str, payload: bytes, kind: str = _TASK) -> bytes:
        """An envelope of any payload, by the project's own signer."""
        envelope = import_module(f"{PACKAGE}.hardening.envelope")
        signed: bytes = envelope.Signer(self._key(signer), self._chain(signer)).sign(envelope.Type(kind), payload)
        return signed

    def _sign_by_hand(self, signer: str, payload: bytes, **header: Any) -> bytes:
        """An envelope under any header; a member that is None is left out."""
        keys = import_module(f"{PACKAGE}.hardening.keys")
        key = self._key(signer)
        fields = {"alg": keys.algorithm_of(key.public_key()), "typ": _TASK, "x5c": _x5c(*self._chain(signer)), **header}
        fields = {name: value for name, value in fields.items() if value is not None}
        data = _b64(json.dumps(fields, separators=(",", ":")).encode()) + b"." + _b64(payload)
        return data + b"." + _b64(keys.signer(key)(data))

    def _claims(
        self, signer: str, task: str, args: Any, embed: Mapping[str, Any] | None, /, **claims: Any
    ) -> dict[str, Any]:
        """An honest message's claims, made those of another signer and another task."""
        honest = _claims_of(self.capture("attacks.pay", 1).body)
        identity, task_id = self._identity(signer), str(uuid.uuid4())
        names = {"name": task, "id": task_id, "root_id": task_id, "correlation_id": task_id}
        inner = {name: value for name, value in claims.items() if name not in honest and value is not None}
        outer = {name: value for name, value in claims.items() if name in honest}
        return {
            **{name: identity if value == honest["iss"] else value for name, value in honest.items()},
            "args": args,
            "task": {**honest["task"], **names, **inner},
            "embed": {**honest["embed"], **(embed or {})},
            **outer,
        }

    def _message(self, body: bytes, task: str = "attacks.pay", task_id: str = "", /, **headers: Any) -> Message:
        celery = {"lang": "py", "task": task, "id": task_id or str(uuid.uuid4()), "timelimit": [None, None], **headers}
        properties = {**_JOSE, "delivery_mode": 2, "application_headers": celery}
        return Message(body, properties, self.stack.topology.exchange, self.queue, celery["id"])

    def _enveloped(self, signer: str, claims: dict[str, Any]) -> Message:
        task = claims["task"]
        return self._message(self._sign(signer, json.dumps(claims).encode()), task["name"], task["id"])

    # -- what an attacker writes --------------------------------------------------------------------------------------

    def retold(self, task: str, /, *args: Any, **claims: Any) -> Iterator[Message]:
        """In the headers, in the properties, and in the envelope under the signature that it had."""
        yield self.capture(task, *args).with_headers(**claims)
        message = self.capture(task, *args)
        header, payload, signature = message.body.split(b".")
        told = json.loads(_unb64(payload))
        told["task"] |= {{"task": "name"}.get(name, name): value for name, value in claims.items()}
        yield message.with_body(b".".join((header, _b64(json.dumps(told).encode()), signature))).with_headers(**claims)

    def signed(
        self, signer: str, task: str, /, *args: Any, embed: Mapping[str, Any] | None = None, **claims: Any
    ) -> Message:
        """See `Target`."""
        return self._enveloped(signer, self._claims(signer, task, args, embed, **claims))

    def signed_body(self, signer: str, body: object) -> Iterator[Message]:
        """As the payload, as each part of it, and as the task."""
        yield self._message(self._sign(signer, json.dumps(body).encode()))
        whole = self._claims(signer, "attacks.pay", [1], None)
        for part in whole:
            yield self._message(self._sign(signer, json.dumps({**whole, part: body}).encode()))
        for field in whole["task"]:
            task = {**whole["task"], field: body}
            yield self._message(self._sign(signer, json.dumps({**whole, "task": task}).encode()))

    def pickled(self, signer: str, pickle: bytes) -> Iterator[Message]:
        """As the body, as the payload, announced in the header, inside the claims, and in stock's own signed form."""
        pickle_type, text = "application/x-python-serialize", base64.b64encode(pickle).decode()
        pickled: dict[str, Any] = {"serializer": "pickle", "content_type": pickle_type}  # allow serializer: the attack
        envelope = self._sign(signer, pickle)
        yield self._message(envelope)
        yield self._message(envelope).with_properties(content_type=pickle_type)
        yield self._message(envelope).with_properties(content_encoding="pickle")
        yield self._message(envelope, **pickled)
        yield self._message(pickle).with_properties(content_type=pickle_type, content_encoding="binary")
        yield self._message(self._sign_by_hand(signer, pickle, cty=pickle_type))
        yield self._message(self._sign_by_hand(signer, pickle, typ=pickle_type))
        fields = (b"signer", b"signature", pickle_type.encode(), b"binary", pickle)
        stock = base64.b64encode(b"\x00\x01".join((*map(base64.b64encode, fields[:2]), *fields[2:])))
        yield self._message(stock).with_properties(content_type="application/data")
        yield self.signed(signer, "attacks.pay", text)
        yield self.signed(signer, "attacks.pay", {"__type__": "pickle", "__value__": text})
        yield self.signed(signer, "attacks.pay", {"__type__": "bytes", "__value__": text})
        yield self.signed(signer, "attacks.pay", 1, embed=pickled)
        yield self.signed(signer, "attacks.pay", 1, **pickled)

    def unsigned(self, task: str, /, *args: Any) -> Iterator[Message]:
        """Plain, and as envelopes whose algorithm would make the signature mean nothing (RFC 8725 section 2.1)."""
        claims = self._claims("client", task, args, None)
        plain, payload = json.dumps([args, {}, {}]).encode(), json.dumps(claims).encode()
        message = self._message(plain, task, claims["task"]["id"], root_id=None, eta=None, retries=0)
        for content_type in ("application/text", "application/json", "application/data", "application/jose"):
            yield message.with_body(plain, content_type)
        leaf = self._chain("client")[0]
        key = leaf.public_key()
        publics = (
            leaf.public_bytes(Encoding.PEM),
            leaf.public_bytes(Encoding.DER),
            key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        )
        for algorithm in ("none", "None", "", "HS256"):
            fields = {"alg": algorithm, "typ": _TASK, "x5c": _x5c(leaf)}
            data = _b64(json.dumps(fields).encode()) + b"." + _b64(payload)
            macs = (
                [hmac.digest(public, data, hashlib.sha256) for public in publics]
                if algorithm == "HS256"
                else [b"", b"\0"]
            )
            for signature in macs:
                yield message.with_body(data + b"." + _b64(signature), "application/jose")

    def misattributed(self, task: str, /, *args: Any) -> Iterator[Message]:
        """The client's certificate alone, before and behind one's own, none at all, and a key in the header instead."""
        payload = json.dumps(self._claims("client", task, args, None)).encode()
        client, stranger = self._chain("client")[0], self._chain("stranger")[0]
        public = stranger.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        x, y = (_b64(part).decode() for part in (public[1:33], public[33:]))  # SEC 1 section 2.3.3: after the byte 4
        jwk = {"kty": "EC", "crv": "P-256", "x": x, "y": y}
        headers: tuple[dict[str, Any], ...] = (
            {"x5c": _x5c(client)},
            {"x5c": _x5c(client, stranger)},
            {"x5c": _x5c(stranger, client)},
            {"x5c": []},
            {"x5c": None},
            {"x5c": None, "jwk": jwk},
            {"x5c": _x5c(client), "jwk": jwk},
            {"x5c": None, "kid": self._identity("client")},
            {"x5c": None, "x5u": "https://127.0.0.1:1/stranger.pem"},
        )
        for header in headers:
            yield self._message(self._sign_by_hand("stranger", payload, **header), task)

    def protocol_1(self, task: str, /, *args: Any, told: str) -> Iterator[Message]:
        """Signed by the client, as if it knew nothing newer."""
        task_id = str(uuid.uuid4())
        old = {"task": task, "id": task_id, "args": args, "kwargs": {}, "retries": 0}
        for payload in (old, {**self._claims("client", task, args, None), **old}):
            yield self._message(self._sign("client", json.dumps(payload).encode()), told, task_id)
        plain = json.dumps(old).encode()
        yield self._message(plain, told, task_id).with_properties(
            content_type="application/json", application_headers=None
        )

    def from_elsewhere(self, task: str, /, *args: Any) -> Iterator[Message]:
        """By our client for another application; by others, addressed to theirs, to us, and in our client's name."""
        client = self._identity("client")
        yield self.signed("client", task, *args, aud=self._identity("neighbour").rpartition("/")[0])
        for signer in ("staging", "neighbour"):
            there = self._identity(signer).rpartition("/")[0]
            yield self.signed(signer, task, *args, aud=there)
            yield self.signed(signer, task, *args)
            yield self.signed(signer, task, *args, iss=client, origin=client)

    def guises(self, victim: str) -> Iterator[dict[str, Any]]:
        """Claims that name the victim where they may not."""
        identity = self._identity(victim)
        yield {}
        for names in (("owner",), ("origin",), ("owner", "origin"), ("owner", "origin", "iss")):
            yield dict.fromkeys(names, identity)

    def outdated(self, task: str, /, *args: Any) -> Message:
        """Its lifetime was two minutes, two minutes ago: the stack's authority is not old enough for longer ones."""
        now = int(time.time())
        return self.signed("client", task, *args, iat=now - 240, exp=now - 120)

    def forged_result(self, signer: str, task_id: str, result: object) -> bytes:
        """An honest result's envelope, but for the signer."""
        honest = self.app.tasks["attacks.pay"].delay(1)
        honest.get(timeout=5)
        claims = _claims_of(self.results.get(self.result_key(honest.id)))
        claims["value"] |= {"result": result, "task_id": task_id}
        claims |= {"iss": self._identity(signer), "of": task_id}
        return self._sign(signer, json.dumps(claims).encode(), _RESULT)

    def command(self, signer: str, method: str, **arguments: Any) -> Message:
        """See `Target`."""
        identity, now = self._identity(signer), int(time.time())
        claims = {"iss": identity, "aud": _AUDIENCE, "iat": now, "exp": now + 60}
        claims |= {"jti": str(uuid.uuid4()), "method": method, "arguments": arguments}
        claims |= dict.fromkeys(("destination", "pattern", "matcher", "ticket"))
        return Message(self._sign(signer, json.dumps(claims).encode(), _CONTROL), dict(_JOSE), "", "")

    def documented(self) -> Any:
        """It has no other settings."""
        return self.app.connection_for_write()

    # -- effects ------------------------------------------------------------------------------------------------------

    def quarantined(self) -> list[str]:
        """See `Target`."""
        for record in self.observer.drain(self.stack.topology.quarantine):
            self._refused.append(_claims_of(record.body)["code"])
        self._refused += [_DEAD] * self.observer.purge(self.stack.topology.dead)
        return self._refused

    def unaccounted(self) -> str | None:
        """A refusal must not lose the message, nor leave it to the broker to give up on delivering it."""
        gone = self.lost()
        dead = self.quarantined().count(_DEAD)
        return gone or (f"the worker failed on {dead} messages until the broker gave them up" if dead else None)

    def defence(self) -> str:
        """See `Target`."""
        refused = [f"{count} x {code}" for code, count in sorted(Counter(self.quarantined()).items())]
        defences = [f"in quarantine: {', '.join(refused)}"] * bool(refused)
        defences += [f"refused by the broker: {self.forbidden}"] * bool(self.forbidden)
        return "; ".join(defences) or "nothing came of it"

    def clear(self) -> None:
        """See `Target`."""
        super().clear()
        self.quarantined()
        self._refused = []


def _claims_of(envelope: bytes) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(_unb64(envelope.split(b".")[1]))
    return claims


def _x5c(*chain: x509.Certificate) -> list[str]:
    return [base64.b64encode(one.public_bytes(Encoding.DER)).decode() for one in chain]


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _unb64(data: bytes) -> bytes:
    return base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))
