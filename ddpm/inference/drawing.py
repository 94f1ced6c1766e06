"""Drawing of pictures in batches, from a value that says what to draw, with a film of the intermediate states."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.guidance import Guides
from ddpm.inference.checks import check_condition, check_count, check_steps
from ddpm.inference.noise import Noise
from ddpm.inference.tasks import FromNoise, Task, TaskBatch
from ddpm.model import Model
from ddpm.prediction import Denoiser
from ddpm.samplers import Sample, last
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class Film:
    """F intermediate states of sampling.

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
    """Pictures and, where it was requested, their film.

    Attributes:
        images: [N, C, H, W] in [-1, 1], on the model's device.
        film: intermediate states; None unless they were requested.
    """

    images: Tensor
    film: Film | None = None


@dataclass(frozen=True)
class Painter:
    """A denoiser with everything that drawing needs besides a request.

    Attributes:
        denoiser: the denoiser, without guidance and clipping.
        schedule: noise schedule of the denoiser.
        guides: networks and conditions that the guidance needs.
        shape: shape of a picture, (C, H, W).
        device: device on which pictures are drawn.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    guides: Guides
    shape: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True)
class Drawing:
    """A request to draw N pictures, which can be joined with others into one network batch.

    Attributes:
        noise: random numbers of each picture.
        sampling: sampling settings.
        cond: labels or text of the pictures; None for none.
        task: how the pictures are drawn: from noise, or from images.
        negative: label or text to move away from, instead of the null condition, in classifier-free guidance; None for
            none.
        film: number of intermediate states to keep; 0 for none.
    """

    noise: Noise
    sampling: Sampling
    cond: Conditioning | None = None
    task: Task = field(default_factory=FromNoise)
    negative: Conditioning | None = None
    film: int = 0

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.noise)

    @property
    def shared(self) -> Hashable:
        """The settings that all pictures share: drawings of one model can be joined if these are equal."""
        conditions = tuple(None if cond is None else cond.present for cond in (self.cond, self.negative))
        return self.sampling, self.task.shared, self.film, self.noise.other is None, conditions

    def check(self, model: Model) -> None:
        """Check that a model can draw these pictures.

        Raises:
            ValueError: it cannot; the message says what it can.
        """
        count, spec, negative = len(self), model.spec, self.negative
        check_count(count, spec)
        check_steps(self.sampling.sampler.steps, model.schedule)
        for name, given in (("the condition", self.cond), ("the negative condition", negative)):
            if given is not None:
                check_condition(name, given, spec, count)
        if negative is not None and self.sampling.guidance.scale == 1:
            raise ValueError("a negative prompt has no effect at guidance scale 1: use a larger one")
        self.task.check(model, self.sampling, count)
        self.sampling.wrap(model.denoiser, model.schedule, replace(model.guides, negative=negative))  # or raise

    def evaluations(self, model: Model) -> int:
        """Return the number of sampling steps of a picture."""
        return self.task.evaluations(self.sampling, model.schedule)

    def draw(
        self,
        model: Model,
        *,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
        finished: Callable[[int, Tensor], None] | None = None,
    ) -> Drawn:
        """Return the pictures, on the model's device.

        Args:
            batch_size: pictures per network call.
            progress: called with (done, total) in sampling steps.
            finished: called with each batch as soon as it is drawn: the index of its first picture and the pictures
                [B, C, H, W].

        Raises:
            ValueError: the model cannot do what is asked; the message says what it can.
        """
        self.check(model)
        device = next(model.network.parameters()).device
        painter = Painter(model.denoiser, model.schedule, model.guides, model.spec.shape, device)
        return paint(painter, self, batch_size=batch_size, progress=progress, finished=finished)


def draw(
    model: Model,
    noise: Noise,
    cond: Conditioning | None = None,
    task: Task | None = None,
    *,
    sampling: Sampling | None = None,
    negative: Conditioning | None = None,
    film: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
) -> Drawn:
    """Return pictures of a model, by default from noise and with the model's own settings; see `Drawing.draw`.

    Examples:
        >>> from ddpm.model import ModelSpec
        >>> from ddpm.models import UNetConfig
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> model = Model(ModelSpec(config, {"kind": "linear"}, "v", image_size=8), config.build())  # untrained
        >>> draw(model, Noise.of([7, 8]), sampling=Sampling.of(steps=2)).images.shape
        torch.Size([2, 3, 8, 8])
    """
    drawing = Drawing(noise, sampling or model.spec.sampling, cond, task or FromNoise(), negative, film)
    return drawing.draw(model, batch_size=batch_size, progress=progress, finished=finished)


# Not inference mode: classifier guidance differentiates through x_t.
@torch.no_grad()
def paint(
    painter: Painter,
    drawing: Drawing,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
) -> Drawn:
    """Return pictures without checking the request; see `Drawing.draw`.

    Every picture of this package is drawn here, so that served pictures are drawn exactly like evaluated ones.

    Examples:
        >>> from ddpm.prediction import NetworkDenoiser
        >>> from ddpm.schedule import Linear
        >>> schedule = Linear().make(1000)
        >>> grey = NetworkDenoiser(lambda x, row, cond: 0 * x + 0.5, schedule, "x0")
        >>> painter = Painter(grey, schedule, Guides(), (1, 2, 2), torch.device("cpu"))
        >>> drawn = paint(painter, Drawing(Noise.of([7, 8]), Sampling.of(steps=4), film=2))
        >>> drawn.images.shape, drawn.images.unique().tolist(), drawn.film.t
        (torch.Size([2, 1, 2, 2]), [0.5], (750, 0))
    """
    device, shape, sampling = painter.device, painter.shape, drawing.sampling
    starts = range(0, len(drawing), batch_size)
    each = drawing.task.evaluations(sampling, painter.schedule)
    parts, films = [], []
    for number, first in enumerate(starts):
        span = slice(first, first + batch_size)
        noise = drawing.noise.map(lambda tensor, span=span: tensor[span].to(device))  # type: ignore[misc]
        cond, negative = (
            None if given is None else given[span].to(device) for given in (drawing.cond, drawing.negative)
        )
        guides = replace(painter.guides, negative=negative)
        batch = TaskBatch(
            painter.denoiser, painter.schedule, sampling, guides, cond, noise.initial(shape), noise.steps(shape)
        )
        reel = _Reel(each, drawing.film)
        steps = reel.watch(drawing.task.part(span, device)(batch))
        parts.append(last(_counted(steps, number * each, each, len(starts) * each, progress)).clamp(-1, 1))
        films.append(reel)
        if finished is not None:
            finished(first, parts[-1])
    return Drawn(torch.cat(parts), _spliced(films) if drawing.film else None)


def join(drawings: Sequence[Drawing]) -> Drawing:
    """Return one drawing of the pictures of several, in order; the drawings must be equal in `shared`.

    Examples:
        >>> drawings = [Drawing(Noise.of(seeds), Sampling()) for seeds in ([1, 2], [3])]
        >>> join(drawings).noise.seeds.tolist()
        [1, 2, 3]
    """
    first, *others = drawings
    if not others:
        return first
    assert all(other.shared == first.shared for other in others)
    return replace(
        first,
        noise=Noise.join([each.noise for each in drawings]),
        cond=_joined([each.cond for each in drawings]),
        task=first.task.join([each.task for each in others]),
        negative=_joined([each.negative for each in drawings]),
    )


def cut(drawn: Drawn, counts: Sequence[int]) -> list[Drawn]:
    """Split pictures that were drawn together into parts.

    Args:
        counts: number of pictures in each part; they add up to all pictures.

    Examples:
        >>> [len(part.images) for part in cut(Drawn(torch.zeros(3, 1, 8, 8)), [2, 1])]
        [2, 1]
    """
    images, film = drawn.images.split(list(counts)), drawn.film
    if film is None:
        return [Drawn(part) for part in images]
    x_t, x0 = film.x_t.split(list(counts), dim=1), film.x0.split(list(counts), dim=1)
    return [Drawn(part, replace(film, x_t=noisy, x0=clean)) for part, noisy, clean in zip(images, x_t, x0, strict=True)]


def _joined(conditions: Sequence[Conditioning | None]) -> Conditioning | None:
    given = [cond for cond in conditions if cond is not None]
    return Conditioning.join(given) if given else None


def _counted(
    samples: Iterator[Sample], before: int, each: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[Sample]:
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


def _spliced(reels: list[_Reel]) -> Film:
    states: Any = zip(*(reel.frames for reel in reels), strict=True)
    rows = [(states_at[0][0], *(torch.cat([s[k] for s in states_at]) for k in (1, 2))) for states_at in states]
    return Film(
        tuple(t for t, _, _ in rows), torch.stack([x for _, x, _ in rows]), torch.stack([x for _, _, x in rows])
    )
