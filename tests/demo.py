"""What ``make demo`` runs: bake the default project and let its own ``make demo`` show what it does."""

from __future__ import annotations

import shutil
import subprocess
import sys

from .baking import TEMPLATE, bake_again, workshop


def main() -> int:
    """Return the exit status of the project's demo."""
    with workshop("demo") as folder:
        project = bake_again(folder)
        print(f"Baked {project}", flush=True)
        status = subprocess.run(["make", "--no-print-directory", "demo"], cwd=project, check=False).returncode
        if (project / "reports").is_dir():  # the project's folder may be temporary
            shutil.copytree(project / "reports", TEMPLATE / "reports", dirs_exist_ok=True)
        return status


if __name__ == "__main__":
    sys.exit(main())
