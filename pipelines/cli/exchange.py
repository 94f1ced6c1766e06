"""`ddpm export` and `import`: models in the format of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import (
    MODEL,
    Json,
    Overrides,
    answer_json,
    class_names,
    connect_for_model,
    image_size_option,
    new_folder,
    terminal,
)


def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    to: Annotated[Path, typer.Option("--to", callback=new_folder, help="Folder to write")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write a model for diffusers' DDIMPipeline. Example: ddpm export models:/digits@champion --to digits-diffusers"""
    config = connect_for_model(model, overrides)

    from ddpm.diffusers import export_diffusers
    from pipelines.checkpoints import ModelError, references

    resolved = references.open_model(model, config)
    try:
        export_diffusers(resolved.model, to)
    except ValueError as error:
        raise ModelError(f"{model} cannot be exported to diffusers: {error}") from error
    terminal.stage(
        "export", f"{to} holds model_index.json, unet and scheduler, and model.json for fields that diffusers lacks"
    )
    answer_json(as_json, {"folder": str(to)})


def import_model(
    folder: Annotated[Path, typer.Argument(help="Folder with a UNet2DModel, as diffusers' save_pretrained writes it")],
    to: Annotated[Path, typer.Option("--to", callback=new_folder, help="Model folder to write")],
    last_row: Annotated[
        str | None,
        typer.Option(help="Meaning of the last row of the class embedding: null (the null condition) or class"),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes, comma-separated")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Image size, such as 64 or 48x64 (height x width), if the folder lacks it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a diffusers folder into a model folder. Example: ddpm import ddpm-cifar10-32 --to cifar10"""
    from ddpm.diffusers import import_diffusers
    from ddpm.image_size import in_words
    from ddpm.model import save_model
    from pipelines.checkpoints import ModelError

    names, size = class_names(classes), image_size_option(image_size)
    try:
        found = import_diffusers(
            folder,
            last_row=last_row,  # type: ignore[arg-type]  # checked there
            classes=names,
            image_size=size,
        )
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error
    save_model(to, found.spec, found.network.state_dict())
    size, kinds = found.spec.image_size, len(found.spec.classes)
    terminal.stage("import", f"{to}: {in_words(size)} pixels, {kinds} classes; try: ddpm sample {to} --out samples")
    answer_json(as_json, {"folder": str(to), "classes": list(found.spec.classes), "image_size": size})
