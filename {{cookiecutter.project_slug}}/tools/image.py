"""Assembles the root of the image: Python, the libraries it loads, the application, and nothing else.

Guards against: a shell, an installer, a compiler or a setuid program for whoever gets code to run in a worker, and code
that the worker's user could change. What nobody needs is not removed here: it is never put in.
Rests on: a build stage of Debian, whose `ldd` names the libraries, and whose `dpkg` says which package a file is of.
Scanners find those packages, and no others, in the package database.
Controls: IMG-1.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

#: Of the standard library: what installs, compiles, draws or tests.
_LEFT_OUT = shutil.ignore_patterns(
    *("__pycache__", "*.a", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "tkinter", "turtledemo", "venv"),
)
#: What Python reads besides: certificates, names, time zones, and for scanners the name of the system.
_DATA = (
    *("/etc/debian_version", "/etc/nsswitch.conf", "/etc/os-release", "/etc/ssl/certs/ca-certificates.crt"),
    "/usr/share/zoneinfo",
)
Ignore = Callable[[str, list[str]], set[str]]
_USERS = {
    "passwd": "root:x:0:0::/:\nservice:x:10001:10001::/tmp:\n",  # pragma: allowlist secret
    "group": "root:x:0:\nservice:x:10001:\n",
}


class Root:
    """The folder that becomes the image's root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def inside(self, path: Path) -> Path:
        """Where a path of this system is in the image."""
        return self.folder / path.relative_to("/")

    def add(self, path: Path, ignore: Ignore | None = None) -> None:
        """Copy a file or folder to the same place, and each link on the way to it as a link."""
        place = Path("/")
        for part in path.parts[1:]:
            place /= part
            if place.is_symlink():
                target = self.inside(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_symlink():
                    target.symlink_to(os.readlink(place))
                rest = path.relative_to(place)
                self.add(Path(os.path.normpath(place.parent / os.readlink(place))) / rest, ignore)
                return
        target = self.inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target)

    def add_libraries(self, *programs: Path) -> None:
        """Copy what these programs and libraries load, as the dynamic linker finds it."""
        done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
        if "not found" in done.stdout:
            raise SystemExit(f"a library is missing:\n{done.stdout}")
        for library in sorted(set(re.findall(r"(/\S+) \(0x", done.stdout))):
            if not self.inside(Path(library)).exists():
                self.add(Path(library))

    def add_packages(self) -> None:
        """Write the package database of what was copied, with each package's licence."""
        copies = (path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [Path("/", path.relative_to(self.folder)) for path in copies]
        done = subprocess.run(["dpkg", "--search", *files], capture_output=True, text=True, check=False)
        owners = {name for line in done.stdout.splitlines() for name in line.rpartition(": ")[0].split(", ")}
        wanted = {name.partition(":")[0] for name in owners if not name.startswith("diversion by ")}
        stanzas = Path("/var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n")
        kept = [stanza for stanza in stanzas if stanza.strip().partition("\n")[0].removeprefix("Package: ") in wanted]
        status = self.inside(Path("/var/lib/dpkg/status"))
        status.parent.mkdir(parents=True)
        status.write_text("\n\n".join(kept) + "\n", encoding="utf-8")
        for name in sorted(wanted):
            if (licence := Path("/usr/share/doc", name, "copyright")).exists():
                self.add(licence)

    def close(self) -> None:
        """Compile everything, and let nobody but root change it."""
        folder = str(self.folder)
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # read-only: nothing can be newer
        compileall.compile_dir(folder, maxlevels=99, quiet=2, stripdir=folder, workers=0, invalidation_mode=mode)
        for path in (self.folder, *self.folder.rglob("*")):
            if not path.is_symlink():
                program = path.is_dir() or path.name.startswith(("ld-", "python3."))
                path.chmod(0o755 if program else 0o644)  # no setuid, whatever it was
        (self.folder / "tmp").mkdir()
        (self.folder / "tmp").chmod(0o1777)


def main() -> None:
    """Assemble the root of an application's folder."""
    app, root = Path(sys.argv[1]), Root(Path(sys.argv[2]))
    standard = Path(sysconfig.get_path("stdlib"))
    shutil.rmtree(app / "lib/bin")  # how packages would like to be started
    root.add(standard, _LEFT_OUT)
    for path in (Path(sys.executable), *map(Path, _DATA)):
        root.add(path)
    root.add(app, shutil.ignore_patterns("*.key"))  # of libraries' own tests; a scanner takes them for ours
    # Python's threads load the last one when they end, by name.
    modules = [path for folder in (standard, app) for path in folder.rglob("*.so*") if root.inside(path).is_file()]
    root.add_libraries(Path(sys.executable), *modules, *Path("/usr/lib").glob("*/libgcc_s.so.1"))
    root.add(next(Path("/usr/lib").glob("*/libgcc_s.so.1")))
    for name, lines in _USERS.items():
        (root.folder / "etc" / name).write_text(lines, encoding="ascii")
    root.add_packages()
    root.close()


if __name__ == "__main__":
    main()
