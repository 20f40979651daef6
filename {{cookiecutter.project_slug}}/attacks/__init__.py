"""Attacks on the service, as programs: `python -m attacks [--json] [--only ID]`, or `make attack`.

Guards against claims nobody checked. Each attack runs against two targets that share their tasks, broker and backend:
*stock* is Celery set up as its security guide says, *ours* is the same application behind `harden()`. An attack says
what the attacker must hold, does it, and looks at the effect: a task ran, a result changed, the worker stopped serving.
Assumes nothing about either target's logs. An honest message is served before and after each attack, or the run is an
error and proves nothing.

Read `no_key.py` first; the other three modules assume more of the attacker, in the order `seen.py`, `signer.py`,
`backend.py`. Everything here starts its own servers on loopback and attacks only those.
"""

from pathlib import Path

PACKAGE = next((Path(__file__).resolve().parents[1] / "src").glob("*/hardening/__init__.py")).parents[1].name
"""The project's package. Found, not written down: no file here needs to know its name."""
