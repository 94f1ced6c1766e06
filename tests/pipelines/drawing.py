"""Model folders of tiny networks with random weights, and pictures, for tests of what a model can draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.model import ModelSpec, save_model
from tests.pipelines.checkpoints.tiny import SMALL

CLASSES = ("cat/dog", "../../up", "a, b", "плюс", "n" * 300)
WORDS = 4
"""Width of the embeddings of `encode`."""


def model_folder(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    channels: int = 1,
    inpaints: bool = False,
    text_dim: int = 0,
    text_encoder: str | None = None,
    text_encoder_digest: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a model with 50 noise levels that draws 8x8 pixels, and whose default is 4 steps."""
    torch.manual_seed(seed)
    config = replace(
        SMALL,
        in_channels=channels,
        out_channels=channels,
        num_classes=len(classes),
        context_channels=channels if inpaints else 0,
        text_dim=text_dim,
    )
    network = config.build().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():  # those that start at zero, without which nothing depends on anything
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    settings = Sampling.of(steps=4, scale=2.0)
    known = {"text_encoder": text_encoder, "text_encoder_digest": text_encoder_digest}
    lineage = {name: value for name, value in known.items() if value is not None}
    spec = ModelSpec(config, {"kind": "cosine", "num_steps": 50}, "v", 8, tuple(classes), settings, lineage)
    save_model(folder, spec, network.state_dict())
    return folder


def encode(texts: Sequence[str]) -> Conditioning:
    """Embed texts: a token for each word, which is a function of its letters."""
    vectors = [[torch.tensor([float(ord(c)) for c in word.ljust(WORDS)[:WORDS]]) for word in t.split()] for t in texts]
    length = max(map(len, vectors))
    text = torch.stack([torch.stack(v + [torch.zeros(WORDS)] * (length - len(v))) for v in vectors])
    mask = torch.tensor([[i < len(v) for i in range(length)] for v in vectors])
    return Conditioning(text=text, text_mask=mask, pooled=torch.stack([torch.stack(v).mean(0) for v in vectors]))


def save_picture(path: Path, *size: int, mode: str = "L", seed: int = 0) -> Path:
    """Write a picture of random pixels; size is (width, height), by default 8x8."""
    width, height = size or (8, 8)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if len(mode) == 1 else pixels, mode if len(mode) > 1 else None).save(path)
    return path
