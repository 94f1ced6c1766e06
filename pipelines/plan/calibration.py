"""The measured constants of plans, in `calibration.json`, with when, where and how each was measured."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

FILE = Path(__file__).with_name("calibration.json")


class MeasuredConstants(BaseModel):
    """Constants that were measured together.

    Attributes:
        date: day of the measurement.
        machine: machine on which they were measured.
        written_by: command that writes them, or the measurement that they were taken from by hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: date
    machine: str
    written_by: str


class StageTimes(MeasuredConstants):
    """Fixed costs of the stages of `ddpm flow`, in seconds.

    Attributes:
        workers_s: connecting to Ray, opening the run, starting the workers and storing the last checkpoint.
        register_s: logging, signing and registering a version, and recording the decision of the gate.
        ingest_s: an ingest, without the time of its images.
        tasks_s: time until Ray tasks write the first image.
        evaluator_s: start of the processes that train the evaluator.
        scores_s: start of the processes that draw samples, and computing and plotting of the scores.
    """

    workers_s: PositiveFloat
    register_s: PositiveFloat
    ingest_s: PositiveFloat
    tasks_s: PositiveFloat
    evaluator_s: PositiveFloat
    scores_s: PositiveFloat


class WorkerSpeed(MeasuredConstants):
    """Speed of parallel workers on one machine.

    Attributes:
        shared_speed: speed of one of several workers on the cores of a machine, beside services, relative to bare
            processes that compute at the same time, where steps are long; see docs/performance.md.
    """

    shared_speed: PositiveFloat


class Exchange(MeasuredConstants):
    """Costs of a worker beyond its bare steps.

    Trainings of 1.6 to 1.8 million parameters in batches of 16 and 32 took 0.77 to 1.15 times as long as this and
    `WorkerSpeed` predict, on one host on three days: the length of a plan is a first guess, see `Config.training_s`.

    Attributes:
        alone_speed: speed of a single worker relative to its bare steps.
        seconds_per_million: seconds that a step of several workers on one machine takes longer for each million
            parameters, whose gradients they exchange when the slowest of them is done.
    """

    alone_speed: PositiveFloat
    seconds_per_million: PositiveFloat


class JudgingCosts(MeasuredConstants):
    """Costs of judging a model.

    Attributes:
        encode_share: time of the evaluator on a real image, as a share of a step of its training.
        likelihood_evaluations: network evaluations of the bound and of the ODE for one image, default schedule.
        passes: evaluator -> passes over its images where time does not matter.
        least_passes: fewest passes. After two passes over 4,000 digits it is right about 96.7 % of others, after three
            about 96.9 %, after one about 91.8 %.
    """

    encode_share: PositiveFloat
    likelihood_evaluations: PositiveInt
    passes: Mapping[str, PositiveInt]
    least_passes: PositiveInt


class NetworkNeeds(MeasuredConstants):
    """Training of the networks that plans choose from.

    Attributes:
        images_needed: network -> training images of up to 32 pixels from which on it beats the next smaller network in
            the same time.
        learning_rates: network -> learning rate at a batch size of 128.
    """

    images_needed: Mapping[str, NonNegativeInt]
    learning_rates: Mapping[str, PositiveFloat]


class SamplingDefaults(MeasuredConstants):
    """How plans draw samples.

    Attributes:
        steps: network evaluations of a sample with DPM-Solver++: on digits 8 are as good as 50 of DDIM, see
            docs/few-steps.md.
        guidance_scale: guidance scale after a long training.
        short_guidance_scale: guidance scale after a short one, whose samples would otherwise often not be of their
            class; see docs/performance.md.
        short_training_images: training images of up to 32 pixels below which a training is short.
    """

    steps: PositiveInt
    guidance_scale: PositiveFloat
    short_guidance_scale: PositiveFloat
    short_training_images: PositiveInt


class Calibration(BaseModel):
    """All measured constants of plans, in groups that are measured together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: StageTimes
    workers: WorkerSpeed
    exchange: Exchange
    judging: JudgingCosts
    networks: NetworkNeeds
    sampling: SamplingDefaults


CALIBRATION = Calibration.model_validate_json(FILE.read_text())
