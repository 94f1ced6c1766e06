"""The prompts of an evaluation of a model on text, and whether its samples match them.

Samples are drawn from the captions of real test images, and a network that was trained on images and captions of the
train split says whether a sample's own caption is the best match among several different ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.quality import Measured
from pipelines.config import Config
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.matcher import Matcher, choices, matched
from pipelines.evaluation.evaluators.train import prompt_captions
from pipelines.evaluation.real import held_out_positions
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.scores import Z_95, Estimate
from pipelines.presentation.progress import Notice, no_notice
from pipelines.shards.captions import Captions, caption_width, read_captions
from pipelines.shards.index import Dataset
from pipelines.shards.read import opened_split
from pipelines.storage import Storage

EXAMPLES = 4
"""Captions that a record names."""


@dataclass(frozen=True)
class PromptRows:
    """Which captions a plan's samples are drawn from, without their embeddings.

    Attributes:
        digest: of the captions with their embeddings.
        count: number of captions.
        labels: classes of their images; None where the model has none.
    """

    digest: str
    count: int
    labels: tuple[int, ...] | None

    def rows(self, n: int, seed: int) -> NDArray[np.int64]:
        """Return the place of the caption of each of n samples: all captions in turn, in a seeded order."""
        generator = torch.Generator().manual_seed(seed)
        turns = [torch.randperm(self.count, generator=generator) for _ in range(-(-n // self.count))]
        return torch.cat(turns)[:n].numpy()


@dataclass(frozen=True)
class Prompts:
    """The captions that samples of a model on text are drawn from, and what judges the samples by them.

    Attributes:
        captions: of test images.
        held_out: of the test images whose likelihood is computed, the empty ones included.
        labelled: whether the model has classes as well, which then are those of the captions' images.
        matcher: judges; None where all captions are the same, so that there is nothing to tell apart.
    """

    captions: Captions
    held_out: Captions
    labelled: bool
    matcher: Evaluator | None

    @property
    def plan(self) -> PromptRows:
        """Which captions samples are drawn from, by their places."""
        labels = self.captions.labels if self.labelled else None
        return PromptRows(self.captions.digest, len(self.captions), None if labels is None else tuple(labels.tolist()))

    def condition(self, places: NDArray[np.int64]) -> Conditioning:
        """Return the text that samples are drawn from, by the captions' places [B]."""
        return self.captions.condition(torch.from_numpy(places), labels=False)

    def accuracy(self, vectors: Rows, first: int, rows: NDArray[np.int64], seed: int) -> Measured | None:
        """Return the share of samples whose caption matches best; None where there is nothing to tell apart.

        Args:
            vectors: of all samples, as the matcher gives them, float32 [N, J].
            first: place of the first of the samples among them.
            rows: places of the samples' captions [n].
            seed: of the captions that each is compared with.
        """
        if self.matcher is None:
            return None
        _, numbers = self.captions.different
        own = numbers[torch.from_numpy(rows)]
        found = torch.from_numpy(vectors.read(first, first + len(rows)))
        return Measured.mean(matched(found, own, self._texts(), seed))

    def estimate(self, found: list[Measured]) -> Estimate:
        """Return the score from the shares of each noise seed; its ceiling is what guessing gets.

        The interval is Wilson's (1927), which has a width where all samples are right.
        """
        assert self.matcher is not None
        shares = [each.value for each in found]
        score = Estimate.of(shares, [0.0] * len(shares), floor=self.matcher.accuracy, ceiling=1 / self.choices)
        low, high = wilson(score.value, sum(each.n for each in found))
        return replace(score, low=low, high=high)

    @property
    def choices(self) -> int:
        """Among how many captions one has to be found."""
        return choices(len(self.captions.different[0]))

    def record(self) -> dict[str, Any]:
        """Return what the score is of, as JSON types."""
        judge = self.matcher
        return {
            "captions": len(self.captions),
            "examples": [self.captions.texts[place] for place in self.captions.different[0].tolist()[:EXAMPLES]],
            "different": len(self.captions.different[0]),
            "choices": self.choices,
            "chance": 1 / self.choices,
            "real_accuracy": None if judge is None else judge.accuracy,
            "captions_digest": self.captions.digest,
            "evaluator_digest": None if judge is None else judge.digest,
        }

    def _texts(self) -> Tensor:
        """Return the vectors of the different captions [U, J]."""
        assert self.matcher is not None
        network: Any = self.matcher.encoder
        assert isinstance(network, Matcher)
        return network.texts(self.captions.pooled[self.captions.different[0]])


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a probability, of which a share of n was found (Wilson 1927)."""
    extra = Z_95**2 / n
    middle = (share + extra / 2) / (1 + extra)
    half = Z_95 * math.sqrt((share * (1 - share) + extra / 4) / n) / (1 + extra)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def open_captions(
    width: int,
    dataset: Dataset,
    config: Config,
    notice: Notice = no_notice,
    held_out: int | None = None,
) -> tuple[Captions, Captions] | None:
    """Return the captions that samples of a model are drawn from, and those of the images of its likelihood.

    Args:
        width: of the embeddings that the model takes; 0 for a model that is not conditioned on text.
        held_out: how many of the images of `Real.held_out` these are; None for those of an evaluation.

    Returns:
        None for a model that is not conditioned on text, and for data without fitting captions.
    """
    storage = Storage.of(config)
    if not width:
        return None
    found = caption_width(dataset, "test", storage)
    if found != width:
        why = (
            "no embeddings of captions" if found is None else f"embeddings of {found} numbers, the model takes {width}"
        )
        notice(f"{dataset.uri} has {why}: samples are drawn without prompts")
        return None
    data, most = config.data, config.evaluation.likelihood_images if held_out is None else held_out
    with opened_split(dataset, "test", storage, data.cache_dir, data.cache_gib) as reader:
        count = sum(shard.samples for shard in reader.shards)
        of_held_out = read_captions(reader, held_out_positions(count)[:most], empty=True)
        captions = prompt_captions(reader)
    if not len(captions):
        notice(f"all captions of the test split of {dataset.uri} are empty: samples are drawn without prompts")
        return None
    return captions, of_held_out
