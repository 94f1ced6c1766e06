"""What is to be drawn, as a value that can be joined with others into one network batch and cut out of it again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.inference.draw import Drawn, check_drawing, draw
from ddpm.inference.noise import Noise
from ddpm.inference.tasks import FromNoise, Task
from ddpm.model import Model


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn; see `draw` for its parts.

    Attributes:
        noise: of each of N pictures.
        sampling: the settings.
        cond: labels or text of the pictures; None for none.
        task: how they are drawn.
        negative: label or text to move away from; None for none.
        film: number of states to keep of the way to the pictures; 0 for none.
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
        """What all its pictures have in common: drawings of one model that are equal in it can be joined."""
        conditions = tuple(None if cond is None else cond.present for cond in (self.cond, self.negative))
        return self.sampling, self.task.shared, self.film, self.noise.other is None, conditions

    def check(self, model: Model) -> None:
        """Check that a model can draw this.

        Raises:
            ValueError: it cannot; the message says what it can.
        """
        check_drawing(model, self.task, self.sampling, self.noise, self.cond, self.negative)

    def evaluations(self, model: Model) -> int:
        """Return the steps in which a model draws a picture."""
        return self.task.evaluations(self.sampling, model.schedule)

    def draw(
        self,
        model: Model,
        *,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
        finished: Callable[[int, Tensor], None] | None = None,
    ) -> Drawn:
        """Return the pictures; see `draw`."""
        return draw(
            model,
            self.noise,
            self.cond,
            self.task,
            sampling=self.sampling,
            negative=self.negative,
            batch_size=batch_size,
            film=self.film,
            progress=progress,
            finished=finished,
        )


def join(drawings: Sequence[Drawing]) -> Drawing:
    """Return the drawing of the pictures of several, which are equal in `shared`, one after another."""
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
    """Return the parts of what was drawn together: as many pictures each as there are counts.

    Args:
        counts: pictures of each part; they add up to all.
    """
    images, film = drawn.images.split(list(counts)), drawn.film
    if film is None:
        return [Drawn(part) for part in images]
    x_t, x0 = film.x_t.split(list(counts), dim=1), film.x0.split(list(counts), dim=1)
    return [Drawn(part, replace(film, x_t=noisy, x0=clean)) for part, noisy, clean in zip(images, x_t, x0, strict=True)]


def _joined(conditions: Sequence[Conditioning | None]) -> Conditioning | None:
    given = [cond for cond in conditions if cond is not None]
    return Conditioning.join(given) if given else None
