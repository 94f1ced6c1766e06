"""Previews of a model during training: a grid of samples, or a classifier's accuracy by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.generate import generate, to_uint8
from ddpm.masks import inpainting_condition, random_mask
from ddpm.models.classifier import SAME_TEXT
from ddpm.noise import Purpose, normal
from ddpm.prediction import NetworkDenoiser
from pipelines.evaluation.plots import class_grid, grid_classes, grid_shape
from pipelines.shards.read import Batch, ShardReader
from pipelines.tracking import RunLog
from pipelines.training.loop.collectives import all_gather_items, rank_indices
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.data import open_test_split, read_samples
from pipelines.training.loop.hardware import to_device
from pipelines.training.loop.health import LOW_SNR, Health, blank, say
from pipelines.training.loop.losses import label_and_text
from pipelines.training.loop.state import TrainingState, ema_weights

SEED = 0
NOISE_LEVELS = (0.05, 0.25, 0.5, 0.75)  # timesteps, as fractions of T
BATCH = 64
TEXTS = 512
"""Test images, at most, whose texts a classifier of texts is to tell apart."""
SHOWN = 20
"""Samples, at most, that the driver's terminal is sent."""
JUDGED = 64
"""Test images with which samples and predictions are compared; a quarter of it of large ones."""


class Preview:
    """Logs samples or accuracies of the averaged weights by images seen; the ranks share the work.

    Args:
        log: where rank 0 logs; None on the other ranks.
        health: judges samples and predictions.
    """

    def __init__(self, context: RunContext, log: RunLog | None, health: Health) -> None:
        self.context, self.log, self.health = context, log, health

    @cached_property
    def test_images(self) -> ShardReader:
        """The reader of the test split."""
        return open_test_split(self.context)

    def show(self, state: TrainingState) -> NDArray[np.uint8] | None:
        """Log one grid, or one set of accuracies; called by every rank at the same step.

        Returns:
            The first images of the grid, uint8 [N, H, W, C], on rank 0; None where no grid was drawn, and elsewhere.
        """
        if self.context.config.task == "classifier":
            self._log_accuracies(state)
            return None
        return self._log_grid(state)

    def _log_grid(self, state: TrainingState) -> NDArray[np.uint8] | None:
        context, spec, limit = self.context, self.context.spec, self.context.config.tracking.grid_images
        classes = grid_classes(len(spec.classes), limit) if self._by_class else ()
        rows, columns = grid_shape(len(classes), limit)
        count = rows * columns
        image_ids = rank_indices(count, context.rank)
        cond = self._conditions(image_ids, classes)
        with ema_weights(state) as network:
            images = generate(
                NetworkDenoiser(_CastInput(network), context.schedule, spec.prediction),
                context.schedule,
                spec.sampling.with_fields(compile=False),  # for a few samples now and then it would not pay
                cond=cond,
                shape=spec.shape,
                seed=SEED,
                image_ids=image_ids.to(context.device),
                batch_size=BATCH,
            )
        grid = all_gather_items(images, count)
        drawn = to_uint8(grid).cpu().numpy() if self.log else None
        if self.log and drawn is not None:
            names = tuple(spec.classes[c] for c in classes)
            self.log.image("samples", class_grid(drawn, columns, names), state.images_seen)
        if "test" in context.job.dataset.splits and not context.config.model.inpainting:
            self._judge(state, drawn)
        return None if drawn is None else drawn[:SHOWN]

    def _judge(self, state: TrainingState, drawn: NDArray[np.uint8] | None) -> None:
        """Compare samples with test images, and predictions at a high noise level with the mean test image.

        Args:
            drawn: samples, uint8 [N, H, W, C], on rank 0; None on the other ranks.
        """
        context, spec, device = self.context, self.context.spec, self.context.device
        there = sum(shard.samples for shard in self.test_images.shards)
        count = min(there, JUDGED if max(spec.shape[1:]) <= 64 else JUDGED // 4)
        if count < max(2, context.world_size):
            return  # every rank takes part, with an image at least
        image_ids = rank_indices(count, context.rank)
        batch = read_samples(self.test_images, image_ids)
        x_0 = to_device(batch.images, context.config, device)
        eps = normal(SEED, image_ids.to(device), Purpose.NOISE, tuple(x_0.shape[1:])).to(x_0)
        ratios = context.schedule.snr(torch.arange(1, context.schedule.num_steps + 1))
        t = min(int((ratios > LOW_SNR).sum()) + 1, context.schedule.num_steps)
        with ema_weights(state) as network, torch.no_grad():
            denoiser = NetworkDenoiser(_CastInput(network), context.schedule, spec.prediction)
            x_t = q_sample(x_0, torch.full((len(image_ids),), t, device=device), eps, context.schedule)
            times = torch.full((len(image_ids),), float(t), device=device)
            predicted = denoiser(x_t, times, label_and_text(context, batch)).x0.clamp(-1, 1)
        errors = all_gather_items((predicted - x_0).square().flatten(1).mean(1).double(), count)
        real = all_gather_items(x_0.float(), count)
        if drawn is not None:
            of_mean = (real - real.mean(0)).square().mean().item() * count / (count - 1)
            known = to_uint8(real).cpu().numpy()
            say(self.health.prediction(state.images_seen, errors.mean().item(), of_mean, blank(drawn, known)))
            say(self.health.samples(state.images_seen, drawn, known))

    @property
    def _by_class(self) -> bool:
        """Whether the class alone decides what is drawn."""
        return self.context.config.model.text_dim == 0 and not self.context.config.model.inpainting

    def _conditions(self, image_ids: Tensor, classes: Sequence[int]) -> Conditioning | None:
        """Return these classes in turn, or the captions and known pixels of the first test images."""
        config, device = self.context.config, self.context.device
        if self._by_class:
            return Conditioning(label=torch.tensor(classes)[image_ids % len(classes)].to(device)) if classes else None
        batch = read_samples(self.test_images, image_ids)
        cond = label_and_text(self.context, batch)
        if config.model.inpainting:
            known = to_device(batch.images, config, device)
            size = (known.shape[2], known.shape[3])
            mask = random_mask(SEED, image_ids.to(device), size, config.objective.mask)
            cond = inpainting_condition(known, mask, cond)
        return cond

    def _log_accuracies(self, state: TrainingState) -> None:
        """Log by noise level the share of test images that are given their own class, or their own text among all."""
        schedule, device = self.context.schedule, self.context.device
        levels = [max(1, round(fraction * schedule.num_steps)) for fraction in NOISE_LEVELS]
        count, texts = sum(shard.samples for shard in self.test_images.shards), None
        if self.context.config.model.text_dim:
            count = min(count, TEXTS)
            texts = self._texts(count)
        hits = []
        with ema_weights(state) as network, torch.no_grad():
            for image_ids in rank_indices(count, self.context.rank).split(BATCH):
                batch = read_samples(self.test_images, image_ids)
                x_0 = to_device(batch.images, self.context.config, device)
                eps = normal(SEED, image_ids.to(device), Purpose.NOISE, tuple(x_0.shape[1:])).to(x_0)
                row = []
                for level in levels:
                    t = torch.full((len(image_ids),), level, device=device)
                    scores = network(q_sample(x_0, t, eps, schedule), (t - 1).float())
                    row.append(self._right(scores, batch, image_ids.to(device), texts))
                hits.append(torch.stack(row, dim=1).double())
        accuracy = all_gather_items(torch.cat(hits), count).mean(0).tolist()
        if self.log:
            values = {f"test/accuracy_t{level:04d}": a for level, a in zip(levels, accuracy, strict=True)}
            self.log.metrics(values, state.images_seen)

    def _texts(self, count: int) -> Tensor:
        """Return the normalized text embeddings of the first test images, [count, D], on the device of every rank."""
        batch = read_samples(self.test_images, rank_indices(count, self.context.rank))
        assert batch.pooled is not None
        return F.normalize(all_gather_items(batch.pooled.to(self.context.device), count), dim=1)

    def _right(self, scores: Tensor, batch: Batch, image_ids: Tensor, texts: Tensor | None) -> Tensor:
        """Return whether each image is classified correctly, bool [B]."""
        if texts is None:
            assert batch.labels is not None
            return scores.argmax(1) == batch.labels.to(scores.device)
        best = (scores @ texts.to(scores.dtype).T).argmax(1)
        return (texts[best] * texts[image_ids]).sum(1) > SAME_TEXT


class _CastInput(nn.Module):
    """A network that takes float32 images, whatever the precision of its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        return self.network(x_t.to(next(self.network.parameters()).dtype), t, cond)
