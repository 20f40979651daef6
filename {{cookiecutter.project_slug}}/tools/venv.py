"""Make a virtual environment from hash-locked requirements: python3 tools/venv.py VENV REQUIREMENTS...

Guards against: a dependency that is not, byte for byte, the one that was locked; code that runs because a
package was built; an environment that the unprivileged user of the local stack cannot execute.
Rests on: pip's ``--require-hashes`` and ``--only-binary``. Starts on any Python 3, to say that it is too old.
Controls: SUP-1, WRK-1.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
UNPRIVILEGED = 65534  # nobody, who runs the servers and workers of a local stack that root starts
TOO_OLD, NO_VENV = 3, 4
# Run by each candidate. As root it gives up its rights: a Python under a closed home fails here, not later.
PROBE = """
import os, sys
if sys.version_info[:2] < {oldest}: sys.exit({too_old})
try:
    import ensurepip, venv
except ImportError:
    sys.exit({no_venv})
if os.getuid() == 0:
    os.setgroups([]); os.setgid({uid}); os.setuid({uid})
    os.execv(sys.executable, [sys.executable, "-I", "-c", ""])
""".format(oldest=OLDEST, too_old=TOO_OLD, no_venv=NO_VENV, uid=UNPRIVILEGED)


def candidates():
    """Yield the Pythons worth a try, the one that was asked for first, each file once."""
    names = ["python3"] + ["python3.%d" % minor for minor in range(20, OLDEST[1] - 1, -1)]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    wanted = [os.environ.get("PYTHON"), sys.executable, "/usr/bin/python3"]
    wanted += [os.path.join(folder, name) for name in names for folder in folders]
    seen = set()
    for path in wanted:
        path = shutil.which(path) if path else None
        if path and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield path


def probe(python):
    """Return 0 for a Python that can be used, else the probe's exit status."""
    return subprocess.run([python, "-I", "-c", PROBE], cwd="/", stderr=subprocess.DEVNULL).returncode


def choose():
    """Return a Python that can be used; as root on Debian and Ubuntu install the missing ``python3-venv``."""
    reasons = {}
    for python in candidates():
        reason = probe(python)
        if reason == 0:
            return python
        reasons.setdefault(reason, python)
    if NO_VENV in reasons:
        command = ["apt-get", "install", "--yes", "--no-install-recommends", "python3-venv"]
        if os.getuid() == 0 and shutil.which(command[0]):
            print("+ " + " ".join(command), flush=True)
            if subprocess.run(command).returncode == 0 and probe(reasons[NO_VENV]) == 0:
                return reasons[NO_VENV]
        sys.exit("%s has no venv module: sudo %s" % (reasons[NO_VENV], " ".join(command)))
    if set(reasons) - {TOO_OLD}:
        sys.exit(
            "No Python here can be run by an unprivileged user, which the local stack needs: "
            "sudo apt-get install python3 python3-venv, or make setup PYTHON=/path/to/another/python3"
        )
    sys.exit(
        "Python %d.%d or newer is needed and none was found: "
        "install one, or make setup PYTHON=/path/to/python3" % OLDEST
    )


def state(requirements):
    """Return what decides whether an environment is up to date, as one line."""
    content = b"".join(Path(name).read_bytes() for name in [__file__, *requirements])
    return "%s %s\n" % (hashlib.sha256(content).hexdigest(), Path.cwd())


def main(venv, *requirements):
    """Make the environment unless it is up to date, and put ``src`` on its path if the project has one."""
    stamp = Path(venv, ".ready")
    if stamp.exists() and stamp.read_text() == state(requirements):
        stamp.touch()
        return
    os.umask(0o022)  # root's own umask may hide the environment from the unprivileged user
    python = choose()
    print("Making %s with %s" % (venv, python), flush=True)
    subprocess.run([python, "-m", "venv", "--clear", venv], check=True)
    install = [venv + "/bin/python", "-m", "pip", "install", "--require-hashes", "--only-binary=:all:"]
    for name in requirements:
        install += ["-r", name]
    pip = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if pip.returncode:
        sys.stderr.write(pip.stdout.decode(errors="replace"))
        sys.exit("The locked requirements could not be installed, see above.")
    source = Path("src").resolve()
    if source.is_dir():  # a built or editable install would need a build backend, which no hash covers
        for packages in Path(venv).glob("lib/python3*/site-packages"):
            (packages / "project.pth").write_text("%s\n" % source, encoding="utf-8")
    stamp.write_text(state(requirements))


if __name__ == "__main__":
    main(*sys.argv[1:])
