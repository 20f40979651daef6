"""Nothing that arrives makes the worker raise, and nothing is accepted that the slow, obvious reference refuses.

``FUZZ_INPUTS`` says how many inputs are tried; ``FUZZ_SEED`` repeats a run. What fails prints its input.
"""

from __future__ import annotations

import copy
import json
import os
import random
import string
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ...project import canvas, codec, envelope, errors, gate, identity, intake_redis
from ...service import Service
from ..unit import certificates
from ..unit.desk import delivered
from ..unit.test_intake import Wire
from .reference import NotAcceptableError, Reference

INPUTS = int(os.environ.get("FUZZ_INPUTS", "6000"))
SEED = int(os.environ.get("FUZZ_SEED", str(time.time_ns())))
RULES = Path(__file__).with_name("rules.toml")
TASKS = ("shop.tasks.pay", "shop.tasks.clean", "shop.admin.drop")
BUILTIN = ("celery.map", "celery.starmap", "celery.chunks", "celery.accumulate", "celery.chain", "celery.chord_unlock")
ROLES = (
    "client",
    "client/till",
    "worker",
    "worker/batch",
    "monitor",
    "monitor/till",
    "operator",
    "client/nobody",
    "client/mall",
)
AUDIENCE = "spiffe://shop.test/development/shop"
OURS = [f"{AUDIENCE}/{role}" for role in ROLES]
FOREIGN = [AUDIENCE.replace(*change) + "/client" for change in (("/shop", "/other"), ("development", "production"))]
FOREIGN += [f"spiffe://mall.test/{name}" for name in ("development/mall/worker", "production/mall/worker")]


@pytest.fixture
def chance() -> random.Random:
    print(f"FUZZ_SEED={SEED}")
    return random.Random(SEED)


def nothing(number: int = 0) -> None:
    """Be a task."""


class World:
    """One worker, everybody who may sign, and some who may not."""

    def __init__(self, folder: Path) -> None:
        self.service = Service(folder, RULES)
        app = self.service.worker.app
        for name in TASKS:
            app.task(name=name, shared=False)(nothing)
        authority = certificates.Pair(self.service.pki.signing.key, (self.service.pki.signing.root,))
        valid = (certificates.NOW - timedelta(minutes=2), certificates.NOW + timedelta(hours=12))  # within the CA's
        genuine = [certificates.signing(uri, authority, valid=valid) for uri in (*OURS, *FOREIGN)]
        stranger = certificates.signing(OURS[0], certificates.authority())
        self.pair = genuine[0]
        self.signers = [pair.signer for pair in (*genuine, stranger)]
        settings = app.hardening.settings
        self.reference = Reference(
            [pair.leaf for pair in genuine],
            RULES,
            set(app.tasks),
            {"shop.default"},
            AUDIENCE,
            settings.message_max_bytes,
            settings.message_max_age,
            settings.message_max_delay,
            settings.clock_skew,
        )
        self.service.client.app.send_task(TASKS[0], (1,))
        (message,) = self.service.deliveries()
        message.ack()
        self.fields = codec.decode(app.hardening.verifier.verify(envelope.Type.TASK, message.body).payload)
        self.bodies = [signer.sign(envelope.Type.TASK, self.payload(signer)) for signer in self.signers[:2]]

    def payload(self, signer: envelope.Signer) -> bytes:
        """Return the claims of a genuine task, sent by ``signer``."""
        return codec.encode(self.fields | dict.fromkeys(("iss", "origin", "owner"), str(signer.identity)))

    def accepts(self, body: bytes, content_type: str) -> bool:
        """Ask the gate; whatever it raises that is no refusal is the test's failure."""
        try:
            admitted = self.service.gate.admit(delivered(body, content_type=content_type))
        except errors.GateFailed as failed:
            raise AssertionError(f"the gate itself failed ({failed}) on {body!r}") from failed
        except errors.MessageRefused:
            return False
        assert isinstance(admitted, gate.Admitted)
        return True

    def compare(self, body: bytes, content_type: str = envelope.CONTENT_TYPE) -> bool:
        """Have both judge; return whether the message was accepted."""
        accepted = self.accepts(body, content_type)
        if accepted:
            try:
                self.reference.judge(body, content_type, time.time())
            except NotAcceptableError as why:
                raise AssertionError(f"accepted, but {why}: {content_type} {body!r}") from why
        return accepted


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


# --- inputs -----------------------------------------------------------------------------------------------------------


def bent(chance: random.Random, data: bytes) -> bytes:
    """Change some bytes."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at, other = chance.randrange(len(changed) + 1), chance.randrange(len(changed) + 1)
        match chance.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed.insert(at, chance.choice(b'.=AZaz09-_+/{}[]",: \x00\xff'))
            case 2:
                del changed[min(at, other) : max(at, other)]
            case 3:
                changed[at:at] = changed[min(at, other) : max(at, other)]
            case 4 if at < len(changed):
                changed[at] = chance.choice(string.printable.encode())
            case _:
                del changed[at:]
    return bytes(changed)


def text(chance: random.Random) -> str:
    return "".join(chance.choices("aA0_.*/:-\x00\n\u2028é\ud800\U0001f600", k=chance.randrange(6)))


def scalar(chance: random.Random) -> Any:
    now = int(time.time())
    return chance.choice((
        *(None, True, False, 0, 1, -1, 0.5, 1e300, 2**53, 2**63, -(2**64), 10**30, "", "0", text(chance)),
        *(now, now + 29, now + 31, now - 86_400, now + 86_400, now + 8 * 86_400),
        *("2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-01:00", "2026-06-31", "inf"),
        *(*TASKS, *BUILTIN, "default", "slow", "shop.default", "shop.slow", "shop.quarantine", "other.default"),
        *(*OURS, *FOREIGN, AUDIENCE, "spiffe://x"),
    ))  # fmt: skip


def value(chance: random.Random, deep: int = 0) -> Any:
    """Make any JSON value, often one that looks like a signature."""
    kind = chance.randrange(10)
    if deep > 3 or kind < 5:
        return scalar(chance)
    if kind == 5:
        return [value(chance, deep + 1) for _ in range(chance.randrange(4))]
    if kind == 6:
        return {text(chance): value(chance, deep + 1) for _ in range(chance.randrange(3))}
    return signature(chance, deep)


def signature(chance: random.Random, deep: int = 0) -> dict[str, Any]:
    kinds = {None: TASKS[0], "chain": "celery.chain", "group": "celery.group", "chord": "celery.chord"}
    kind = chance.choice((None, None, None, *kinds, "map"))
    options = ("link", "link_error", "chain", "chord", "queue", "routing_key", "task_id", "task", "headers", "priority")
    made: dict[str, Any] = {
        "task": chance.choice((kinds.get(kind, "celery.map"), *TASKS, *BUILTIN)),
        "args": [value(chance, deep + 1) for _ in range(chance.randrange(3))],
        "kwargs": {
            name: [value(chance, deep + 1) for _ in range(chance.randrange(3))]
            for name in ("tasks", "header", "body", "task", "it")
            if chance.random() < 0.3
        },
        "options": {name: value(chance, deep + 1) for name in options if chance.random() < 0.1},
        "subtask_type": kind,
        "immutable": chance.choice((True, False, None)),
    }
    if chance.random() < 0.2:
        made["options"]["queue"] = chance.choice(("default", "slow", "shop.slow"))
    if kind is not None and chance.random() < 0.8:
        made["kwargs"] = {key: [plain(chance)] for key in ("tasks", "header", "body")}
    for name in list(made):
        if chance.random() < 0.03:
            made.pop(name)
        elif chance.random() < 0.03:
            made[name] = chance.choice(([], {}, 7, None, ""))
    if chance.random() < 0.04:
        made[text(chance)] = value(chance, deep + 1)
    return made


def plain(chance: random.Random) -> dict[str, Any]:
    """Make a signature with nothing in it."""
    return {"task": chance.choice(TASKS), "args": [], "kwargs": {}, "options": {}, "subtask_type": None}


def paths(fields: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the places in some claims."""
    inner = fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    return [at, *(path for key, each in inner for path in paths(each, (*at, key)))]


def one_claim(chance: random.Random, claims: dict[str, Any]) -> None:
    """Change what decides, to a value that could be meant."""
    days = chance.choice((-30, -1, -0.01, 0.0001, 0.001, 0.9, 1, 1.1, 6, 8, 400))
    match chance.choice(("name", "iss", "origin", "owner", "aud", "queue", "iat", "exp", "both", "eta")):
        case "name":
            claims |= dict.fromkeys(("iss", "origin", "owner"), chance.choice((*OURS, *FOREIGN)))
        case "iss" | "origin" | "owner" as name:
            claims[name] = chance.choice((*OURS, *FOREIGN))
        case "aud":
            claims["aud"] = chance.choice((AUDIENCE, *FOREIGN))
        case "queue":
            claims["queue"] = chance.choice(("shop.default", "shop.slow", "default", "slow", "other.default"))
        case "iat" | "exp" as name:
            claims[name] += int(days * 86_400)
        case "both":
            claims["iat"] += int(days * 86_400)
            claims["exp"] += int(days * 86_400)
        case _:
            claims["task"]["eta"] = (datetime.now(UTC) + timedelta(days=days)).isoformat()
            claims["exp"] += int(days * 86_400)


def forged_claims(chance: random.Random, fields: dict[str, Any], signer: str) -> dict[str, Any]:
    """Change genuine claims in some places, or in none, and let them come from ``signer``."""
    changed = copy.deepcopy(fields) | {"iss": signer, "origin": signer, "owner": signer}
    if chance.random() < 0.5:
        one_claim(chance, changed)
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2))):
        *parents, last = chance.choice(paths(changed)[1:])
        target: Any = changed
        for parent in parents:
            target = target[parent]
        if chance.random() < 0.1 and isinstance(target, dict):
            target.pop(last)
        else:
            target[last] = value(chance)
    if chance.random() < 0.4:
        place = chance.choice(("callbacks", "errbacks", "chain", "chord"))
        if isinstance(changed.get("embed"), dict):
            changed["embed"][place] = signature(chance) if place == "chord" else [signature(chance)]
    if chance.random() < 0.2 and isinstance(changed.get("task"), dict):
        changed["task"]["name"] = chance.choice((*TASKS, *BUILTIN))
        changed["args"] = [chance.choice((signature(chance), value(chance))), [[1]]]
    return changed


def tries(share: float) -> range:
    return range(max(1, int(INPUTS * share)))


# --- what must hold ---------------------------------------------------------------------------------------------------


def test_no_changed_message_is_accepted(world: World, chance: random.Random) -> None:
    originals = set(world.bodies)
    assert all(world.compare(body) for body in originals)
    for _ in tries(0.3):
        changed = bent(chance, chance.choice(world.bodies))
        if chance.random() < 0.2:
            head, _, tail = chance.choice(world.bodies).partition(b".")
            changed = head + b"." + bent(chance, tail)
        assert not world.compare(changed) or changed in originals


def test_nothing_is_accepted_that_the_reference_refuses(world: World, chance: random.Random) -> None:
    accepted: Counter[bool] = Counter()
    for _ in tries(0.3):
        signer = chance.choice((*world.signers, *world.signers[:3]))
        claims = forged_claims(chance, world.fields, str(signer.identity))
        try:
            payload = json.dumps(claims).encode()
        except (ValueError, RecursionError):
            continue
        if chance.random() < 0.05:
            payload = bent(chance, payload)
        elif chance.random() < 0.05:  # what two readers may read differently
            name = chance.choice((b'"iat": ', b'"origin": ', b'"args": ', b'"number": '))
            payload = payload.replace(name, name + chance.choice((b"1e999", b"NaN", b"0")) + b", " + name, 1)
        elif chance.random() < 0.05:
            payload = payload.replace(b'"args": [1]', b'"args": [%s]' % chance.choice((b"1e999", b"NaN", b"-0", b"01")))
        content_type = chance.choice((*[envelope.CONTENT_TYPE] * 20, "application/json", "application/data", ""))
        accepted[world.compare(signer.sign(envelope.Type.TASK, payload), content_type)] += 1
    assert min(accepted[True], accepted[False]) > INPUTS * 0.3 / 100, accepted  # else this proves nothing


def test_no_header_is_accepted_that_the_reference_refuses(world: World, chance: random.Random) -> None:
    """A genuine signer chooses every byte of the protected header, and signs it."""
    header, payload = certificates.header(world.pair), world.payload(world.signers[0])
    accepted = 0
    for _ in tries(0.1):
        fields = copy.deepcopy(header)
        name = chance.choice((*fields, "crit", "jku", "kid", text(chance)))
        fields[name] = chance.choice((
            *(value(chance), "none", "HS256", "ES256", "EdDSA", "celery-task+jws", "celery-result+jws"),
            *(header["x5c"], header["x5c"] * 2, header["x5c"] * 9, [chance.choice(header["x5c"])], []),
        ))  # fmt: skip
        raw = json.dumps(fields).encode("utf-8", "surrogatepass")
        if chance.random() < 0.3:
            raw = bent(chance, raw)
        elif chance.random() < 0.1:
            raw = raw.replace(b'"typ": ', b'"typ": "celery-result+jws", "typ": ')
        accepted += world.compare(certificates.jws(world.pair, raw, payload))
    assert accepted


def test_no_frame_raises(chance: random.Random) -> None:
    wire, genuine = Wire(), b"\xf0\x00\x10application/jose\x05utf-8\x00\x00\x00\x00\x02\x00"
    for _ in tries(0.1):
        properties = bent(chance, genuine) if chance.random() < 0.7 else chance.randbytes(chance.randrange(60))
        key = chance.randbytes(chance.randrange(20))
        message = wire.deliver(properties, b"body", key)
        assert message.body == b"body", (properties, key)


def test_no_item_of_a_redis_list_raises(world: World, chance: random.Random) -> None:
    properties = {"body_encoding": "base64", "delivery_tag": "t", "delivery_info": {}, "priority": 0, "deliveries": 1}
    plain = {"body": "AAAA", "content-type": "application/jose", "content-encoding": "utf-8", "headers": {}}
    for _ in tries(0.1):
        item = copy.deepcopy(plain) | {"properties": dict(properties)}
        for _ in range(chance.randrange(4)):
            target: Any = chance.choice((item, item["properties"], item["headers"]))
            if isinstance(target, dict) and target:
                target[chance.choice((*target, "compression", text(chance)))] = value(chance)
        raw = json.dumps(item).encode("utf-8", "surrogatepass")
        rebuilt = intake_redis.rebuild(bent(chance, raw) if chance.random() < 0.5 else raw, "shop.default")
        assert rebuilt["properties"]["delivery_info"] == {"exchange": "", "routing_key": "shop.default"}
        json.dumps(rebuilt)


def test_the_policy_allows_what_the_reference_allows(world: World, chance: random.Random) -> None:
    policy = world.service.worker.app.hardening.policy
    queues = (None, "shop.default", "shop.slow", "shop.quarantine", "")
    said: Counter[bool] = Counter()
    for _ in tries(0.1):
        signer, origin = chance.choice(OURS + FOREIGN), chance.choice(OURS + FOREIGN)
        task, queue = chance.choice((*TASKS, *BUILTIN, text(chance))), chance.choice(queues)
        reference = all(world.reference.may(who, task, queue) for who in (signer, origin))
        reference = reference and (signer == origin or world.reference.works(signer))
        said[reference] += 1
        assert allowed(policy.check, identity.Identity.parse(signer), identity.Identity.parse(origin), task, queue) == (
            reference
        ), (signer, origin, task, queue)
    assert all(said.values())


def allowed(check: Callable[..., None], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except errors.NotAllowed:
        return False
    return True


def test_no_canvas_raises(chance: random.Random) -> None:
    for _ in tries(0.1):
        try:
            list(canvas._signatures(value(chance)))
        except errors.BadShape:
            continue
