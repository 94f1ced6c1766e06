"""Signs that a training does not work, and the setting that helps: pure functions of what rank 0 knows anyway.

The bounds leave room on the side of silence: every shipped experiment passes them from its first image to its last.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipelines.config import Config, OptimConfig
from pipelines.presentation.progress import NOT_WORKING
from pipelines.training.loop.progress import StepResult

logger = logging.getLogger(__name__)
LOW_SNR = 1 / 400
"""Signal-to-noise ratio at which predicted images are compared with the mean image: nearly all is noise there."""
WORSE_THAN_MEAN = 1.5
JUDGED_FROM = 0.25
"""Share of the run before which samples and predictions are not judged: they are allowed to be bad."""
LEAST_STEPS = 200
"""Steps of a run before which nothing is judged."""
FIRST_STEPS, FALLEN = 5, 0.9
"""Share of the mean loss of the first steps that a loss should have fallen to."""
RISEN, STEEPER = 1.5, 3.0
"""Factors of the lowest logged loss, and of the gradient's norm there, above which the rate is too high."""
BRIGHTNESS, CONTRAST = 0.15, 0.3
"""How far outside that of real images the mean of a sample lies, of 0..1, and the share of the least contrast of real
images that a sample has, for it to be called grey, black or white."""
SOME_BAD, MOST_BAD = 0.1, 0.5
"""Shares of such samples: from the first on poor predictions are taken to be at fault, beyond the second all are."""


def say(faults: Iterable[str]) -> None:
    """Log faults as warnings, which reach the driver's terminal and the page of the run."""
    for text in faults:
        logger.warning("%s", text)


def expected_faults(config: Config) -> list[str]:
    """Return the faults that the configuration alone shows, one line each, before anything starts."""
    found = []
    conditional = config.model.class_conditional or config.model.text_dim > 0
    guided = config.guidance.kind == "classifier_free" and config.guidance.scale != 1
    if config.task == "denoiser" and conditional and guided and config.objective.label_drop == 0:
        found.append(
            f"guidance.scale = {config.guidance.scale:g} needs samples without a condition, which "
            "objective.label_drop = 0 never trains: set objective.label_drop=0.1, or guidance.scale=1"
        )
    if config.objective.loss == "consistency":
        found += _expected_of_consistency(config, guided)
    if config.optim.warmup_images >= config.images:
        found.append(
            f"optim.warmup_images = {config.optim.warmup_images:,} is as long as the run, so that the learning rate "
            f"never reaches optim.lr: set optim.warmup_images={max(1, config.images // 20)}"
        )
    return found


def _expected_of_consistency(config: Config, guided: bool) -> list[str]:
    """Return the faults in the configuration of a consistency model.

    Args:
        guided: whether samples are drawn with classifier-free guidance.
    """
    found, folded = [], config.objective.consistency_guidance
    if config.sampler.kind != "consistency":
        found.append(
            f"sampler.kind = {config.sampler.kind} takes the model for a denoiser, which objective.loss = consistency "
            "tunes it away from: set sampler=consistency"
        )
    if guided and folded not in (None, 1):
        found.append(
            f"guidance.scale = {config.guidance.scale:g} guides a model that has guidance folded in by "
            f"objective.consistency_guidance = {folded:g}: set guidance.scale=1"
        )
    return found


@dataclass
class Health:
    """Judges the curves of a run while it trains; each fault is told once in an attempt.

    Args:
        config: of the run.
        resumed_at: images seen where the attempt begins.
        length: of the run in images, where it is corrected while it trains; None: as configured.
    """

    config: Config
    resumed_at: int
    length: int | None = None
    told: set[str] = field(default_factory=set)
    first: list[float] = field(default_factory=list)
    points: int = 0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=2))
    calmest: tuple[float, float] = (math.inf, math.inf)

    def step(self, loss: float) -> None:
        """Add the loss of a step; later losses are compared with the first ones."""
        if len(self.first) < FIRST_STEPS and math.isfinite(loss):
            self.first.append(loss)

    def curves(self, images_seen: int, loss: float, grad_norm: float) -> list[str]:
        """Return the faults that a logged point of the curves shows.

        Args:
            loss: mean since the last point.
            grad_norm: likewise.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return []  # steps like that are left out and warned of by themselves
        if len(self.recent) == 2:
            self.calmest = min(self.calmest, self.recent[0])
        self.recent.append((loss, grad_norm))
        self.points += 1
        if images_seen < LEAST_STEPS * self.config.batch_size or self.points < 4:
            return []
        if self.config.objective.loss == "consistency":
            return []  # losses of two stages are not comparable
        lr = self.config.optim.lr
        lowest, calm = self.calmest
        if all(at > RISEN * lowest and norm > STEEPER * calm for at, norm in self.recent):
            return self._once(
                "rate",
                f"the loss has risen from {lowest:.3g} to {loss:.3g} and the gradient's norm from {calm:.2g} to "
                f"{grad_norm:.2g}: the learning rate is too high; set optim.lr={lr / 3:.2g} in a new run",
            )
        new = self.resumed_at == 0 and self.config.init_from is None and len(self.first) == FIRST_STEPS
        before = sum(self.first) / max(len(self.first), 1)
        if new and images_seen >= JUDGED_FROM * (self.length or self.config.images) and loss > FALLEN * before:
            remedy = f"optim.lr={3 * lr:.2g}" if grad_norm < 1 else f"optim.lr={lr / 3:.2g}"
            return self._once(
                "loss",
                f"the loss is {loss:.3g} after {images_seen:,} images and was {before:.3g} in the first steps: it does "
                f"not fall; try {remedy}, and look at the data with `ddpm check {self.config.data.uri}`",
            )
        return []

    def prediction(self, images_seen: int, error: float, mean_error: float, bad: float) -> list[str]:
        """Return the fault of predictions where nearly all is noise, where samples show it.

        They may be poor and the samples good: on images of 8 pixels the steps after the first ones make up for them.

        Args:
            error: mean squared error of the predicted x_0 of test images at the ratio `LOW_SNR`, clipped.
            mean_error: of their mean image.
            bad: share of `blank` samples.
        """
        if self._too_early(images_seen) or error <= WORSE_THAN_MEAN * mean_error or bad < SOME_BAD:
            return []
        if self.config.objective.loss == "consistency":
            return []  # it predicts one image instead of the mean, twice as far off as that
        eps = self.config.objective.prediction == "eps"
        remedy = "objective.prediction=v in a new run" if eps else "more images, or a lower optim.lr in a new run"
        return self._once(
            "prediction",
            f"where nearly all is noise, predicted images are {error / mean_error:.1f} times as far off as the mean "
            f"image ({error:.2g} against {mean_error:.2g}), and {bad:.0%} of the samples in the grid are brighter, "
            f"darker or flatter than any real image: use {remedy}",
        )

    def samples(self, images_seen: int, drawn: NDArray[np.uint8], real: NDArray[np.uint8]) -> list[str]:
        """Return the faults of samples that show no picture.

        Args:
            drawn: samples, uint8 [N, H, W, C].
            real: test images, likewise.
        """
        if self._too_early(images_seen) or len(real) < 8 or len(drawn) < 8:
            return []
        bad = blank(drawn, real)
        if bad <= MOST_BAD:
            return []
        level = float(drawn.mean()) / 255
        colour = "white" if level > 0.8 else "black" if level < 0.2 else "grey"
        eps = self.config.objective.prediction == "eps"
        remedies = ["objective.prediction=v in a new run"] if eps else []
        if self.config.guidance.scale > 2:
            remedies.append(f"guidance.scale={1 + (self.config.guidance.scale - 1) / 2:g}")
        remedies.append("more images")
        return self._once(
            "samples",
            f"{bad:.0%} of the samples in the grid are brighter, darker or flatter than any real image, nearly "
            f"{colour}: use {' or '.join(remedies)}",
        )

    def _too_early(self, images_seen: int) -> bool:
        least = max(JUDGED_FROM * (self.length or self.config.images), LEAST_STEPS * self.config.batch_size)
        return self.config.task != "denoiser" or images_seen < least

    def _once(self, kind: str, text: str) -> list[str]:
        """Return a line where none of its kind has been returned before."""
        if kind in self.told:
            return []
        self.told.add(kind)
        return [NOT_WORKING + text]


def blank(drawn: NDArray[np.uint8], real: NDArray[np.uint8]) -> float:
    """Return the share of samples with a brightness or contrast unlike that of any real image.

    Args:
        drawn, real: uint8 [N, H, W, C].
    """
    levels, contrasts = (_statistic(drawn, "mean"), _statistic(drawn, "std"))
    known, kept = (_statistic(real, "mean"), _statistic(real, "std"))
    outside = (levels < known.min() - BRIGHTNESS) | (levels > known.max() + BRIGHTNESS)
    return float((outside | (contrasts < CONTRAST * kept.min())).mean())


def _statistic(images: NDArray[np.uint8], name: str) -> NDArray[np.float64]:
    """Return the mean or deviation of each image's pixels, of 0..1."""
    found: NDArray[np.float64] = getattr(images.reshape(len(images), -1) / 255.0, name)(axis=1)
    return found


class SkipGuard:
    """Stops a run whose losses or gradients stay not finite, and names the samples they came from."""

    def __init__(self, optim: OptimConfig, batch_size: int) -> None:
        self.optim, self.batch_size = optim, batch_size
        self.in_row = 0

    def check(self, result: StepResult, images_seen: int) -> str | None:
        """Return a warning about a step that ended at `images_seen`; None where it updated the weights.

        A step that lowered the loss scale of fp16 is no reason for concern and not counted: that is how the scale is
        found.

        Raises:
            FloatingPointError: `optim.max_skipped` updates in a row were left out.
        """
        if result.updated:
            self.in_row = 0
            return None
        if result.rescaled:
            return None
        self.in_row += 1
        found = f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        if self.in_row >= self.optim.max_skipped:
            first = images_seen - self.in_row * self.batch_size
            raise FloatingPointError(
                f"{self.in_row} updates in a row were not finite ({found}), on samples {first}..{images_seen - 1} of "
                "the stream: lower optim.lr, set optim.grad_clip, or use optim.precision=fp32"
            )
        first = images_seen - self.batch_size
        return f"update left out: {found} on samples {first}..{images_seen - 1} of the stream"
