"""Draw images from a model and write them as PNG files and a grid, for `ddpm sample`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

from ddpm.generate import to_uint8
from ddpm.model import Model
from pipelines.checkpoints import ModelError
from pipelines.config import suggest
from pipelines.evaluation.plots import label_grid

NAME_BYTES = 200
"""Of a class in a file's name; file systems allow 255 in all."""


def write_samples(
    model: Model,
    out: Path,
    *,
    labels: str | None = None,
    count: int = 1,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Path]:
    """Write `count` images per label as PNGs, and `grid.png` with one column per label.

    Args:
        labels: class names or indices, separated by commas; None for every class.
        count: images per label, or in total for a model without classes.
        guidance: guidance scale; None for the model's own.
        steps: steps of the sampler; None for the model's own.
        seed: of the noise.
        batch_size: images to draw at a time; the images do not depend on it.

    Returns:
        The paths of the files, that of the grid last.

    Raises:
        ModelError: the model has no such label, or its schedule has fewer steps.
    """
    settings = model.spec.sampling
    if guidance is not None:
        settings = settings.with_fields(scale=guidance)
    if steps is not None:
        if steps > model.schedule.num_steps:
            raise ModelError(f"steps must be in 1..{model.schedule.num_steps} for this model, got {steps}")
        settings = settings.with_fields(steps=steps)
    chosen = parse_labels(labels, model.spec.classes)
    columns = len(chosen) or count
    class_ids = torch.tensor(chosen * count) if chosen else None
    device = next(model.network.parameters()).device
    images = model.generate(
        None if class_ids is None else class_ids.to(device),
        seed=seed,
        sampling=settings,
        image_ids=torch.arange(len(chosen) * count or count, device=device),
        batch_size=batch_size,
    )
    pixels = to_uint8(images).cpu().numpy()
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, image in enumerate(pixels):
        name = f"{i:05d}" + (f"-{file_name(model.spec.classes[chosen[i % columns]])}" if chosen else "")
        files.append(out / f"{name}.png")
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(files[-1])
    grid = label_grid(pixels, columns, tuple(model.spec.classes[c] for c in chosen))
    files.append(out / "grid.png")
    Image.fromarray(grid).save(files[-1])
    return files


def file_name(class_name: str) -> str:
    """Return the name of a class as part of a file's name: what file systems refuse is written as %HH, as in URLs."""
    escaped = re.sub(r'[%/\\:*?"<>|\x00-\x1f\x7f]', lambda found: f"%{ord(found[0]):02X}", class_name)
    return escaped.encode()[:NAME_BYTES].decode(errors="ignore")


def parse_labels(labels: str | None, classes: tuple[str, ...]) -> list[int]:
    """Return class indices from names or indices separated by commas; every class for None.

    Raises:
        ModelError: a label is neither the name nor the index of a class, or the model has no classes.
    """
    if not classes:
        if labels is not None:
            raise ModelError("this model has no classes: leave --labels out")
        return []
    if labels is None:
        return list(range(len(classes)))
    if labels in classes:  # its name may have a comma in it
        return [classes.index(labels)]
    chosen = []
    for word in (part.strip() for part in labels.split(",")):
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            chosen.append(int(word))
        else:
            shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
            raise ModelError(f"no class {word!r}; the model has: {shown}.{suggest(word, classes)}")
    return chosen
