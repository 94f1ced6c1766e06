"""Division of a budget over the stages of `ddpm flow`: the cost of each on a machine, and what is left for training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddpm.image_size import as_setting
from pipelines.plan.budget import format_duration, written
from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.facts import MachineFacts, Plan, SourceFacts, Speed
from pipelines.plan.networks import Candidate
from pipelines.presentation.errors import ConfigError
from pipelines.shards.ingest.write import ALONE_S

SPARE = 0.05
"""Share of the budget that stays free, because speeds vary."""
JUDGE_SHARE, SCORE_SHARE, LIKELIHOOD_SHARE, GRID_SHARE = 0.12, 0.15, 0.03, 0.04
"""Largest shares of the budget for training the evaluator, for drawing samples that are scored and for likelihoods, and
of the training for sample grids, which have at least `LEAST_GRID` images."""
LEAST_GRID = 8
LEAST_TRAINING_S = 15.0
WORTH = 1.1
"""Speed-up over one worker from which on several are used: parts of a batch take longer per image than all of it."""
JUDGE_BATCH = 64
SAMPLES, LEAST_SAMPLES = 1_000, 48


@dataclass(frozen=True)
class Judging:
    """The evaluation of a model within its share of the budget.

    Attributes:
        kind: kind of evaluator.
        passes: passes over the images in the training of the evaluator.
        n: samples per noise seed.
        seeds: number of noise seeds.
        likelihood_images: test images whose likelihood is computed.
        seconds: stage -> seconds.
    """

    kind: str
    passes: int
    n: int
    seeds: int
    likelihood_images: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Grids:
    """The sample grids of a training.

    Attributes:
        count: number of grids after the first step; there is one more before it.
        images: images per grid.
        seconds: seconds of all grids together.
    """

    count: int
    images: int
    seconds: float


def processes(machine: MachineFacts) -> int:
    """Return the number of parallel processes: one per GPU, or else one per core."""
    return machine.gpus or machine.cores


def together(machine: MachineFacts) -> float:
    """Return the speed of each of these processes beside services, relative to bare processes at the same time."""
    several = not machine.gpus and machine.cores > 1
    return CALIBRATION.workers.shared_speed if several else CALIBRATION.exchange.alone_speed


def training_rate(speed: Speed, machine: MachineFacts, workers: int, batch: int) -> float:
    """Return images per second of `workers` workers that share a batch."""
    alone = speed.train_in_steps_of(batch / workers)
    if workers == 1:
        return alone * CALIBRATION.exchange.alone_speed / machine.together  # the other cores are free then
    exchange_s = 0.0 if machine.gpus else CALIBRATION.exchange.seconds_per_million * speed.parameters / 1e6
    return batch / (batch / workers / (alone * together(machine)) + exchange_s)


def gain_of_workers(machine: MachineFacts) -> float:
    """Return the speed-up of one worker per process over a single worker."""
    return processes(machine) * machine.together * together(machine) / CALIBRATION.exchange.alone_speed


def workers(machine: MachineFacts) -> int:
    """Return the number of workers: one per process, or a single one if several would hardly be faster."""
    return processes(machine) if gain_of_workers(machine) >= WORTH else 1


def drawing_rate(speed: Speed, machine: MachineFacts) -> float:
    """Return network evaluations per second, of single images, of all processes together while samples are drawn."""
    return _of_all(speed.draw, machine)


def _of_all(rate: float, machine: MachineFacts) -> float:
    return rate * processes(machine) * together(machine)


def grids(speed: Speed, machine: MachineFacts, training_s: float, evaluations: int) -> Grids:
    """Return the sample grids of a training of `training_s` seconds.

    Args:
        evaluations: network evaluations per sample.
    """
    # The workers share a grid, with so few images each that together they are no faster than one with many.
    of_sample = evaluations / (speed.draw * together(machine))
    affordable = int(GRID_SHARE * training_s / of_sample)
    images = min(64, max(LEAST_GRID, affordable // 5))
    count = max(1, min(12, affordable // images - 1))
    return Grids(count, images, (count + 1) * images * of_sample)


def judging(
    source: SourceFacts,
    machine: MachineFacts,
    candidate: Candidate,
    budget_s: float,
    evaluations: int,
    texts: bool,
    compared: bool,
) -> Judging:
    """Return how the model is evaluated.

    Args:
        candidate: the network that draws the samples, whose speed was measured.
        evaluations: network evaluations per sample.
        texts: whether prompts are judged too, by a separate network.
        compared: whether the gate will compare the model with a version that has the alias.
    """
    kind = "classifier" if len(source.class_counts) > 1 else "contrastive"
    # The evaluator sees half of the images, or all where they are few; see `evaluation.evaluators.share`.
    shown = source.train_images if source.train_images < 1_000 else min(source.train_images // 2, 50_000)
    speed = machine.speeds[candidate.key]
    judge_step_s = machine.judge_step_s.get(as_setting(candidate.size), 0.02) * (2 if texts else 1)
    of_pass = math.ceil(shown / JUDGE_BATCH) * judge_step_s
    passes = min(
        CALIBRATION.judging.passes[kind],
        max(CALIBRATION.judging.least_passes, int(JUDGE_SHARE * budget_s / max(of_pass, 1e-9))),
    )
    rate = drawing_rate(speed, machine)
    affordable = int(SCORE_SHARE * budget_s * rate / evaluations)
    # The samples of each seed are drawn once for the scores; the gate draws those of the first seed for two versions. A
    # first version gets as many, because the second is compared with it.
    most = max(LEAST_SAMPLES, min(max(source.test_images, 256), SAMPLES))
    seeds = 3 if affordable >= 5 * min(most, 256) else 1
    n = max(LEAST_SAMPLES, min(most, affordable // (seeds + 2)))
    of_likelihood = CALIBRATION.judging.likelihood_evaluations / _of_all(speed.evaluate, machine)
    likely = int(LIKELIHOOD_SHARE * budget_s / of_likelihood)
    likelihood = min(32, likely, source.test_images) if likely >= 4 else 0
    drawn = n * (seeds + (2 if compared else 0)) * evaluations / rate + likelihood * of_likelihood
    encoded = source.images / _of_all(JUDGE_BATCH / (CALIBRATION.judging.encode_share * judge_step_s), machine)
    # The network that judges prompts is trained as long as the evaluator, when the scores are computed.
    trained, of_prompts = (of_pass * passes / 2, of_pass * passes / 2) if texts else (of_pass * passes, 0.0)
    spent = {"evaluator": trained, "scores": of_prompts + drawn + encoded}
    seconds = {stage: fixed + spent[stage] for stage, fixed in _judging_seconds().items()}
    return Judging(kind, passes, n, seeds, likelihood, seconds)


def _judging_seconds() -> dict[str, float]:
    return {"evaluator": CALIBRATION.stages.evaluator_s, "scores": CALIBRATION.stages.scores_s}


def fixed_seconds(source: SourceFacts, machine: MachineFacts) -> dict[str, float]:
    """Return the seconds of the stages that do not depend on any choice."""
    writing = source.images * source.write_s + source.captions * source.caption_s
    if writing > ALONE_S:
        writing = CALIBRATION.stages.tasks_s + writing / machine.cores
    return {
        "look and measure": machine.looking_s,
        "start": machine.start_s + CALIBRATION.stages.workers_s,
        "ingest": CALIBRATION.stages.ingest_s + writing,
        "register": CALIBRATION.stages.register_s,
    }


def training_ends_s(plan: Plan) -> float:
    """Return the second of a plan's budget at which its training should end, without the start of the workers."""
    after = CALIBRATION.stages.workers_s + plan.seconds["scores"] + plan.seconds["register"]
    return plan.budget_s * (1 - SPARE) - after


def check_budget(budget_s: float) -> None:
    """Refuse a budget that is too short for every source and machine, before anything is examined or measured.

    Raises:
        ConfigError: the message names the smallest budget that may suffice.
    """
    stages = CALIBRATION.stages
    before = {"start": stages.workers_s, "ingest": stages.ingest_s}
    left_for_training(budget_s, before | _judging_seconds() | {"register": stages.register_s})


def left_for_training(budget_s: float, spent: dict[str, float]) -> float:
    """Return the seconds of a budget that are left after the other stages and the reserve.

    Raises:
        ConfigError: it is too little for any training; the message names the smallest budget.
    """
    left = budget_s * (1 - SPARE) - sum(spent.values())
    if left < LEAST_TRAINING_S:
        fixed = sum(spent.values()) + LEAST_TRAINING_S
        least = math.ceil(fixed / (1 - SPARE - JUDGE_SHARE - SCORE_SHARE) / 30) * 30
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in spent.items())
        raise ConfigError(
            f"budget = {written(budget_s)} leaves no time to train: the other stages take {parts}; "
            f"give budget={written(max(least, budget_s + 30))} or more"
        )
    return left
