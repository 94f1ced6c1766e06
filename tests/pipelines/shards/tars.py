"""Tars as other tools write them, pictures to put into them, and a reader."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Dataset
from pipelines.shards.quarantine import Quarantine
from pipelines.shards.read import ShardReader
from pipelines.storage import Storage


def tar_bytes(entries: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """Return a tar of (name, bytes) in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_shard(path: Path, entries: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of (name, bytes) in this order."""
    path.write_bytes(tar_bytes(entries))


def picture(value: int, kind: str = "png", mode: str = "RGB") -> bytes:
    """Return an encoded image of 8x8 pixels that all have one value."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.full((8, 8), value, np.uint8))
    else:
        Image.new(mode, (8, 8), (value,) * 3 if mode == "RGB" else value).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def reader(dataset: Dataset, folder: Path, quarantine: Quarantine | None = None) -> ShardReader:
    """Return a reader of the split "train", with its cache in a folder."""
    fetcher = ShardFetcher(dataset.uri, Storage(), ShardCache(folder / "cache", 10**8))
    return ShardReader(dataset, "train", fetcher, quarantine)
