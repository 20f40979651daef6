"""What ``make bench`` runs: bake a project, put the benchmarks beside it, measure there, and show it in the README."""

from __future__ import annotations

import shutil
import subprocess
import sys

from .attack_table import show
from .baking import TEMPLATE, bake_again, workshop

CHART = TEMPLATE / "docs" / "benchmark.svg"


def main(arguments: list[str]) -> int:
    """Return the exit status of the benchmarks; what they report is copied to the template."""
    with workshop("bench") as folder:
        project = bake_again(folder)
        shutil.copytree(TEMPLATE / "benchmarks", project / "benchmarks")
        subprocess.run(["make", "--no-print-directory", "setup"], cwd=project, check=True)
        command = [".venv/bin/python", "-m", "benchmarks", *arguments]
        done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, end="")
        if done.returncode == 0:
            shutil.copytree(project / "reports", TEMPLATE / "reports", dirs_exist_ok=True)
            shutil.copy(project / "reports" / CHART.name, CHART)
            picture = f"![CPU for each message, beside stock Celery](docs/{CHART.name})"
            show("benchmark", f"{picture}\n\n{done.stdout.strip()}")
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
