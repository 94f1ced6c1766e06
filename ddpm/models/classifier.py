"""Classifiers of noisy images, for classifier guidance (Dhariwal & Nichol 2021, sec. 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.models.unet import UNetConfig, UNetEncoder
from ddpm.schedule import NoiseSchedule

SAME_TEXT = 1 - 1e-5
"""Cosine above which two embeddings are of the same text: equal texts differ by their rounding."""


class NoisyClassifier(UNetEncoder):
    """The encoder half of the UNet and a linear head on the mean over positions.

    One network serves classes and text: the head gives a score per class, or a direction that is compared with that of
    a text's embedding, as CLIP does (Radford et al. 2021), here on noised images (Nichol et al. 2022, GLIDE, sec. 2.4).
    It takes a UNet's `config`, of which it uses the way down; it is not conditioned on anything.

    Args:
        config: `out_channels`, `text_dim` and `context_channels` are not looked at.
        outputs: classes, or the width of the text embedding.
        text: whether it is trained on texts instead of classes.
    """

    def __init__(self, config: UNetConfig, outputs: int, *, text: bool = False) -> None:
        super().__init__(_unconditional(config))
        if outputs < 1:
            raise ValueError(f"outputs must be >= 1, got {outputs}")
        self.outputs, self.text = outputs, text
        width = config.channels[-1]
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=1e-5)
        self.head = nn.Linear(width, outputs)
        # CLIP's initial temperature of 0.07 (Radford et al. 2021, sec. 2.4), in log form; for text only. FSDP2 shards
        # no scalar, so that it has an axis.
        self.log_temperature = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.log_temperature, math.log(0.07))
        self.register_load_state_dict_pre_hook(_one_temperature)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scores [B, outputs] of x_t [B, C, H, W] at table index t [B].

        Those of texts are a direction over the temperature: the product with a text's direction is its score.
        """
        x, _ = self.encode(x_t, F.silu(self.embed_time(t, x_t.dtype)))
        scores = self.head(F.silu(self.norm_out(x)).mean((2, 3)))
        if not self.text:
            return scores
        whole = scores.to(torch.promote_types(scores.dtype, torch.float32))  # half precision is too coarse for cosines
        return F.normalize(whole, dim=1) / self.log_temperature.exp()

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """log p(y | x_t) of the class or text that it was trained on, [B]: a `ddpm.guidance.LogProb`."""
        return self.text_log_prob(x_t, t, cond) if self.text else self.class_log_prob(x_t, t, cond)

    def class_log_prob(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """log p(label | x_t), [B], at timestep t [B] in [0, T]: a `ddpm.guidance.LogProb`."""
        if cond.label is None:
            raise ValueError("a classifier of classes needs cond.label")
        log_probs = self(x_t, _index(t)).log_softmax(1)
        return log_probs.gather(1, cond.label[:, None])[:, 0]

    def text_log_prob(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """log p(pooled | x_t) up to a constant, [B], at timestep t [B]: a `ddpm.guidance.LogProb`.

        A von Mises-Fisher density of the text's direction: cosine / temperature, as in CLIP guidance.
        """
        if cond.pooled is None:
            raise ValueError("a classifier of text needs cond.pooled")
        scores = self(x_t, _index(t))
        return (scores * F.normalize(cond.pooled.to(scores.dtype), dim=1)).sum(1)


def class_loss(
    classifier: NoisyClassifier, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, label: Tensor
) -> Tensor:
    """Cross-entropy per sample on noised images, [B]: same schedule, timesteps and noise as the denoiser's training.

    Args:
        x_0: clean images [B, C, H, W].
        t: timesteps 1..T, int64 [B].
        eps: standard normal noise like x_0.
        label: classes, int64 [B].

    Examples:
        >>> from ddpm.schedule import Linear
        >>> x_0, t = torch.zeros(2, 1, 8, 8), torch.tensor([1, 500])
        >>> undecided = lambda x_t, row: torch.zeros(2, 10)
        >>> loss = class_loss(undecided, Linear().make(1000), x_0, t, torch.ones_like(x_0), torch.tensor([3, 7]))
        >>> loss.exp().round(decimals=4).tolist()  # one of ten classes
        [10.0, 10.0]
    """
    x_t = q_sample(x_0, t, eps, schedule)
    return F.cross_entropy(classifier(x_t, (t - 1).float()), label, reduction="none")


def text_loss(
    classifier: NoisyClassifier, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, pooled: Tensor
) -> Tensor:
    """Contrastive loss per sample, [B]: each noised image finds its text among those of the batch; see `match_losses`.

    Args:
        pooled: text embeddings [B, D].

    Examples:
        >>> from ddpm.schedule import Linear
        >>> x_0, t = torch.zeros(2, 1, 8, 8), torch.tensor([1, 500])
        >>> undecided = lambda x_t, row: torch.zeros(2, 4)
        >>> loss = text_loss(undecided, Linear().make(1000), x_0, t, torch.ones_like(x_0), torch.eye(2, 4))
        >>> loss.exp().round(decimals=4).tolist()  # one of two texts
        [2.0, 2.0]
    """
    return match_losses(classifier(q_sample(x_0, t, eps, schedule), (t - 1).float()), pooled, pooled)


def match_losses(scores: Tensor, own: Tensor, texts: Tensor) -> Tensor:
    """-log p(own text | image) of each image among the texts of a batch, [B] (Radford et al. 2021, fig. 3).

    Only from image to text, which is the conditional that guidance needs.

    Args:
        scores: of a classifier of texts for B images, [B, D].
        own: embeddings of the images' own texts [B, D].
        texts: those of the whole batch [M, D], with the own ones among them.

    Examples:
        >>> texts = torch.eye(2)
        >>> match_losses(100 * texts, texts, texts).tolist(), match_losses(100 * texts, texts.flip(0), texts).tolist()
        ([0.0, 0.0], [100.0, 100.0])
    """
    with torch.autocast(scores.device.type, enabled=False):  # half precision is too coarse for cosines
        own, texts = (F.normalize(each.to(scores.dtype), dim=1) for each in (own, texts))
        return shared_cross_entropy(scores @ texts.T, same_text(own, texts))


def same_text(one: Tensor, other: Tensor) -> Tensor:
    """Whether texts are equal, bool [N, M], by their embeddings' directions, [N, D] and [M, D] of length 1.

    Examples:
        >>> same_text(torch.eye(2), torch.eye(2)).tolist()
        [[True, False], [False, True]]
    """
    return one @ other.T > SAME_TEXT


def shared_cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    """-log of the probability that all right answers of a row have together, [N]: equal texts share it.

    Args:
        logits: [N, M].
        right: bool [N, M], with a right answer in each row.

    Examples:
        >>> right = torch.tensor([[True, False, True, False]])  # two of four equally likely answers
        >>> round(shared_cross_entropy(torch.zeros(1, 4), right).exp().item(), 4)
        2.0
    """
    return logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)


def _index(t: Tensor) -> Tensor:
    return (t - 1).clamp(min=0).float()


def _one_temperature(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read the scalar temperature of an earlier release."""
    name = f"{prefix}log_temperature"
    if name in weights:
        weights[name] = weights[name].reshape(1)


def _unconditional(config: UNetConfig) -> UNetConfig:
    return replace(config, num_classes=0, text_dim=0, context_channels=0)
