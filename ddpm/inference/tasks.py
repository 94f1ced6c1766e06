"""The tasks of a model: sampling from noise, inpainting, editing (SDEdit) and DDIM inversion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.guidance import Guides
from ddpm.inference.checks import can_inpaint, check_condition, check_images, check_mask, check_steps
from ddpm.masks import checked_mask, inpainting_condition, paste
from ddpm.model import Model
from ddpm.prediction import Denoiser
from ddpm.samplers import DDIM, Sample, StepNoise
from ddpm.samplers.generalized import WHOLE_ONLY, GeneralizedSolver
from ddpm.samplers.repaint import Inpainter, RePaint, Replacement, repaint_levels
from ddpm.samplers.sdedit import edit_levels, noised_start
from ddpm.schedule import NoiseSchedule

INPAINTERS: dict[str, type[Inpainter]] = {"replacement": Replacement, "repaint": RePaint}
"""Inpainting methods for networks that were not trained for inpainting."""
TRAINED = "trained"
"""The method of networks trained for inpainting: they see the known pixels, and any sampler draws the rest."""
METHODS = (TRAINED, *INPAINTERS)


def method_name(method: Inpainter | None) -> str:
    """Return the name in `METHODS` of an inpainting method; None is the one that a network was trained for.

    Examples:
        >>> from ddpm.samplers.repaint import RePaint
        >>> method_name(RePaint()), method_name(None)
        ('repaint', 'trained')
    """
    return next((name for name, kind in INPAINTERS.items() if type(method) is kind), TRAINED)


@dataclass(frozen=True)
class TaskBatch:
    """The arguments with which a task draws a batch.

    Attributes:
        denoiser: the model, without guidance and clipping.
        schedule: its noise schedule.
        sampling: the settings.
        guides: what the guidance needs.
        cond: conditions of the pictures, or None.
        x_T: noise [B, C, H, W].
        noise: noise of the steps.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    sampling: Sampling
    guides: Guides
    cond: Conditioning | None
    x_T: Tensor  # noqa: N815
    noise: StepNoise

    @property
    def guided(self) -> Denoiser:
        """The model with guidance and clipping."""
        return self.sampling.wrap(self.denoiser, self.schedule, self.guides)


class Task(Protocol):
    """A way to draw pictures; a task that starts from images holds those of all N pictures."""

    def check(self, model: Model, sampling: Sampling, count: int) -> None:
        """Raise if the model cannot perform the task, or the images are not `count` images of the model's shape.

        Raises:
            ValueError: the message says what is wrong and what is allowed.
        """

    def part(self, span: slice, device: torch.device) -> Task:
        """Return the task for some of the pictures, on a device."""

    @property
    def shared(self) -> Hashable:
        """The settings that all pictures of the task share: tasks can be joined if these are equal."""

    def join(self, others: Sequence[Any]) -> Task:
        """Return one task for these pictures and those of `others`, which must be equal in `shared`."""

    def evaluations(self, sampling: Sampling, schedule: NoiseSchedule) -> int:
        """Return the number of samples that a batch yields."""

    def __call__(self, batch: TaskBatch) -> Iterator[Sample]:
        """Yield one `Sample` per step; the last one is the pictures."""


@dataclass(frozen=True)
class FromNoise:
    """Sampling: from noise to pictures, by the sampler of the settings."""

    def check(self, model: Model, sampling: Sampling, count: int) -> None:
        """See `Task`."""

    def part(self, span: slice, device: torch.device) -> FromNoise:
        """See `Task`."""
        return self

    @property
    def shared(self) -> Hashable:
        """See `Task`."""
        return FromNoise.__name__

    def join(self, others: Sequence[Any]) -> FromNoise:
        """See `Task`."""
        return self

    def evaluations(self, sampling: Sampling, schedule: NoiseSchedule) -> int:
        """See `Task`."""
        return sampling.sampler.steps

    def __call__(self, batch: TaskBatch) -> Iterator[Sample]:
        """See `Task`."""
        yield from batch.sampling.sampler(batch.guided, batch.schedule, batch.x_T, batch.cond, noise=batch.noise)


@dataclass(frozen=True)
class Inpainting:
    """Inpainting: fill the pixels that a mask hides. Known pixels are returned exactly as given.

    Attributes:
        known: images [N, C, H, W] in [-1, 1]; the values of hidden pixels are ignored.
        mask: [N, 1, H, W], True (or 1) where known.
        method: an algorithm for a network that was not trained for inpainting. None is for one that was: it is shown
            the known pixels, and the sampler of the settings draws the others.
    """

    known: Tensor
    mask: Tensor
    method: Inpainter | None = None

    def check(self, model: Model, sampling: Sampling, count: int) -> None:
        """See `Task`."""
        mask = checked_mask(self.mask, self.known)
        check_images(self.known.where(mask, 0), model.spec, count)
        for i, known in enumerate(mask):
            check_mask(f"the mask of picture {i}", known)
        if self.method is None and not can_inpaint(model.spec):
            raise ValueError(
                "this model was not trained for inpainting (model.inpainting=true), so that it cannot be shown the "
                f"known pixels: use the method {' or '.join(INPAINTERS)}"
            )
        if isinstance(self.method, RePaint | Replacement):
            check_steps(self.method.steps, model.schedule)
        self.evaluations(sampling, model.schedule)  # raises where jumps do not fit

    def part(self, span: slice, device: torch.device) -> Inpainting:
        """See `Task`."""
        return replace(self, known=self.known[span].to(device), mask=self.mask[span].to(device))

    @property
    def shared(self) -> Hashable:
        """See `Task`."""
        return type(self), self.method

    def join(self, others: Sequence[Any]) -> Inpainting:
        """See `Task`."""
        known = torch.cat([self.known, *(other.known for other in others)])
        return replace(self, known=known, mask=torch.cat([self.mask, *(other.mask for other in others)]))

    def evaluations(self, sampling: Sampling, schedule: NoiseSchedule) -> int:
        """See `Task`."""
        if not isinstance(self.method, RePaint):
            return (self.method or sampling.sampler).steps  # type: ignore[union-attr]
        levels = repaint_levels(
            self.method.levels(schedule), jump_length=self.method.jump_length, resamplings=self.method.resamplings
        )
        return sum(s < t for t, s in itertools.pairwise(levels))

    def __call__(self, batch: TaskBatch) -> Iterator[Sample]:
        """See `Task`."""
        if self.method is not None:
            yield from self.method(
                batch.guided,
                batch.schedule,
                batch.x_T,
                batch.cond,
                known=self.known,
                mask=self.mask,
                noise=batch.noise,
            )
            return
        shown = replace(batch, cond=inpainting_condition(self.known, self.mask, batch.cond))
        for sample in FromNoise()(shown):
            yield replace(sample, x_t=paste(self.known, sample.x_t, self.mask)) if sample.t == 0 else sample


@dataclass(frozen=True)
class Editing:
    """SDEdit (Meng et al. 2022): an image is noised to t = strength T, and sampled from there.

    Its levels are even in t, whatever the spacing of the sampler, and there are strength times as many steps as in
    sampling, rounded up.

    Attributes:
        images: [N, C, H, W] in [-1, 1].
        strength: t / T, in [0, 1]. 0 gives the image itself; at 1 only the share alpha_T of it is kept.
    """

    images: Tensor
    strength: float = 0.5

    def check(self, model: Model, sampling: Sampling, count: int) -> None:
        """See `Task`."""
        check_images(self.images, model.spec, count)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}: 0 is the image itself, 1 a new one")
        sampler = sampling.sampler
        if self.strength > 0 and isinstance(sampler, GeneralizedSolver) and sampler.weights is not None:
            raise ValueError(WHOLE_ONLY)

    def part(self, span: slice, device: torch.device) -> Self:
        """See `Task`."""
        return replace(self, images=self.images[span].to(device))

    @property
    def shared(self) -> Hashable:
        """See `Task`."""
        return type(self), self.strength

    def join(self, others: Sequence[Any]) -> Self:
        """See `Task`."""
        return replace(self, images=torch.cat([self.images, *(other.images for other in others)]))

    def evaluations(self, sampling: Sampling, schedule: NoiseSchedule) -> int:
        """See `Task`."""
        return max(1, math.ceil(self.strength * sampling.sampler.steps))

    def __call__(self, batch: TaskBatch) -> Iterator[Sample]:
        """See `Task`."""
        if self.strength == 0:
            yield Sample(self.images, self.images, 0.0)
            return
        steps = self.evaluations(batch.sampling, batch.schedule)
        x_t, timesteps = noised_start(batch.schedule, self.images, self.strength, batch.x_T, steps=steps)
        yield from batch.sampling.sampler(
            batch.guided, batch.schedule, x_t, batch.cond, noise=batch.noise, timesteps=timesteps
        )


@dataclass(frozen=True)
class Inverting(Editing):
    """DDIM inversion: the noise at t = strength T from which DDIM gives the image, sampled with another condition.

    The inversion is without guidance, which makes it unstable. With the condition of the image, and guidance of scale
    1, sampling gives the image back.

    Attributes:
        source: label or text of the images, or None.
    """

    source: Conditioning | None = None

    def check(self, model: Model, sampling: Sampling, count: int) -> None:
        """See `Task`."""
        super().check(model, sampling, count)
        if not isinstance(sampling.sampler, DDIM) or sampling.sampler.eta > 0:
            raise ValueError("inversion needs deterministic steps, those of kind=ddim with eta=0")
        if self.source is not None:
            check_condition("the condition of the images", self.source, model.spec, count)

    def part(self, span: slice, device: torch.device) -> Self:
        """See `Task`."""
        part = super().part(span, device)
        return replace(part, source=None if self.source is None else self.source[span].to(device))

    @property
    def shared(self) -> Hashable:
        """See `Task`."""
        return super().shared, None if self.source is None else self.source.present

    def join(self, others: Sequence[Any]) -> Self:
        """See `Task`."""
        joined = super().join(others)
        if self.source is None:
            return joined
        return replace(joined, source=Conditioning.join([self.source, *(other.source for other in others)]))

    def evaluations(self, sampling: Sampling, schedule: NoiseSchedule) -> int:
        """See `Task`."""
        return 2 * super().evaluations(sampling, schedule)

    def __call__(self, batch: TaskBatch) -> Iterator[Sample]:
        """See `Task`."""
        if self.strength == 0:
            yield from super().__call__(batch)
            return
        sampler, schedule = batch.sampling.sampler, batch.schedule
        assert isinstance(sampler, DDIM)
        levels = edit_levels(schedule, self.strength, steps=super().evaluations(batch.sampling, schedule))
        plain = batch.sampling.wrap_unguided(batch.denoiser, schedule)
        x_t = self.images
        for sample in sampler.invert(plain, schedule, x_t, self.source, timesteps=levels):
            x_t = sample.x_t
            yield sample
        yield from sampler(batch.guided, schedule, x_t, batch.cond, timesteps=levels)
