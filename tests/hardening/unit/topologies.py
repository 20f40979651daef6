"""The project's own topology, as it is and with Redis as its broker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...project import topology

ROOT = Path(__file__).parents[3]
TOPOLOGY = topology.Topology.load(ROOT / "topology.toml")
APPLICATION = TOPOLOGY.application
REDIS = replace(TOPOLOGY, broker="redis")
