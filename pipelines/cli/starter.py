"""`ddpm init`: a starter project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import Json, answer_json, terminal


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; it must be empty or not be there")],
    as_json: Json = False,
) -> None:
    """Write a starter project for your own pictures. Example: ddpm init pets"""
    from pipelines.config.starter import write_starter

    written = write_starter(folder)
    for path in written:
        terminal.stage("written", str(path))
    terminal.stage("next", f"put pictures into {folder / 'photos'}, then: cd {folder} && make plan")
    answer_json(as_json, {"folder": str(folder), "files": [str(path) for path in written]})
