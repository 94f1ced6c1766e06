"""The choices of a plan: image size, network, methods, workers, batch and length, for a source on a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.plan import clock
from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.facts import MachineFacts, SourceFacts, Speed, UserOverrides
from pipelines.plan.networks import Candidate, candidates
from pipelines.presentation.errors import ConfigError

SAMPLING = CALIBRATION.sampling
PIECE = {"cpu": 32, "cuda": 128}
"""Images of a measured step; fewer for large images on a CPU."""
MOST_PASSES = 1_000
LEAST_CAP = 50_000


@dataclass(frozen=True)
class Basis:
    """The values from which the lines of a plan are written.

    Attributes:
        labels, texts: whether the network is conditioned on classes and on captions.
        candidate: the chosen network and size.
        speed: measured speed of the candidate.
        workers: number of workers.
        batch: images per step.
        images: length of the training in images.
        training_s: seconds of the training.
        grids: sample grids of the training.
        judging: how the model is judged.
        seconds: stage -> seconds, for all stages.
    """

    labels: bool
    texts: bool
    candidate: Candidate
    speed: Speed
    workers: int
    batch: int
    images: int
    training_s: float
    grids: clock.Grids
    judging: clock.Judging
    seconds: dict[str, float]

    @property
    def guided(self) -> bool:
        """Whether there is a condition for guidance."""
        return self.labels or self.texts

    @property
    def scale(self) -> float:
        """The guidance scale of samples."""
        if self.candidate.recipe is not None:
            return self.candidate.recipe.guidance_scale
        short = self.images < SAMPLING.short_training_images * self.candidate.effort
        return SAMPLING.short_guidance_scale if short else SAMPLING.guidance_scale


def check_source(source: SourceFacts) -> None:
    """Refuse a source on which no model can be trained and scored.

    Raises:
        ConfigError: the message says why, and what to do.
    """
    if source.opened == source.unreadable:
        raise ConfigError(f"{source.source}: none of the {source.opened} images that were opened can be read")
    if source.train_images < 2 or source.test_images < 2:
        raise ConfigError(
            f"{source.source} has {source.images} images, {source.test_images} of them in the test split, with which "
            "samples are compared: each split needs at least two; add images, or set data.test_fraction"
        )


def choose(source: SourceFacts, machine: MachineFacts, budget_s: float, user: UserOverrides, compared: bool) -> Basis:
    """Return the network, size, batch and length that fit the budget.

    It takes the largest size at which a network other than the narrowest sees the images that it needs, and the largest
    network of that size that does.

    Args:
        compared: as for `clock.judging`.

    Raises:
        ConfigError: nothing fits, or the source has too few images; the message says what to do.
    """
    check_source(source)
    measured = [candidate for candidate in candidates(source, user) if candidate.key in machine.speeds]
    if not measured:
        raise ConfigError(
            f"no network could be measured on {machine.where}: choose a smaller one with model.channels=…, "
            "or a smaller data.image_size"
        )
    found: list[Basis] = []
    for candidate in measured:
        try:
            found.append(_basis(source, machine, budget_s, user, candidate, compared))
        except ConfigError:
            if candidate is measured[0]:
                raise
    enough = [basis for basis in found if basis.images >= basis.candidate.needed]
    larger = [basis for basis in enough if basis.candidate.network != "narrow"] or enough or found[:1]
    most = max(basis.candidate.pixels for basis in larger)
    return [basis for basis in larger if basis.candidate.pixels == most][-1]


def _basis(
    source: SourceFacts,
    machine: MachineFacts,
    budget_s: float,
    user: UserOverrides,
    candidate: Candidate,
    compared: bool,
) -> Basis:
    """Return the plan of a candidate.

    Raises:
        ConfigError: the budget leaves no time to train it.
    """
    labels = bool(user.get("model.class_conditional", len(source.class_counts) > 1))
    texts = bool(user.get("model.text_dim", source.encoder_width if uses_captions(source, user) else 0))
    guided = (
        (labels or texts)
        and user.get("guidance.scale", SAMPLING.guidance_scale) != 1
        and user.get("guidance", "") != "none"
    )
    recipe = candidate.recipe
    own = SAMPLING.steps if recipe is None else recipe.evaluations
    evaluations = int(user.get("sampler.steps", own)) * (2 if guided else 1)
    speed = machine.speeds[candidate.key]
    judging = clock.judging(source, machine, candidate, budget_s, evaluations, texts, compared)
    fixed = clock.fixed_seconds(source, machine) | judging.seconds
    training_s = float(user.get("training_s", None) or clock.left_for_training(budget_s, fixed))
    workers = _workers(machine, user)

    grids = clock.grids(speed, machine, training_s, evaluations)

    def possible(batch: int) -> float:
        return max(0.0, training_s - grids.seconds) * clock.training_rate(speed, machine, workers, batch)

    batch = int(user.get("batch_size", batch_size(possible, machine) if recipe is None else recipe.batch))
    rate = clock.training_rate(speed, machine, workers, batch)
    images = int(user.get("images", max(1, min(int(possible(batch)), most_images(source)) // batch) * batch))
    grids = clock.grids(speed, machine, images / rate / (1 - clock.GRID_SHARE), evaluations)
    seconds = fixed | {"train": images / rate + grids.seconds}
    ordered = ["look and measure", "start", "ingest", "train", "evaluator", "scores", "register"]
    return Basis(
        labels,
        texts,
        candidate,
        speed,
        min(workers, batch),
        batch,
        images,
        seconds["train"],
        grids,
        judging,
        {name: seconds[name] for name in ordered},
    )


def most_images(source: SourceFacts) -> int:
    """Return the number of training images beyond which a model only memorises the source."""
    return max(MOST_PASSES * source.train_images, LEAST_CAP)


def drawing_precision(training: str, user: UserOverrides) -> str:
    """Return the precision in which samples are drawn: bf16 if the training computes in bf16.

    Args:
        training: precision of the forward and backward pass.
    """
    if user.sets("sampler.precision"):  # or the group, whose default is fp32
        return str(user.get("sampler.precision", "fp32"))
    return "bf16" if training == "bf16" else "fp32"


def uses_captions(source: SourceFacts, user: UserOverrides) -> bool:
    """Return whether the network is conditioned on captions, which needs captions and a text encoder."""
    encoder = user.get("data.text_encoder", source.encoder)
    return source.captions > 0 and encoder is not None


def methods(user: UserOverrides) -> dict[str, Any]:
    """Return the settings of loss and optimizer that were best in the comparison of training methods.

    Args:
        user: what the user has set; a method that cannot go with it is left out.
    """
    found: dict[str, Any] = {"objective": "simple", "objective.prediction": "v", "optim.kind": "muon"}
    if user.get("objective.loss", "simple") == "simple":
        found["objective.learned_weight"] = True
    return found


def _workers(machine: MachineFacts, user: UserOverrides) -> int:
    given = user.get("cluster.num_workers", None)
    if given is not None:
        return int(given[-1] if isinstance(given, list | tuple) else given)
    return clock.workers(machine)


def batch_size(possible: Callable[[int], float], machine: MachineFacts) -> int:
    """Return the largest batch size with which a training still has many steps.

    Args:
        possible: batch size -> images that fit into the time of the training.
        machine: machine that trains.
    """
    if machine.gpus:
        large = (batch for batch in (512, 256) if possible(batch) / batch >= 20_000)
        return next(large, 128 if possible(128) >= 128_000 else 64)
    return next((batch for batch in (128, 64, 32) if possible(batch) / batch >= 400), 16)
