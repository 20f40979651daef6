"""An engine for containers without a registry: Debian's podman, with storage of its own, and a base made of packages.

The base stands for Python's image. It has another version of the same Debian, and Python where Debian has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .baking import TEMPLATE

PACKAGES = (
    *("podman", "buildah", "runc", "netavark", "aardvark-dns", "iptables", "uidmap", "catatonit"),
    *("golang-github-containers-common", "mmdebstrap"),
)
CODENAME = "trixie"
BASE = f"localhost/{CODENAME}:test"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
CONFIGURATION = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
STORAGE = """[storage]
driver = "overlay"
graphroot = "{folder}/root"
runroot = "{folder}/run"
"""
#: As the documentation says: nothing but a folder for what is temporary, and no right beyond an ordinary user's.
HARDENED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m", "--pids-limit", "64", "--memory", "512m"),
)


class Engine:
    """Podman, as root; its images stay in ``build/containers`` for the next run."""

    def __init__(self) -> None:
        assert os.geteuid() == 0, "podman and mmdebstrap run as root in these tests: start them as root on Debian 12"
        if missing := [
            name for name in ("podman", "mmdebstrap", "catatonit", "iptables") if shutil.which(name) is None
        ]:
            print(f"{', '.join(missing)}: not installed; installing {' '.join(PACKAGES)}", flush=True)
            apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run([*apt, "update"], check=True)
            install = [*apt, "install", "--yes", "--no-install-recommends", *PACKAGES]
            subprocess.run(install, env=environment, check=True, stdout=subprocess.DEVNULL)
        self.folder = TEMPLATE / "build" / "containers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ}
        for variable, content in (
            ("CONTAINERS_CONF", CONFIGURATION),
            ("CONTAINERS_STORAGE_CONF", STORAGE.format(folder=self.folder)),
        ):
            file = self.folder / f"{variable.lower()}.toml"
            file.write_text(content, encoding="ascii")
            self.environment[variable] = str(file)

    def __call__(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run podman; what it printed is the failure's message."""
        command = ["podman", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, (
            f"podman {' '.join(command[1:])}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done

    def base(
        self, name: str = BASE, packages: Sequence[str] = ("python3", "python3-venv", "python3-pip", "tzdata")
    ) -> str:
        """Make an image of Debian's packages, from the mirrors that this machine uses, unless it is there."""
        if self("image", "exists", name, check=False).returncode == 0:
            return name
        targets = ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"]
        listed = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
        sites = {
            "security" in codename: site
            for site, _, codename in (line.partition(" ") for line in sorted(listed))
            if "debian" in site
        }
        lines = [f"deb {sites[False]} {CODENAME} main", f"deb {sites[True]} {CODENAME}-security main"]
        archive = self.folder / "base.tar"
        include = ",".join(("ca-certificates", *packages))
        readable = """--customize-hook=chmod -R a+rX "$1/etc" """  # Debian's servers keep theirs to themselves
        command = [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={include}",
            readable,
            CODENAME,
            archive,
            *lines,
        ]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        self("import", archive, name)
        archive.unlink()
        return name

    def build(self, project: Path, name: str) -> str:
        """Build a project's Dockerfile on the base; the machine's certificates let pip reach its index."""
        mount = f"{CERTIFICATES}:{CERTIFICATES}:ro"
        argument = f"BASE_IMAGE={self.base()}"
        self(
            "build",
            "--format",
            "docker",
            "--network",
            "host",
            "--volume",
            mount,
            "--build-arg",
            argument,
            "--tag",
            name,
            project,
        )
        return name


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
