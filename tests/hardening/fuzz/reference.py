"""What may be accepted, written a second time: slow, obvious, and without a line of the hardening layer's code.

Where the gate accepts a message, this must accept it too. It knows the genuine certificates beforehand instead of
validating paths, and reads the rules straight from the TOML.
"""

from __future__ import annotations

import base64
import json
import math
import string
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, utils
from cryptography.hazmat.primitives.serialization import Encoding

ALPHABET = set((string.ascii_letters + string.digits + "-_").encode())
CLAIMS = {"iss", "aud", "iat", "exp", "jti", "origin", "owner", "queue", "task", "args", "kwargs", "embed"}
LINKS = ("link", "link_error", "chain", "chord")
COMPOSITES = {"celery.chain": ("tasks",), "celery.group": ("tasks",), "celery.chord": ("header", "body")}
MAPS = ("celery.map", "celery.starmap", "celery.chunks")


class NotAcceptableError(Exception):
    """This must be refused."""


def need(condition: object, why: str) -> None:
    if not condition:
        raise NotAcceptableError(why)


@dataclass
class Reference:
    """The judge of one worker."""

    certificates: list[x509.Certificate]
    rules: Path
    tasks: set[str]
    consumes: set[str]
    audience: str
    max_bytes: int
    max_age: int
    max_delay: int
    skew: int

    def judge(self, token: bytes, content_type: object, now: float) -> None:
        """Return if a task message with this body may be accepted at ``now``, in seconds since the epoch.

        Raises:
            NotAcceptableError: it may not; the text says why.
        """
        need(content_type == "application/jose", "content type")
        need(len(token) <= self.max_bytes, "length")
        parts = token.split(b".")
        need(len(parts) == 3, "three parts")
        header, payload, signature = map(decoded, parts)
        fields = parsed(header)
        need(isinstance(fields, dict) and set(fields) == {"alg", "typ", "x5c"}, "header")
        need(fields["typ"] == "celery-task+jws", "type")
        certificate = self.known(fields["x5c"])
        check_signature(certificate, fields["alg"], signature, parts[0] + b"." + parts[1])
        claims = parsed(payload)
        need(isinstance(claims, dict) and set(claims) == CLAIMS, "claims")
        need(depth(claims) <= 101, "depth")
        self.judge_claims(claims, certificate, now)

    def known(self, chain: Any) -> x509.Certificate:
        need(isinstance(chain, list) and 1 <= len(chain) <= 3, "chain")
        for certificate in self.certificates:
            der = certificate.public_bytes(Encoding.DER)
            if isinstance(chain[0], str) and base64.b64encode(der).decode() == chain[0]:
                return certificate
        raise NotAcceptableError("an unknown certificate")

    def judge_claims(self, claims: dict[str, Any], certificate: x509.Certificate, now: float) -> None:
        iss, origin, task = claims["iss"], claims["origin"], claims["task"]
        need(iss == uri_of(certificate), "iss")
        for name in ("iat", "exp"):
            need(type(claims[name]) is int, name)
        iat, exp = claims["iat"], claims["exp"]
        since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        need(since.timestamp() <= iat <= until.timestamp(), "validity at issue")
        need(claims["aud"] == self.audience, "audience")
        need(self.works(iss) or claims["owner"] == iss, "owner")
        need(iat <= now + self.skew, "from the future")
        need(exp >= now - self.skew, "expired")
        start = iat
        if isinstance(task, dict) and task.get("eta"):
            eta = datetime.fromisoformat(task["eta"])
            eta = eta if eta.tzinfo else eta.replace(tzinfo=UTC)
            start = max(iat, eta.timestamp())
        need(start <= iat + self.max_delay, "delay")
        need(exp <= start + self.max_age + 1, "lives too long")
        need(claims["queue"] in self.consumes, "queue")
        need(isinstance(task, dict) and task.get("name") in self.tasks, "task")
        need(isinstance(claims["args"], list) and isinstance(claims["kwargs"], dict), "arguments")
        need(isinstance(claims["embed"], dict), "embed")
        need(set(claims["embed"]) <= {"callbacks", "errbacks", "chain", "chord"}, "embed")
        named = [(task["name"], claims["queue"])]
        for signatures in claims["embed"].values():
            named += list(names(signatures))
        named += list(mapped(task["name"], claims["args"], claims["kwargs"]))
        for name, queue in named:
            need(self.may(iss, name, queue), f"{iss} may not send {name} to {queue}")
            need(self.may(origin, name, queue), f"{origin} may not send {name} to {queue}")
        need(origin == iss or self.works(iss), "on behalf of another")

    def works(self, who: str) -> bool:
        return who.startswith(f"{self.audience}/worker")

    def may(self, who: str, task: str, queue: str | None) -> bool:
        rules = tomllib.loads(self.rules.read_text(encoding="utf-8"))
        head, _, account = who.partition(f"{self.audience}/")
        role, _, name = account.partition("/")
        stanza = rules["pools" if role == "worker" else "callers"].get(name or role)
        if stanza is not None and "identity" in stanza:
            stanza = None
        for caller in rules["callers"].values():
            if caller.get("identity", "").replace("{environment}", self.audience.split("/")[3]) == who:
                stanza, head, role = caller, "", who.split("/")[5]
        if head or role not in {"client", "beat", "worker", "operator"}:
            return False
        if stanza is None or not any(fits(task, pattern) for pattern in stanza.get("sends", [])):
            return False
        application = rules["application"]
        queues = stanza.get("sends_to", stanza.get("queues", []))
        return queue is None or queue in queues or queue in {f"{application}.{each}" for each in queues}


def fits(task: str, pattern: str) -> bool:
    """Whether a name fits a pattern in which ``*`` stands for anything."""
    head, star, tail = pattern.partition("*")
    return task == pattern if not star else task.startswith(head) and task.endswith(tail)


def uri_of(certificate: x509.Certificate) -> str:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return str(uri)


def decoded(part: bytes) -> bytes:
    need(part and set(part) <= ALPHABET, "base64url")
    need(len(part) % 4 != 1, "base64url")
    data = base64.urlsafe_b64decode(part + b"=" * (4 - len(part) % 4))
    need(base64.urlsafe_b64encode(data).rstrip(b"=") == part, "another spelling")
    return data


def parsed(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        need(len(keys) == len(set(keys)), "a key twice")
        return dict(pairs)

    def number(text: str) -> float:
        need(math.isfinite(float(text)), "a number too large")
        return float(text)

    def constant(_: str) -> None:
        raise NotAcceptableError("a constant that JSON has not")

    try:
        text = data.decode("utf-8", "strict")
        return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise NotAcceptableError("JSON") from error


def depth(value: Any) -> int:
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return levels


def check_signature(certificate: x509.Certificate, algorithm: object, signature: bytes, data: bytes) -> None:
    key = certificate.public_key()
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            need(algorithm == "EdDSA", "algorithm")
            key.verify(signature, data)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            need(algorithm == "ES256" and len(signature) == 64, "algorithm")
            r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            key.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
        else:
            need(algorithm == "PS256", "algorithm")
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            key.verify(signature, data, pss, hashes.SHA256())  # type: ignore[union-attr, call-arg, arg-type]
    except InvalidSignature as error:
        raise NotAcceptableError("signature") from error


def names(value: Any) -> Any:
    """Yield each task that a signature, or a list of them, can have sent, with the queue it asks for."""
    for signature in value if isinstance(value, list) else [value]:
        if signature is None:
            continue
        if isinstance(signature, str):
            yield signature, None
            continue
        need(isinstance(signature, dict) and isinstance(signature.get("task"), str), "a signature")
        options = signature.get("options", {})
        for link in LINKS:
            yield from names(options.get(link))
        name, queue = signature["task"], options.get("queue") or options.get("routing_key")
        if name in COMPOSITES:
            for key in COMPOSITES[name]:
                for inner, its in names(signature.get("kwargs", {}).get(key)):
                    yield inner, its
                    yield inner, queue
        else:
            yield name, queue
            yield from mapped(name, signature.get("args") or [], signature.get("kwargs", {}))


def mapped(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Yield the task that one of Celery's own tasks runs."""
    if name in MAPS:
        inner = args[0] if args else kwargs.get("task")
        yield (inner["task"] if isinstance(inner, dict) else inner), None
