"""Benchmark of finding changed copies of a picture by its fingerprint, as `ddpm seen` does.

    python -m benchmarks.near_duplicates [--quick] [--json]

Tiles of 64 pixels are cut from three photographs that scikit-learn and matplotlib ship, without overlap. Half of them,
drawn at random, become a dataset of 32 pixels; of the other half each is looked for as a stranger.

- `found`: change -> share of the tiles of the dataset that are found after it, with a 95 % interval (Wilson).
- `false_alarms`: share of the strangers, unchanged, for which any sample is found, with its interval.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from benchmarks.results import Size, commit, make_parser, publish
from pipelines.evaluation.prompts import wilson
from pipelines.provenance.find import Query, find
from pipelines.shards.audit.recorded import IN_THREADS
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage

TILE, SIZE = 64, 32
Change = Callable[[Image.Image], bytes]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    options = make_parser("near_duplicates", __doc__, quick="a tenth of the tiles").parse_args(arguments)
    tiles = all_tiles()
    random.Random(0).shuffle(tiles)
    tiles = tiles[: options.size.of(len(tiles), len(tiles) // 10, 16)]
    known, strangers = tiles[: len(tiles) // 2], tiles[len(tiles) // 2 :]
    with tempfile.TemporaryDirectory() as scratch:
        folder, storage = Path(scratch), Storage()
        (folder / "photos").mkdir()
        for number, tile in enumerate(known):
            tile.save(folder / "photos" / f"{number:04d}.png")
        uri = f"file://{folder}/dataset"
        ingest(str(folder / "photos"), uri, storage, image_size=SIZE, channels=3, shard_samples=50, test_fraction=0.5)
        dataset, began = read_dataset(uri, storage), time.perf_counter()

        def is_found(picture: bytes) -> bool:
            return bool(find(Query.of_picture(picture, "a tile"), dataset, storage, IN_THREADS))

        found = {name: share([is_found(change(tile)) for tile in known]) for name, change in CHANGES.items()}
        alarms = share([is_found(png(tile)) for tile in strangers])
        seconds = (time.perf_counter() - began) / (len(CHANGES) * len(known) + len(strangers))
    result = {
        "benchmark": "near_duplicates",
        "quick": options.size is not Size.FULL,
        "commit": commit(),
        "known": len(known),
        "strangers": len(strangers),
        "seconds_each": seconds,
        "false_alarms": alarms,
        "found": found,
    }
    publish(result, "near_duplicates", options)


def all_tiles() -> list[Image.Image]:
    """Return the tiles of the photographs."""
    portrait = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    photographs = [*load_sample_images().images, np.asarray(portrait.convert("RGB"))]
    return [
        Image.fromarray(photograph[top : top + TILE, left : left + TILE])
        for photograph in photographs
        for top in range(0, photograph.shape[0] - TILE + 1, TILE)
        for left in range(0, photograph.shape[1] - TILE + 1, TILE)
    ]


def share(outcomes: list[bool]) -> dict[str, Any]:
    """Return a share with its interval."""
    low, high = wilson(sum(outcomes) / len(outcomes), len(outcomes))
    return {"share": sum(outcomes) / len(outcomes), "low": low, "high": high}


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cropped(image: Image.Image, part: float) -> bytes:
    """Return an image without a part of its width and height, half of it on each side."""
    edge = image.width * part / 2
    box = (edge, edge, image.width - edge, image.height - edge)
    return png(image.resize(image.size, Image.Resampling.BICUBIC, box=box))


CHANGES: dict[str, Change] = {
    "unchanged": png,
    "mirrored": lambda image: png(ImageOps.mirror(image)),
    "JPEG 75": lambda image: jpeg(image, 75),
    "half size": lambda image: png(image.resize((TILE // 2, TILE // 2), Image.Resampling.BICUBIC)),
    "cropped 2 %": lambda image: cropped(image, 0.02),
    "cropped 5 %": lambda image: cropped(image, 0.05),
    "cropped 10 %": lambda image: cropped(image, 0.1),
}

if __name__ == "__main__":
    main()
