"""Coloured shapes with captions, as folders that an ingest reads."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ddpm.conditioning import Conditioning

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230)}
SHAPES = ("circle", "square")
WIDTH = 16
"""Of the embeddings of `embed`."""


def draw(path: Path, caption: str, size: int, seed: int) -> None:
    """Draw what a caption such as "a red circle" says, somewhere and of some size."""
    _, colour, shape = caption.split()
    rng = np.random.default_rng(seed)
    scale = 8  # drawn large and reduced, so that edges are smooth
    side = int(rng.integers(size // 2, size - 1)) * scale
    left, top = rng.integers(0, size * scale - side, 2).tolist()
    canvas = Image.new("RGB", (size * scale, size * scale), (10, 10, 10))
    pen = ImageDraw.Draw(canvas)
    draw_shape = pen.ellipse if shape == "circle" else pen.rectangle
    draw_shape((left, top, left + side, top + side), fill=COLOURS[colour])
    canvas.resize((size, size), Image.Resampling.BOX).save(path)


def captions() -> list[str]:
    """Return all different captions."""
    return [f"a {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]


def write_shapes(folder: Path, count: int, size: int = 8, *, extra: Sequence[str] = ()) -> Path:
    """Write so many pictures of shapes, the captions in turn, with their metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, rows = captions(), []
    for i in range(count):
        caption = texts[i % len(texts)]
        draw(folder / f"{i:04d}.png", caption, size, seed=i)
        rows.append({"file_name": f"{i:04d}.png", "text": caption})
    for i, text in enumerate(extra):
        draw(folder / f"extra-{i}.png", texts[0], size, seed=count + i)
        rows.append({"file_name": f"extra-{i}.png", "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def embed(texts: Sequence[str]) -> Conditioning:
    """Embed texts: a token for each word, which is a random function of the word."""
    tokens = [torch.stack([_word(word) for word in text.split() or [""]]) for text in texts]
    return Conditioning.of_text(tokens, torch.stack([each.mean(0) for each in tokens]))


def _word(word: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
