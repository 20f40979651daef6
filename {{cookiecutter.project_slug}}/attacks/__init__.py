"""Attacks on the service, as programs: `python -m attacks [--json] [--only ID]`, or `make attack`.

Guards against claims nobody checked. Each attack runs against two targets that share their tasks, broker and backend:
*stock* is Celery set up as its security guide says, *ours* is the same application behind `harden()`. An attack says
what the attacker must hold, does it, and looks at the effect: a task ran, a result changed, the worker stopped serving.
Assumes nothing about either target's logs. An honest message is served before and after each attack, or the run is an
error and proves nothing.

The broker is the project's own, RabbitMQ or Redis. Read `no_key.py` first; the other modules assume more of the
attacker, in the order `seen.py`, `signer.py`; `control.py` is about what is no task, `outside.py` about the result
backend, the network and the host. Everything here starts its own servers on loopback and attacks only those.
"""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

PACKAGE = next((PROJECT / "src").glob("*/hardening/__init__.py")).parents[1].name
"""The project's package. Found, not written down: no file here needs to know its name."""

BROKER: str = tomllib.loads((PROJECT / "topology.toml").read_text(encoding="utf-8"))["broker"]
"""The project's broker: `rabbitmq` or `redis`."""
