"""``make new-task``, ``new-queue`` and ``new-caller``: one command each, and the project's checks still pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .baking import bake
from .test_quality import check


def new(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/new.py", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Path:
    """Bake a project to be changed."""
    return bake(tmp_path / "project", template)


SHOP = "spiffe://shop.test/{environment}/shop/worker"
FOREIGN = ["caller", "shop", "--identity", SHOP, "--sends", "my_service.tasks.weigh.weigh"]


def test_what_is_new_passes_the_projects_own_checks(fresh: Path) -> None:
    rules = fresh / "topology.toml"
    rules.write_text(rules.read_text(encoding="utf-8").replace("broker =", 'trust_domain = "my.test"\nbroker =', 1))
    for what in (["task", "weigh"], ["queue", "slow-one"], ["caller", "web"], ["queue", "third"], FOREIGN):
        done = new(fresh, *what)
        assert done.returncode == 0, done.stderr
        written = [line.removeprefix("wrote ") for line in done.stdout.splitlines() if line.startswith("wrote ")]
        assert written
        assert all((fresh / name).is_file() for name in written)
    topology = (fresh / "topology.toml").read_text(encoding="utf-8")
    assert "[queues.default]\n\n[queues.slow-one]\n\n[queues.third]\n" in topology
    assert "# A pool consumes `queues`." in topology
    assert SHOP in topology
    contract = (fresh / "deploy/callers/shop.toml").read_text(encoding="utf-8")
    assert "my_service.tasks.weigh.weigh" in contract
    assert "web" not in contract
    assert "my-service.web" in (fresh / "deploy/rabbitmq/definitions.json").read_text(encoding="utf-8")
    check(fresh, "ruff", "format", "--check", ".")
    check(fresh, "ruff", "check", ".")
    check(fresh, "mypy")
    check(fresh, "pytest", "-q", "-p", "no:cacheprovider", "tests/unit")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["task", "thumbnail"], "exists already"),
        (["task", "Weigh"], "is no module name"),
        (["task", "../weigh"], "is no module name"),
        (["queue", "default"], "has a queue 'default' already"),
        (["queue", "dead"], "is a name that the application uses itself"),
        (["queue", 'x"]\n[callers.root'], "is not a name"),
        (["queue", "slow", "--pool", "none"], "has no worker pool"),
        (["caller", "client"], "has a caller 'client' already"),
        (["caller", "worker"], "share an account"),
        (FOREIGN, "trust_domain"),
        (FOREIGN[:4], "name the tasks"),
        (["caller", "shop", "--identity", "spiffe://*/*/shop/worker", "--sends", "x"], "callers.shop.identity"),
        (["caller", "beat-2", "--sends", "*"], "starts with a wildcard"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_is_written(
    fresh: Path, arguments: list[str], reason: str
) -> None:
    before = {path: path.read_bytes() for path in fresh.rglob("*") if path.is_file()}
    done = new(fresh, *arguments)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    after = {path: path.read_bytes() for path in fresh.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == before
