"""Pictures as files: a PNG of each, a grid, the film, and a manifest from which they can be drawn again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm.inference import Film
from pipelines.checkpoints.references import Resolved
from pipelines.environment.lineage import code_lineage
from pipelines.evaluation.plots import class_grid, label_grid, side_by_side
from pipelines.evaluation.scoring import digest_of
from pipelines.inference.pictures import Finished, PictureRow, Pictures, encoder_of, picture
from pipelines.inference.request import MANIFEST, SampleRequest
from pipelines.presentation.images import to_png
from pipelines.shards.read import spread_positions

NAME_BYTES = 200
"""Of a class or prompt in a file's name; file systems allow 255 in all."""
FILMED = 8
"""Pictures that a strip of film shows, at most, and the states of each."""
FRAME_MS, LAST_MS = 80, 1500
"""Milliseconds for which an animation shows a frame, and the last one."""
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Written:
    """The files of pictures.

    Attributes:
        files: of the pictures, in order.
        grid: all of them in one picture.
        manifest: what they are and how they were made.
        others: given images, masks, film and animation.
    """

    files: list[Path]
    grid: Path
    manifest: Path
    others: list[Path]

    def to_plain(self) -> dict[str, Any]:
        """Return the paths as JSON types, for `--json`."""
        return {
            "files": [str(path) for path in (*self.files, self.grid)],
            "grid": str(self.grid),
            "manifest": str(self.manifest),
            "others": [str(path) for path in self.others],
        }


@dataclass(frozen=True)
class PictureSource:
    """Who drew pictures.

    Attributes:
        reference: MODEL as it was named.
        digest: of the weights, under which they are known where they come from.
        version: address of the registered version; None where there is none.
        lineage: of the weights.
        versions: of code, packages and device.
    """

    reference: str
    digest: str
    version: str | None
    lineage: Mapping[str, Any]
    versions: Mapping[str, Any]

    @classmethod
    def of(cls, resolved: Resolved) -> PictureSource:
        """Return what there is to say of a model that draws in this process."""
        device = next(resolved.model.network.parameters()).device
        version = resolved.version
        recorded = None if version is None else version.tags.get("model_digest")
        return cls(
            resolved.reference,
            recorded or digest_of(resolved),
            None if version is None else version.uri,
            resolved.model.spec.lineage,
            {
                **code_lineage(),
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
        )


def write_samples(resolved: Resolved, out: Path, count: int, prompts: Sequence[str] | None = None) -> Path:
    """Write `count` samples of each prompt, or else of each class of a model, with grid and manifest.

    Returns:
        The path of the grid.
    """
    request = SampleRequest.of(count=count, prompts=prompts or None)
    encode, finished = encoder_of(resolved, request), written_as_drawn(out)
    pictures = picture(request, resolved.model, encode=encode, finished=finished)
    return write(pictures, out, PictureSource.of(resolved), as_drawn=True).grid


def written_as_drawn(out: Path) -> Finished:
    """Return a callback that writes each batch of pictures into a folder as soon as it is drawn, for `picture`.

    Whoever draws a thousand sees the first of them soon, and keeps those that there are when it is interrupted. The
    manifest says that all are there: `write` makes it, and the grid.
    """

    def write_batch(first: int, rows: Sequence[PictureRow], pixels: NDArray[np.uint8]) -> None:
        if first == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
        for path, image in zip(_paths(out, rows, first), pixels, strict=True):
            path.write_bytes(to_png(image))

    return write_batch


def write(pictures: Pictures, out: Path, source: PictureSource, *, as_drawn: bool = False) -> Written:
    """Write pictures into a folder, which is made if it is missing.

    Args:
        out: files of the same names in it are replaced; `manifest.json` is written last.
        source: who drew them.
        as_drawn: whether `written_as_drawn` has written each of them there.
    """
    if not as_drawn:
        written_as_drawn(out)(0, pictures.rows, pictures.pixels)
    files = _paths(out, pictures.rows)
    grid = out / "grid.png"
    grid.write_bytes(to_png(grid_of(pictures)))
    inputs = _write_inputs(pictures, out)
    others = [path for paths in inputs.values() for path in paths]
    if pictures.film is not None:
        others += _write_film(pictures, pictures.film, out)
    if _interpolates(pictures):
        others.append(out / "interpolation.webp")
        animate(others[-1], _rows_as_frames(pictures))
    manifest = out / MANIFEST
    manifest.write_text(json.dumps(_manifest(pictures, source, files, inputs, out), indent=1) + "\n")
    return Written(files, grid, manifest, others)


def file_name(name: str) -> str:
    """Return the name of a class as part of a file's name: what file systems refuse is written as %HH, as in URLs."""
    escaped = re.sub(r'[%/\\:*?"<>|\x00-\x1f\x7f]', lambda found: f"%{ord(found[0]):02X}", name)
    return escaped.encode()[:NAME_BYTES].decode(errors="ignore")


def animate(path: Path, frames: list[NDArray[np.uint8]]) -> None:
    """Write frames, uint8 [H, W, 3], as a lossless WebP animation that repeats for ever and rests at its last frame."""
    images = [Image.fromarray(frame) for frame in frames]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True)


def _paths(out: Path, rows: Sequence[PictureRow], first: int = 0) -> list[Path]:
    """Return the files of pictures, of which the first has a number."""
    return [out / _name(i, row) for i, row in enumerate(rows, first)]


def _name(number: int, row: PictureRow) -> str:
    named = row.label if row.label is not None else row.prompt
    return f"{number:05d}" + (f"-{file_name(named)}" if named else "") + ".png"


def grid_of(pictures: Pictures) -> NDArray[np.uint8]:
    """Return all pictures in a grid, uint8 [H, W, 3]; with given images, each picture is shown beside its own.

    An interpolation is a line from one seed to the other; any other grid is about as wide as high.
    """
    if pictures.originals is None:
        pixels = pictures.pixels
        if _interpolates(pictures):  # a line for each column, from one seed to the other
            turned = pixels.reshape(-1, pictures.columns, *pixels.shape[1:]).swapaxes(0, 1)
            return label_grid(turned.reshape(pixels.shape), turned.shape[1])
        return class_grid(pixels, pictures.columns, _column_names(pictures))
    lines: list[NDArray[np.uint8]] = []
    for row, result in zip(pictures.rows, pictures.pixels, strict=True):
        assert row.image is not None
        original = pictures.originals[row.image]
        if pictures.hidden is None:
            lines += [original, result]
        else:
            hidden = pictures.hidden[row.image][..., None]
            lines += [np.where(hidden, np.uint8(128), original), result, original]
    names = ("given", "result") if pictures.hidden is None else ("known", "result", "given")
    beside = side_by_side(len(pictures.rows), len(names))
    return label_grid(np.stack(lines), beside * len(names), beside * names)


def _interpolates(pictures: Pictures) -> bool:
    return isinstance(pictures.request, SampleRequest) and pictures.request.interpolate is not None


def _column_names(pictures: Pictures) -> tuple[str, ...]:
    first = pictures.rows[: pictures.columns]
    names = [row.label if row.label is not None else row.prompt for row in first]
    return tuple(name or "" for name in names) if any(names) else ()


def _write_inputs(pictures: Pictures, out: Path) -> dict[str, list[Path]]:
    """Write given images and masks at the model's size; return their paths by the fields of the request."""
    written: dict[str, list[Path]] = {}
    for field, folder, images in (
        ("images", "original", pictures.originals),
        ("masks", "mask", None if pictures.hidden is None else pictures.hidden[..., None] * np.uint8(255)),
    ):
        if images is not None:
            (out / folder).mkdir(exist_ok=True)
            written[field] = [out / folder / f"{i:05d}.png" for i in range(len(images))]
            for path, image in zip(written[field], images, strict=True):
                path.write_bytes(to_png(image))
    return written


def _write_film(pictures: Pictures, film: Film, out: Path) -> list[Path]:
    """Write a strip, with the first pictures' states from left to right, and an animation of all pictures.

    In both, x_t is above (strip) or left of (animation) the x_0 that the model predicts from it.
    """
    paths = [out / "film.png", out / "film.webp"]
    paths[0].write_bytes(to_png(film_strip(film)))
    frames = []
    for x_t, x0 in zip(film.x_t.numpy(), film.x0.numpy(), strict=True):
        halves = [class_grid(images, pictures.columns) for images in (x_t, x0)]
        frames.append(np.concatenate(halves, axis=1))
    animate(paths[1], frames)
    return paths


def film_strip(film: Film) -> NDArray[np.uint8]:
    """Return the first pictures of a film, by time from left to right: x_t above the x_0 that is predicted from it.

    Returns:
        uint8 [height, width, 3].
    """
    times = spread_positions(len(film.t), FILMED)
    shown = min(film.x_t.shape[1], FILMED)
    lines = [states[times, i].numpy() for i in range(shown) for states in (film.x_t, film.x0)]
    return label_grid(np.concatenate(lines), len(times), tuple(f"t={film.t[i]:.0f}" for i in times))


def _rows_as_frames(pictures: Pictures) -> list[NDArray[np.uint8]]:
    """Return the rows of an interpolation as frames, there and back."""
    columns, count = pictures.columns, len(pictures.pixels)
    rows = [label_grid(pictures.pixels[i : i + columns], columns) for i in range(0, count, columns)]
    return rows + rows[-2:0:-1]


def _manifest(
    pictures: Pictures, source: PictureSource, files: list[Path], inputs: dict[str, list[Path]], out: Path
) -> dict[str, Any]:
    """Return what was drawn, by which model and which code."""
    request = pictures.request.model_dump(mode="json")
    request |= {field: [str(path.relative_to(out)) for path in paths] for field, paths in inputs.items()}
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": {name: getattr(source, name) for name in ("reference", "digest", "version", "lineage")},
        "request": {"task": pictures.request.task, **request},
        "pictures": [
            {"file": path.name, **{k: v for k, v in asdict(row).items() if v is not None}}
            for path, row in zip(files, pictures.rows, strict=True)
        ],
        "versions": dict(source.versions),
    }
