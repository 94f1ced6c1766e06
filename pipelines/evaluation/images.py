"""Images of an evaluation: pixels as the levels that a user receives, small copies of them, and shards of samples."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ddpm.generate import to_uint8
from pipelines.presentation.images import to_png
from pipelines.shards.members import decode_image

THUMBNAIL = 32
"""Largest side of the small copies in which copies of training images are looked for, in pixels."""


def to_levels(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] in [-1, 1] as uint8, rounded to the 256 levels of a picture."""
    return to_uint8(images).permute(0, 3, 1, 2).contiguous()


def thumbnails(images: Tensor) -> NDArray[np.uint8]:
    """Return small copies of images uint8 [N, C, H, W]: the same, or averaged down to at most `THUMBNAIL` pixels."""
    height, width = thumbnail_size(*images.shape[2:])
    if (height, width) != tuple(images.shape[2:]):
        images = F.adaptive_avg_pool2d(images.float(), (height, width)).round().to(torch.uint8)
    return images.cpu().numpy()


def thumbnail_size(height: int, width: int) -> tuple[int, int]:
    """Return the size of the small copy of an image."""
    scale = min(1.0, THUMBNAIL / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def pack_samples(
    images: NDArray[np.uint8], labels: NDArray[np.int64] | None, first: int, finite: NDArray[np.bool_]
) -> bytes:
    """Return samples, uint8 [N, H, W, C], as a WebDataset shard; keys are the numbers of the images.

    Args:
        labels: class indices [N], if any.
        first: number of the first image.
        finite: whether all numbers of a sample were finite, bool [N]; the picture of one that was not says nothing,
            and it has a member `json` that says so.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, image in enumerate(images):
            members = {"png": to_png(image)}
            if labels is not None:
                members["cls"] = str(int(labels[i])).encode()
            if not finite[i]:
                members["json"] = b'{"finite": false}'
            for name, data in members.items():
                info = tarfile.TarInfo(f"{first + i:09d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack_samples(data: bytes, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the images, uint8 [N, H, W, C], of a shard that `pack_samples` made, in order, and which were finite."""
    images, broken, names = [], set(), []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            if kind == "png":
                file = tar.extractfile(member)
                assert file is not None
                images.append(decode_image({"png": file.read()}, channels))
                names.append(key)
            elif kind == "json":
                broken.add(key)
    return np.stack(images), np.array([name not in broken for name in names])
