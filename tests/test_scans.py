"""What the pipelines scan and which images they watch: as they say it, run over baked projects.

Controls: IMG-2, SUP-7.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .baking import PROJECT, bake
from .test_ci import jobs, read, runs_for_pull_requests, steps
from .test_kubernetes import ACCEPTED


def test_what_trivy_finds_and_can_be_mended_stops_a_pull_request_and_a_release_lists_what_it_holds() -> None:
    security = PROJECT / ".github/workflows/security.yml"
    job = jobs(security)["trivy"]
    assert runs_for_pull_requests(job)
    scans = [step["with"] for step in job["steps"] if "trivy-action" in step.get("uses", "")]
    assert [scan["scan-type"] for scan in scans] == ["config", "config", "image"]
    for scan in scans:
        assert scan["exit-code"] == "1"
        assert {"HIGH", "CRITICAL"} <= set(scan["severity"].split(","))
    (build,) = [step["run"] for step in job["steps"] if "run" in step]
    assert f"--tag {scans[-1]['image-ref']} --file Dockerfile ." in build
    assert "schedule" in read(security)[True], "advisories appear without a push"
    (built,) = [
        step["with"] for step in steps(security.with_name("release.yml")) if "build-push" in step.get("uses", "")
    ]
    assert built["sbom"] is True


#: What each input of the action is to Trivy.
INPUTS = {name: f"--{name}" for name in ("severity", "exit-code", "skip-dirs")} | {"trivyignores": "--ignorefile"}


def configuration_scans(project: Path, trivy: Path) -> tuple[int, str]:
    """Do what the job does to configuration: its scans, and its commands with a Docker that does nothing."""
    docker = project.parent / "programs" / "docker"
    docker.parent.mkdir(exist_ok=True)
    docker.write_text("#!/bin/sh\n", encoding="ascii")
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
    status, said = 0, ""
    for step in jobs(project / ".github/workflows/security.yml")["trivy"]["steps"]:
        inputs = dict(step.get("with", {}))
        if "run" in step:
            command = ["bash", "-e", "-c", step["run"]]
        elif inputs.pop("scan-type", "") == "config":
            place = inputs.pop("scan-ref")
            assert inputs.pop("cache") == "false"
            options = [part for name, value in inputs.items() for part in (INPUTS[name], value)]
            command = [str(trivy), "config", "--quiet", "--skip-check-update", *options, place]
        else:
            continue
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        status, said = max(status, done.returncode), said + done.stdout + done.stderr
    return status, said


SCANNED: dict[str, dict[str, str]] = {"default": {}, "redis": {"broker": "redis"}, "bare": {"kubernetes": "no"}}


@pytest.mark.slow
@pytest.mark.parametrize("answers", SCANNED)
def test_the_configuration_scans_of_the_pipeline_find_nothing(
    answers: str, template: Path, kubernetes_tools: Path, tmp_path: Path
) -> None:
    project = bake(tmp_path / "out", template, SCANNED[answers])
    status, said = configuration_scans(project, kubernetes_tools / "trivy")
    assert status == 0, said
    assert "Dockerfile" in said
    assert ("prod.yaml" in said) == (answers != "bare")


WEAKENED = {
    "DS-0002": ("Dockerfile", "USER 10001:10001\n", "USER root\n"),
    "KSV-0014": (
        "deploy/kubernetes/base/workloads.yaml",
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
    ),
    "KSV-0013": ("deploy/kubernetes/overlays/prod/kustomization.yaml", "    digest: sha256:" + "0" * 64 + "\n", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("finding", WEAKENED)
def test_the_configuration_scans_of_the_pipeline_find_what_is_planted(
    finding: str, template: Path, kubernetes_tools: Path, tmp_path: Path
) -> None:
    project = bake(tmp_path / "out", template)
    name, old, new = WEAKENED[finding]
    text = (project / name).read_text(encoding="utf-8")
    assert old in text
    (project / name).write_text(text.replace(old, new), encoding="utf-8")
    status, said = configuration_scans(project, kubernetes_tools / "trivy")
    assert status == 1
    assert finding in said


def test_what_the_pipeline_passes_over_has_a_reason_here_too() -> None:
    text = (PROJECT / ".github/workflows/security.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"[A-Z]+-\d{4}", text)) == {"KSV-0125"} < ACCEPTED.keys()


#: How an image is named here, wherever it is.
PIN = re.compile(r"([a-z0-9./-]+:[A-Za-z0-9._-]+)@(sha256:[0-9a-f]{64})")
REGISTRY = """#!/bin/sh
test "$1 $2 $3 $5 $6" = "buildx imagetools inspect --format {{.Manifest.Digest}}" || exit 9
echo "$4" >>"$0.asked"
grep "^$4 " "$0.newest" | cut -d " " -f 2 | grep .
"""


def pinned(project: Path, *folders: str) -> set[tuple[str, str]]:
    """Give the images that are named below folders of a project, each with its digest."""
    files = [
        path for folder in folders for path in [project / folder, *(project / folder).rglob("*")] if path.is_file()
    ]
    return {pin for path in files for pin in PIN.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("answers", [{}, {"broker": "redis"}, {"kubernetes": "no"}], ids=["default", "redis", "bare"])
def test_each_week_a_job_says_which_image_is_old_that_dependabot_does_not_follow(
    answers: dict[str, str], template: Path, tmp_path: Path
) -> None:
    """It follows no `ARG`, no job's container, and in manifests neither a YAML anchor nor `docker.io/`."""
    project = bake(tmp_path / "out", template, answers)
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    docker = tmp_path / "programs" / "docker"
    docker.parent.mkdir()
    docker.write_text(REGISTRY, encoding="ascii")
    docker.chmod(0o755)
    job = jobs(project / ".github/workflows/security.yml")["images"]
    assert job["if"] == "github.event_name == 'schedule'"
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    pins = pinned(project, "Dockerfile", ".github", "deploy")
    assert len(pins) == (2 if "kubernetes" in answers else 3 if "broker" in answers else 4)

    def look(newest: dict[str, str]) -> tuple[int, str]:
        docker.with_name("docker.newest").write_text("".join(f"{name} {digest}\n" for name, digest in newest.items()))
        environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
        options: dict[str, Any] = {"cwd": project, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-e", "-c", command], check=False, **options)
        return done.returncode, done.stdout

    assert look(dict(pins)) == (0, "")
    assert sorted(docker.with_name("docker.asked").read_text().split()) == sorted(name for name, _ in pins)
    for name, digest in pins:
        status, said = look({**dict(pins), name: "sha256:" + "1" * 64})
        assert status == 1
        assert said.startswith("::error::")
        assert all(part in said for part in (name, digest, "sha256:" + "1" * 64))
        assert look({other: known for other, known in pins if other != name})[0] != 0, "nobody answers"
    (project / "Dockerfile").write_text("FROM scratch\n", encoding="ascii")
    subprocess.run(["git", "rm", "--quiet", "-r", "--cached", ".github", "deploy"], cwd=project, check=True)
    assert look(dict(pins))[0] != 0, "nothing to look at proves nothing"


def test_dependabot_is_told_of_no_folder_that_is_not_there_or_holds_nothing_for_it(default: Path) -> None:
    entries = read(default / ".github/dependabot.yml")["updates"]
    watched = {entry["package-ecosystem"]: entry["directory"] for entry in entries}
    assert watched.keys() == {"pip", "github-actions", "docker-compose"}, "a FROM with an ARG is nothing to `docker`"
    assert list(default.glob(f".{watched['pip']}/*.txt"))
    assert pinned(default, "deploy/kubernetes") <= pinned(default, "compose.yaml"), "what it updates there is used here"


@pytest.mark.parametrize("answers", [{}, {"broker": "redis"}], ids=["default", "redis"])
def test_renovate_sees_every_image_of_the_manifests(answers: dict[str, str], template: Path, tmp_path: Path) -> None:
    """Its own manager for them sees no image behind a YAML anchor. The Dockerfile's `ARG` it follows by itself."""
    project = bake(tmp_path / "out", template, {"ci": "gitlab", **answers})
    (manager,) = json.loads((project / "renovate.json").read_text(encoding="utf-8"))["customManagers"]
    assert (manager["customType"], manager["datasourceTemplate"]) == ("regex", "docker")
    (files,), (image,) = (
        [re.compile(text.replace("(?<", "(?P<")) for text in manager[key]]
        for key in ("managerFilePatterns", "matchStrings")
    )
    chosen = re.compile(files.pattern.strip("/"))
    found = set()
    for path in project.rglob("*"):
        if chosen.search(str(path.relative_to(project))):
            for match in image.finditer(path.read_text(encoding="utf-8")):
                found.add((f"{match['depName']}:{match['currentValue']}", match["currentDigest"]))
    assert found == pinned(project, "deploy/kubernetes")
    assert found
