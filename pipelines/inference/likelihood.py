"""Bits per dimension of images under a model, with an interval, and the terms of the bound by timestep."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.bound import mean_bits_per_dim
from ddpm.conditioning import Conditioning
from ddpm.model import Model
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.environment.lineage import code_lineage
from pipelines.evaluation.data import same_labels
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.likelihoods import Bounds, bound_bits, ode_bits
from pipelines.evaluation.scoring import digest_of
from pipelines.inference.inputs import as_tensor, read_images
from pipelines.inference.request import RequestError
from pipelines.presentation import html
from pipelines.presentation.blocks import Interactive, Section
from pipelines.presentation.progress import Notice, Progress, no_notice, no_progress
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.shards.ingest.sources import SUFFIXES
from pipelines.shards.read import opened_split, spread_positions
from pipelines.storage import Storage, join, layout

Method = Literal["bound", "ode"]
LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Data:
    """Images whose likelihood is wanted.

    Attributes:
        source: where they come from, in words.
        images: in [-1, 1], on the grid of 256 levels, float32 [N, C, H, W].
        cond: their labels, or the embeddings of their captions; None where the model takes neither or they have none.
    """

    source: str
    images: Tensor
    cond: Conditioning | None


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of images.

    Attributes:
        method: "bound", an upper bound, or "ode".
        source: where the images come from, in words.
        images: float64 [N].
        terms: means of the terms of the bound over the images, by increasing noise, the prior last; None for the ODE.
        timesteps: of the terms.
        seed: of the noise and of the interval.
        variance: of the chain's steps whose bound it is: the tighter of "small" and "large", or "learned"; None for the
            ODE.
    """

    method: Method
    source: str
    images: Tensor
    terms: NDArray[np.float64] | None
    timesteps: NDArray[np.int64] | None
    seed: int
    variance: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the mean with its interval as JSON types."""
        mean = mean_bits_per_dim(self.images, seed=self.seed, level=LEVEL)
        return {
            "method": self.method,
            "variance": self.variance,
            "source": self.source,
            "images": len(self.images),
            "seed": self.seed,
            "bits_per_dim": {"mean": mean.value, "low": mean.low, "high": mean.high, "level": LEVEL},
        }

    def line(self) -> str:
        """Return the result in words."""
        mean = mean_bits_per_dim(self.images, seed=self.seed, level=LEVEL)
        kind, more = ("at most", f", variance {self.variance}") if self.method == "bound" else ("by the ODE", "")
        return (
            f"{kind} {mean.value:.3f} in [{mean.low:.3f}, {mean.high:.3f}] ({LEVEL:.0%} interval, "
            f"{len(self.images)} images of {self.source}{more})"
        )


def read_data(data: str, model: Model, most: int, config: Config, notice: Notice = no_notice) -> Data:
    """Return images spread evenly over the test split of a dataset, or over a folder of images.

    Args:
        data: address of a folder with dataset.json, or path of a folder with images; where all of those lie in folders
            that are named as the model's classes, these are their labels.
        most: number of images, at most.
        notice: called with what was changed in images of a folder, and where their classes are not known.

    Raises:
        DatasetError: the dataset is damaged, or its images have another size than the model's.
        RequestError: there are fewer than two images.
    """
    storage = Storage.of(config)
    uri = data if "://" in data else Path(data).absolute().as_uri()
    if not storage.exists(join(uri, layout.DATASET)):
        if not uri.startswith("file://"):
            read_dataset(uri, storage)  # raises, and says how to write one
        return _folder(Path(data.removeprefix("file://")), model, most, notice)
    return _test_split(uri, model, most, config)


def parse_method(method: str) -> Method:
    """Return the method of this name.

    Raises:
        RequestError: there is none.
    """
    if method not in get_args(Method):
        raise RequestError(f"unknown method {method!r}; allowed: {', '.join(get_args(Method))}")
    return method  # type: ignore[return-value]


def measure(
    model: Model,
    data: Data,
    method: Method = "bound",
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress = no_progress,
) -> Bits:
    """Return bits per dimension of images under a model without guidance.

    Args:
        method: "bound" is the variational bound; "ode" the probability-flow ODE, which is about as slow again.
        seed: of the noise.
        batch_size: images that are looked at together.
        progress: called with the number of images.
    """
    device = next(model.network.parameters()).device
    bits: list[Tensor] = []
    bounds: list[Bounds] = []
    for first in range(0, len(data.images), batch_size):
        span = slice(first, first + batch_size)
        x_0, cond = data.images[span].to(device), None if data.cond is None else data.cond[span].to(device)
        ids = torch.arange(first, first + len(x_0), device=device)
        if method == "ode":
            bits.append(ode_bits(model, x_0, cond, ids, seed).cpu())
        else:
            bounds.append(bound_bits(model, x_0, cond, ids, seed))
        progress(first + len(x_0), len(data.images))
    if method == "ode":
        return Bits(method, data.source, torch.cat(bits), None, None, seed)
    found = Bounds.joined(bounds)
    best = found.tighter
    total, terms = torch.from_numpy(found.totals[best]), found.terms[best].mean(0)
    return Bits(method, data.source, total, terms, found.timesteps, seed, best)


def write(bits: Bits, out: Path, resolved: Resolved) -> list[Path]:
    """Write `likelihood.json` and, for a bound, `terms.html` with a plot of its terms; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    model = {"reference": resolved.reference, "digest": digest_of(resolved)}
    versions = {**code_lineage(), "torch": torch.__version__}
    plain: dict[str, Any] = {"model": model, **bits.to_plain(), "each": bits.images.tolist(), "versions": versions}
    if bits.terms is not None and bits.timesteps is not None:
        plain["terms"] = {"timesteps": bits.timesteps.tolist(), "bits_per_dim": bits.terms.tolist()}
    files = [out / "likelihood.json"]
    files[0].write_text(json.dumps(plain, indent=1) + "\n")
    if bits.terms is not None:
        files.append(out / "terms.html")
        files[1].write_text(_plot(bits))
    return files


def _plot(bits: Bits) -> str:
    """Return a page with a plot of the terms of the bound; it holds all that it needs."""
    import plotly.graph_objects as go

    assert bits.terms is not None
    assert bits.timesteps is not None
    figure = go.Figure(go.Scatter(x=bits.timesteps[:-1], y=bits.terms[:-1], mode="lines+markers", name="terms"))
    figure.add_scatter(x=bits.timesteps[-1:], y=bits.terms[-1:], mode="markers", name="prior")
    figure.update_layout(xaxis_title="t", yaxis_title="bits per dimension", template="plotly_white")
    figure.update_yaxes(type="log")
    section = Section("terms", "Bits per dimension by timestep", [Interactive(figure)])
    return html.page("Terms of the variational bound", bits.line(), [section], "Made by ddpm likelihood.")


def _test_split(uri: str, model: Model, most: int, config: Config) -> Data:
    storage = Storage.of(config)
    dataset, spec = read_dataset(uri, storage), model.spec
    if (there := dataset.shape) != spec.shape:
        raise DatasetError(f"{uri} has images {list(there)}, the model's are {list(spec.shape)}: name its own data")
    text = spec.network.text_dim > 0
    with opened_split(dataset, "test", storage, config.data.cache_dir, config.data.cache_gib, text=text) as reader:
        batch = reader.at(spread_positions(sum(shard.samples for shard in reader.shards), most))
    labels = batch.labels if dataset.classes and spec.classes and same_labels(spec, dataset) else None
    cond = Conditioning(label=labels, text=batch.text, text_mask=batch.text_mask, pooled=batch.pooled)
    known = labels is not None or batch.pooled is not None
    images = to_levels(batch.images).float() / 127.5 - 1  # of the bytes that a float32 stands for
    return Data(f"the test split of {uri}", images, cond if known else None)


def _folder(folder: Path, model: Model, most: int, notice: Notice) -> Data:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise RequestError(f"{folder} has {len(paths)} images and no dataset.json: an interval needs at least 2 images")
    chosen = [paths[i] for i in spread_positions(len(paths), most)]
    changed: Counter[str] = Counter()
    images = read_images(chosen, model.spec.shape, lambda text: changed.update([text.partition(": ")[2]]))
    pixels = np.stack([image.pixels for image in images])
    for change, count in changed.items():
        notice(f"{count} images: {change}")
    classes, names = model.spec.classes, [path.parent.name for path in chosen]
    cond = None
    if classes and set(names) <= set(classes):
        cond = Conditioning(label=torch.tensor([classes.index(name) for name in names]))
    elif classes:
        notice("the images do not lie in folders named as the model's classes: their likelihood is without a class")
    return Data(str(folder), as_tensor(pixels), cond)
