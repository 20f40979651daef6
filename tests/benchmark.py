"""What ``make bench`` runs: bake a project, put the benchmarks beside it and measure there."""

from __future__ import annotations

import shutil
import subprocess
import sys

from .baking import TEMPLATE, bake_again, workshop


def main(arguments: list[str]) -> int:
    """Return the exit status of the benchmarks; the reports are copied to the template."""
    with workshop("bench") as folder:
        project = bake_again(folder)
        shutil.copytree(TEMPLATE / "benchmarks", project / "benchmarks")
        subprocess.run(["make", "--no-print-directory", "setup"], cwd=project, check=True)
        command = [".venv/bin/python", "-m", "benchmarks", *arguments]
        status = subprocess.run(command, cwd=project, check=False).returncode
        if (project / "reports").is_dir():
            shutil.copytree(project / "reports", TEMPLATE / "reports", dirs_exist_ok=True)
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
