"""Classifiers of noisy images, for classifier guidance (Dhariwal & Nichol 2021, sec. 4)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.models.unet import Encoder, UNetConfig
from ddpm.schedule import NoiseSchedule


class NoisyClassifier(Encoder):
    """The encoder half of the UNet and a linear head on the mean over positions.

    One network serves classes and text: the head gives a score per class, or an embedding that is compared with the
    text's. It takes a UNet's `config`, of which it uses the way down; it is not conditioned on anything.

    Args:
        config: `out_channels`, `text_dim` and `context_channels` are not looked at.
        outputs: classes, or the width of the text embedding.
    """

    def __init__(self, config: UNetConfig, outputs: int) -> None:
        super().__init__(_unconditional(config))
        if outputs < 1:
            raise ValueError(f"outputs must be >= 1, got {outputs}")
        width = config.channels[-1]
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=1e-5)
        self.head = nn.Linear(width, outputs)
        # CLIP's initial temperature of 0.07 (Radford et al. 2021, sec. 2.4), in log form; for text only.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scores [B, outputs] of x_t [B, C, H, W] at table index t [B]."""
        x, _ = self.encode(x_t, F.silu(self.embed_time(t, x_t.dtype)))
        return self.head(F.silu(self.norm_out(x)).mean((2, 3)))

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
        cosine = F.cosine_similarity(self(x_t, _index(t)), cond.pooled.to(x_t.dtype), dim=1)
        return cosine / self.log_temperature.exp()


def class_loss(
    classifier: NoisyClassifier, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, label: Tensor
) -> Tensor:
    """Cross-entropy per sample on noised images, [B]: same schedule, timesteps and noise as the denoiser's training.

    Args:
        x_0: clean images [B, C, H, W].
        t: timesteps 1..T, int64 [B].
        eps: standard normal noise like x_0.
        label: classes, int64 [B].
    """
    x_t = q_sample(x_0, t, eps, schedule)
    return F.cross_entropy(classifier(x_t, (t - 1).float()), label, reduction="none")


def text_loss(
    classifier: NoisyClassifier, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, pooled: Tensor
) -> Tensor:
    """Contrastive loss per sample, [B]: each noised image finds its text in the batch (Radford et al. 2021, fig. 3).

    Only from image to text, which is the conditional that guidance needs. Equal texts share the probability.

    Args:
        pooled: text embeddings [B, D].
    """
    scores = F.normalize(classifier(q_sample(x_0, t, eps, schedule), (t - 1).float()).float(), dim=1)
    texts = F.normalize(pooled.float(), dim=1)
    logits = scores @ texts.T / classifier.log_temperature.exp()
    same = (texts @ texts.T) > 1 - 1e-5
    return logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1)


def _index(t: Tensor) -> Tensor:
    """The table index that a network sees at timestep t."""
    return (t - 1).clamp(min=0).float()


def _unconditional(config: UNetConfig) -> UNetConfig:
    return replace(config, num_classes=0, text_dim=0, context_channels=0)
