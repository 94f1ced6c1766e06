"""Drawing of pictures in batches, with a film of the way to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.guidance import Guides
from ddpm.inference.checks import check_condition, check_count, check_steps
from ddpm.inference.noise import Noise
from ddpm.inference.tasks import Batch, FromNoise, Task
from ddpm.model import Model
from ddpm.prediction import Denoiser
from ddpm.samplers import Sample, last
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class Film:
    """States on the way to the pictures, F of them.

    Attributes:
        t: noise level of each.
        x_t: the noisy pictures, uint8 [F, N, H, W, C].
        x0: the clean pictures that the model predicts from them, uint8 [F, N, H, W, C].
    """

    t: tuple[float, ...]
    x_t: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        images: [N, C, H, W] in [-1, 1], on the model's device.
        film: the way to them, where that was asked for.
    """

    images: Tensor
    film: Film | None = None


@dataclass(frozen=True)
class Painter:
    """What draws pictures: a denoiser, without guidance and clipping, and what it needs.

    Attributes:
        schedule: its noise schedule.
        guides: what the guidance needs.
        shape: of a picture, (C, H, W).
        device: on which pictures are drawn.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    guides: Guides
    shape: tuple[int, ...]
    device: torch.device


def draw(
    model: Model,
    noise: Noise,
    cond: Conditioning | None = None,
    task: Task | None = None,
    *,
    sampling: Sampling | None = None,
    negative: Conditioning | None = None,
    batch_size: int = 64,
    film: int = 0,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
) -> Drawn:
    """Return pictures of a model, on its device.

    Args:
        noise: of each picture.
        cond: labels or text of the pictures; None for none.
        task: how they are drawn; by default from noise.
        sampling: the settings; by default the model's own.
        negative: label or text to move away from, instead of the null condition, in classifier-free guidance.
        batch_size: pictures per network call.
        film: number of states to keep of the way to the pictures; 0 for none.
        progress: called with (done, total) in sampling steps.
        finished: called with each batch as soon as it is drawn: the index of its first picture, and its pictures
            [B, C, H, W].

    Raises:
        ValueError: the model cannot do what is asked; the message says what it can.
    """
    task, sampling = task or FromNoise(), sampling or model.spec.sampling
    check_drawing(model, task, sampling, noise, cond, negative)
    device = next(model.network.parameters()).device
    painter = Painter(model.denoiser, model.schedule, model.guides, model.spec.shape, device)
    return paint(
        painter,
        noise,
        cond,
        task,
        sampling=sampling,
        negative=negative,
        batch_size=batch_size,
        film=film,
        progress=progress,
        finished=finished,
    )


# Not inference mode: classifier guidance differentiates through x_t.
@torch.no_grad()
def paint(
    painter: Painter,
    noise: Noise,
    cond: Conditioning | None,
    task: Task,
    *,
    sampling: Sampling,
    negative: Conditioning | None = None,
    batch_size: int = 64,
    film: int = 0,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
) -> Drawn:
    """Return pictures, without a check that they can be drawn; see `draw`.

    Every picture of this package comes from here: what is judged is drawn as what is served.
    """
    device, shape = painter.device, painter.shape
    starts = range(0, len(noise), batch_size)
    each = task.evaluations(sampling, painter.schedule)
    parts, films = [], []
    for number, first in enumerate(starts):
        span = slice(first, first + batch_size)
        own = noise.map(lambda tensor, span=span: tensor[span].to(device))  # type: ignore[misc]
        batch = Batch(
            painter.denoiser,
            painter.schedule,
            sampling,
            replace(painter.guides, negative=None if negative is None else negative[span].to(device)),
            None if cond is None else cond[span].to(device),
            own.initial(shape),
            own.steps(shape),
        )
        reel = _Reel(each, film)
        steps = reel.watch(task.part(span, device)(batch))
        parts.append(last(_counted(steps, number * each, each, len(starts) * each, progress)).clamp(-1, 1))
        films.append(reel)
        if finished is not None:
            finished(first, parts[-1])
    return Drawn(torch.cat(parts), _join(films) if film else None)


def check_drawing(
    model: Model,
    task: Task,
    sampling: Sampling,
    noise: Noise,
    cond: Conditioning | None,
    negative: Conditioning | None,
) -> None:
    """Check that a model can draw what is asked; see `draw`.

    Raises:
        ValueError: it cannot; the message says what it can.
    """
    count, spec = len(noise), model.spec
    check_count(count, spec)
    check_steps(sampling.sampler.steps, model.schedule)
    for name, given in (("the condition", cond), ("the negative condition", negative)):
        if given is not None:
            check_condition(name, given, spec, count)
    if negative is not None and sampling.guidance.scale == 1:
        raise ValueError("a negative prompt has no effect at guidance scale 1: use a larger one")
    task.check(model, sampling, count)
    sampling.wrap(model.denoiser, model.schedule, replace(model.guides, negative=negative))  # raises for a missing one


def _counted(
    samples: Iterator[Sample], before: int, each: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[Sample]:
    """Pass samples through, and report how many there have been of all batches."""
    for i, sample in enumerate(samples, 1):
        if progress is not None:
            progress(before + min(i, each), total)
        yield sample


class _Reel:
    """The states of one batch that a film keeps: the first, the last, and others evenly between them."""

    def __init__(self, steps: int, frames: int) -> None:
        self.kept = {round(i * (steps - 1) / max(frames - 1, 1)) for i in range(frames)}
        self.has_end = frames > 1
        self.frames: list[tuple[float, Tensor, Tensor]] = []

    def watch(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for i, sample in enumerate(samples):
            beyond = self.has_end and i > max(self.kept)  # annealed Langevin dynamics yield their end as well
            if beyond:
                self.frames.pop()
            if i in self.kept or beyond:
                self.frames.append((sample.t, to_uint8(sample.x_t).cpu(), to_uint8(sample.x0).cpu()))
            yield sample


def _join(reels: list[_Reel]) -> Film:
    """Return the film of all batches."""
    states: Any = zip(*(reel.frames for reel in reels), strict=True)
    rows = [(states_at[0][0], *(torch.cat([s[k] for s in states_at]) for k in (1, 2))) for states_at in states]
    return Film(
        tuple(t for t, _, _ in rows), torch.stack([x for _, x, _ in rows]), torch.stack([x for _, _, x in rows])
    )
