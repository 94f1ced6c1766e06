"""Which code trains a model, recorded in every checkpoint and model version."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def code_lineage() -> dict[str, Any]:
    """Return the installed release and, in a git checkout, the commit that runs.

    Returns:
        `code_version`, the release of the package, and `git_commit`, which ends in "-dirty" where tracked files were
        changed after the commit and is None outside a checkout.
    """
    commit = _git("rev-parse", "HEAD")
    dirty = commit and _git("status", "--porcelain", "--untracked-files=no")
    return {"code_version": version("ddpm-pipelines"), "git_commit": f"{commit}-dirty" if dirty else commit or None}


def installed_versions() -> dict[str, str | None]:
    """Return the version of everything that decides how this runs, by name; None for what is not there.

    Nothing of it is imported: the versions come from the metadata of the installed packages.
    """
    lineage = code_lineage()
    found = {"ddpm": lineage["code_version"], "commit": lineage["git_commit"], "python": platform.python_version()}
    for package in ("torch", "ray", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git(*arguments: str) -> str:
    """Return the output of git for the folder of this module; empty if it is not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
