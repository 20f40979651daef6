"""Fixtures: a clean copy of the template, a baked tree to read, and a project to run."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .baking import LEFTOVERS, LONG, TEMPLATE, bake, bake_again, environment, workshop
from .kubernetes import Build, Manifests


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the template as a clone has it, without what working in it left behind."""
    return Path(shutil.copytree(TEMPLATE, tmp_path_factory.mktemp("template") / "secure-celery", ignore=LEFTOVERS))


@pytest.fixture(scope="session")
def default(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake the default project, to be read only."""
    return bake(tmp_path_factory.mktemp("default"), template)


@pytest.fixture(scope="session")
def long(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake a project whose names are as long as they may be, to be read only."""
    return bake(tmp_path_factory.mktemp("long"), template, LONG)


@pytest.fixture(scope="session")
def redis(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake a project whose broker is Redis, to be read only."""
    return bake(tmp_path_factory.mktemp("redis"), template, {"broker": "redis"})


@pytest.fixture(scope="session")
def oidc(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bake a project whose Flower is behind an identity provider, to be read only."""
    return bake(tmp_path_factory.mktemp("oidc"), template, {"flower": "oidc"})


@pytest.fixture(scope="session")
def redis_project() -> Iterator[Path]:
    """Bake a project whose broker is Redis where its stack's unprivileged user can reach it."""
    with workshop("test-redis") as folder:
        yield bake_again(folder, {"broker": "redis"})


@pytest.fixture(scope="session")
def project() -> Iterator[Path]:
    """Bake the default project where its stack's unprivileged user can reach it."""
    with workshop("test") as folder:
        yield bake_again(folder)


@pytest.fixture(scope="session")
def tools() -> Path:
    """Install what is locked in ``requirements/tools/ci.txt``, apart from the rest; give the folder of its programs."""
    return environment("ci") / "bin"


@pytest.fixture(scope="session")
def kubernetes_tools() -> Path:
    """Install what is locked in ``requirements/tools/kubernetes.txt``, apart from the rest; give its folder."""
    return environment("kubernetes") / "bin"


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build manifests, each combination once."""
    known: dict[tuple[str, ...], Manifests] = {}

    def get(tree: str, overlay: str, *components: str) -> Manifests:
        key = (tree, overlay, *components)
        if key not in known:
            known[key] = Manifests(request.getfixturevalue(tree), tmp_path_factory.mktemp("kustomize"), *key[1:])
        return known[key]

    return get


@pytest.fixture
def library(default: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import the default project's own modules."""
    monkeypatch.syspath_prepend(str(default / "src"))
    monkeypatch.syspath_prepend(str(default))
    return importlib.import_module
