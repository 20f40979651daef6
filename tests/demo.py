"""What ``make demo`` runs: bake the default project and let its own ``make demo`` show what it does."""

from __future__ import annotations

import subprocess
import sys

from .baking import bake_again, workshop


def main() -> int:
    """Return the exit status of the project's demo."""
    with workshop("demo") as folder:
        project = bake_again(folder)
        print(f"Baked {project}", flush=True)
        return subprocess.run(["make", "demo"], cwd=project, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
