"""The files of a folder and their digests, which a signature covers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def differences(recorded: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Return descriptions, file by file, of how digests by path differ from recorded ones."""
    other = [f"{name} is another" for name in sorted(recorded.keys() & there.keys()) if recorded[name] != there[name]]
    missing = [f"{name} is missing" for name in sorted(recorded.keys() - there.keys())]
    return other + missing + [f"{name} is new" for name in sorted(there.keys() - recorded.keys())]


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it, in order; a link is one, wherever it leads."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; empty for a link, which is not content of the folder."""
    if path.is_symlink():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
