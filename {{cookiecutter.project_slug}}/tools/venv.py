"""Make a virtual environment from hash-locked requirements: python3 tools/venv.py VENV REQUIREMENTS...

Guards against: a dependency that is not, byte for byte, the one that was locked; code that runs because a package was
built; and an environment that the unprivileged user of the local stack cannot execute.
Rests on: pip's ``--require-hashes`` and ``--only-binary``. Starts on any Python 3 to be able to say that it is too old.
Controls: SUP-1, WRK-1.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
UNPRIVILEGED = 65534  # nobody, who runs the servers and workers of a local stack that root starts
# Run by each candidate. As root it gives up its rights first: a Python under a closed home must fail here, not later.
PROBE = """
import os, sys
if sys.version_info[:2] < {oldest}: sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
if os.getuid() == 0:
    os.setgroups([]); os.setgid({uid}); os.setuid({uid})
    os.execv(sys.executable, [sys.executable, "-I", "-c", ""])
""".format(oldest=OLDEST, uid=UNPRIVILEGED)
TOO_OLD, NO_VENV = 3, 4


def candidates():
    """Yield the Pythons worth a try, the one that was asked for first, without links to the same file twice."""
    names = ["python3"] + ["python3.%d" % minor for minor in range(20, OLDEST[1] - 1, -1)]
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = [os.environ.get("PYTHON", ""), sys.executable, "/usr/bin/python3"]
    found += [shutil.which(name, path=folder) or "" for name in names for folder in folders]
    seen = set()
    for path in found:
        path = shutil.which(path) if path else None
        if path and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield path


def probe(python):
    """Return why this Python cannot be used: 0 for no reason, else an exit status of the probe."""
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
        if os.getuid() == 0 and shutil.which("apt-get"):
            command = ["apt-get", "install", "-y", "--no-install-recommends", "python3-venv"]
            print("+ " + " ".join(command), flush=True)
            if subprocess.run(command).returncode == 0 and probe(reasons[NO_VENV]) == 0:
                return reasons[NO_VENV]
        sys.exit("%s has no venv module; install it: sudo apt-get install python3-venv" % reasons[NO_VENV])
    if set(reasons) - {TOO_OLD}:
        sys.exit(
            "No Python here can be run by an unprivileged user, as the local stack needs; install one outside "
            "of root's home: apt-get install python3 python3-venv"
        )
    sys.exit(
        "Python %d.%d or newer is needed and none was found; install one, or name it: make setup PYTHON=/path/to/python3"
        % OLDEST
    )


def main(venv, *requirements):
    """Make the environment anew, install what is locked, and put ``src`` on its path if the project has one."""
    os.umask(0o022)  # root's own umask may hide the environment from the unprivileged user
    python = choose()
    print("Making %s with %s" % (venv, python), flush=True)
    subprocess.run([python, "-m", "venv", "--clear", venv], check=True)
    install = [venv + "/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--require-hashes", "--only-binary=:all:"]
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


if __name__ == "__main__":
    main(*sys.argv[1:])
