"""A Celery worker of the local stack, its beat and its Flower.

Guards against: a worker that inherits a developer's environment, and with it secrets that no production worker has.
Rests on: the environment file of its role, and a minimal base.
Controls: WRK-1, DAT-3.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .account import Account, StackFailed
from .pki import Pki
from .process import Process, start

_READY = re.compile(rb"@\S+ ready\.|beat: Starting\.\.\.|flower: Serving")


@dataclass(frozen=True)
class Worker:
    """A worker that was started."""

    process: Process
    _drop: Callable[[Process], None]

    @property
    def pid(self) -> int:
        """The main process's number."""
        return self.process.pid

    @property
    def log(self) -> Path:
        """What it printed."""
        return Path(self.process.log)

    def alive(self) -> bool:
        """Whether the main process runs."""
        return self.process.alive()

    def stop(self) -> None:
        """End it and its children."""
        self.process.stop()
        self._drop(self.process)


def start_worker(
    name: str,
    project: Path,
    arguments: Sequence[str],
    env: Mapping[str, str],
    home: Path,
    log: Path,
    account: Account,
) -> Process:
    """Start a worker, beat or Flower; it is not ready yet."""
    command = [sys.executable, "-m", *arguments]
    return start(name, command, env={**_base(project, home), **env}, cwd=project, log=log, account=account)


def has_schedule(project: Path, app: str, env: Mapping[str, str], home: Path, account: Account) -> bool:
    """Whether the application has something for beat; one that does not start may have, and beat will say why."""
    code = (
        "import sys; from celery.app.utils import find_app; app = find_app(sys.argv[1]); app.loader.init_worker(); "
        "app.finalize(); print(len(app.conf.beat_schedule))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, app],
        env={**_base(project, home), **env},
        cwd=project,
        capture_output=True,
        check=False,
        **account.popen_options(),
    )
    return bool(done.stdout.strip() != b"0")


def find_flower(project: Path) -> str:
    """Return the name of the project's Flower, or nothing if it has none."""
    package = find_package(project)
    return f"{package}.flower" if (project / "src" / package / "flower.py").exists() else ""


def flower_settings(folder: Path, pki: Pki, port: int) -> str:
    """Make Flower's password and TLS certificate, and return what its environment file says of them."""
    server = pki.tls.server("flower", ("127.0.0.1", "localhost"))
    values = {
        "PORT": port,
        "CERTIFICATE": server.certificate,
        "KEY": server.key,
        "PASSWORD_FILE": pki.account.write(folder / "flower.password", secrets.token_urlsafe(32)),
    }
    return "".join(f"SECURE_CELERY_FLOWER_{name}={value}\n" for name, value in values.items())


def _base(project: Path, home: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(project / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def wait_ready(process: Process) -> None:
    """Wait until the worker consumes, beat schedules, or Flower serves."""
    process.wait(lambda: bool(_READY.search(Path(process.log).read_bytes())), 60)


def find_package(project: Path) -> str:
    """Return the name of the project's package, and let it be imported. No file here needs to know it.

    Raises:
        StackFailed: there is not exactly one.
    """
    packages = sorted(path.parent.parent.name for path in project.glob("src/*/hardening/render.py"))
    if len(packages) != 1:
        raise StackFailed(f"{project} is no project of this kind: src holds no one package with a hardening folder")
    if (source := str(project / "src")) not in sys.path:
        sys.path.append(source)
    return packages[0]
