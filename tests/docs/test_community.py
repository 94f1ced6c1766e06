"""The files that GitHub reads: they are valid, and say what the package says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.docs.modules import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_a_file_of_github_follows_its_schema(schema, files):
    found = sorted(ROOT.glob(files))
    assert found
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, found)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_citation_is_of_this_release_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_every_file_that_names_an_image_names_that_of_this_release():
    named = {
        (path.relative_to(ROOT).as_posix(), release)
        for folder in ("infra", "docs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and path.suffix in (".yaml", ".md", "")
        for release in re.findall(r"ddpm-pipelines:(\d+\.\d+\.\d+)", path.read_text())
    }
    assert len(named) > 8
    assert {release for _, release in named} == {PROJECT["version"]}, named


def test_the_changelog_has_notes_for_this_release_as_the_workflow_finds_them():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    (step,) = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "CHANGELOG" in step.get("run", "")]
    command = step.partition(" > ")[0]
    environment = {"PATH": os.environ["PATH"], "GITHUB_REF_NAME": f"v{PROJECT['version']}"}
    notes = subprocess.run(command, shell=True, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "### Added" in notes.stdout
    assert "\n## " not in notes.stdout


@pytest.mark.parametrize("name", ["ci", "release"])
def test_a_workflow_runs_targets_that_there_are(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs
    for target in re.findall(r"\bmake (\S+)", "\n".join(runs)):
        assert target in targets
    for script in re.findall(r"^(\.\S+)$", "\n".join(runs), re.MULTILINE):
        assert os.access(ROOT / script, os.X_OK)
