"""A starter project for a user's own pictures: the files in `project/`, with the name of the project filled in."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.presentation.errors import ConfigError

PICTURES = "photos"
"""Folder of the project that the pictures go into."""

_PROJECT = Path(__file__).parent / "project"
_NAMES = {"gitignore": ".gitignore"}  # a dot file in the package would hide files from its own repository


def write_starter(folder: Path) -> list[Path]:
    """Write a starter project and return its files.

    Args:
        folder: where to; it is made, with its parents, where it does not exist.

    Raises:
        ConfigError: the folder is not empty, is a file, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise ConfigError(f"{folder} {what}: name a new or an empty folder, such as `ddpm init my-pictures`")
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        written = []
        for source in sorted(_PROJECT.iterdir()):
            path = folder / _NAMES.get(source.name, source.name)
            path.write_text(source.read_text().replace("@NAME@", project_name(folder)))
            written.append(path)
    except OSError as error:
        raise ConfigError(f"cannot write a project to {folder}: {error.strerror}") from error
    return written


def project_name(folder: Path) -> str:
    """Return the name of a project's runs and model: that of its folder, in letters that names may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "pictures"
