"""One trial of a training study: a distributed Ray Train run that is judged at rungs of growing numbers of images."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray import tune
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.quality import FeatureMoments
from pipelines.config import Config, ConfigError
from pipelines.evaluation.evaluators import Encoder
from pipelines.evaluation.real import Real
from pipelines.evaluation.samples import balanced_labels
from pipelines.search.parameters import Params, Value
from pipelines.search.rung_judge import RungJudge
from pipelines.search.seeds import NoiseSeeds
from pipelines.search.space import apply
from pipelines.search.study import trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.shards.captions import Captions
from pipelines.storage import Storage, join
from pipelines.training import driver
from pipelines.training.errors import TrainingError
from pipelines.training.ray_train.monitor import request_stop
from pipelines.training.ray_train.reusable_workers import ReusableWorkers

# Ray Train looks at its workers every two seconds by default, and so notices the end of a trial that much later.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

STOP_S = 120.0
"""Seconds that a run may take to stop: at most its start, a step, and a checkpoint."""


@dataclass(frozen=True)
class Shared:
    """What all trials share, put into Ray's object store once.

    Attributes:
        study: the settings of the study.
        base: the configuration that the trials vary.
        name: of the study.
        lineage: which code runs, see `pipelines.lineage`.
        parent: ID of the study's MLflow run.
        encoder, reference, cond, held_out, held_out_cond: see `RungJudge`.
    """

    study: StudyConfig
    base: Config
    name: str
    lineage: Mapping[str, Any]
    parent: str
    encoder: Encoder
    reference: FeatureMoments
    cond: Conditioning | None
    held_out: Tensor
    held_out_cond: Conditioning | None

    @classmethod
    def of(
        cls,
        study: StudyConfig,
        base: Config,
        name: str,
        lineage: Mapping[str, Any],
        parent: str,
        encoder: Encoder,
        real: Real,
        captions: Captions | None,
        held_out: tuple[Tensor, Conditioning | None],
    ) -> Shared:
        """Return what trials share, of the real images as the evaluator sees them.

        Args:
            captions: that samples of trials on text are drawn from.
            held_out: of `held_out_images`.
        """
        counts, seed = real.train.class_counts, NoiseSeeds.of(base, name).trials
        cond: Conditioning | None = None
        if captions is not None:
            places = torch.arange(min(study.samples, len(captions)))
            cond = captions.shuffled(seed).condition(places, labels=True)
        elif counts:
            cond = Conditioning(label=torch.from_numpy(balanced_labels(real.test.count, counts, seed)))
        images, held_out_cond = held_out
        judging = slice(study.bits_per_dim_images)
        return cls(
            study,
            base,
            name,
            lineage,
            parent,
            encoder,
            real.train.moments,
            cond,
            images[judging].clone(),  # of a part, the whole would be pickled
            None if held_out_cond is None else held_out_cond[judging].map(torch.clone),
        )

    @property
    def seed(self) -> int:
        """The seed of the noise by which all trials are judged."""
        return NoiseSeeds.of(self.base, self.name).trials


def rungs(images: int, batch_size: int, study: StudyConfig) -> tuple[int, ...]:
    """Return the images seen at which trials are judged: the whole length, and it divided by powers of `reduction`.

    Raises:
        ConfigError: the first rung would come before the end of the first batch.
    """
    found = [images // study.reduction**i // batch_size * batch_size for i in range(study.rungs - 1, 0, -1)]
    if found and found[0] < batch_size:
        raise ConfigError(
            f"search.rungs = {study.rungs} with search.reduction = {study.reduction} puts the first rung before the "
            f"first batch: use fewer rungs, or more images than {images:,}"
        )
    return (*found, -(-images // batch_size) * batch_size)


def trial_config(shared: Shared, params: Params) -> Config:
    """Return the configuration of a trial's run: no sample grids, and one checkpoint, from the first rung on.

    At its end a run publishes its checkpoint, whose averaged weights the confirmation loads.
    """
    config, study = apply(shared.base, params), shared.study
    first = rungs(config.images, config.batch_size, study)[0]
    return config.model_copy(
        update={
            "name": f"{shared.name}-{trial_name(params)}",
            "tracking": config.tracking.model_copy(update={"grid_every": None}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every": first, "keep": 1, "publish_every": 2 * config.images, "keep_best": None}
            ),
            "evaluation": config.evaluation.model_copy(update={"every": None}),  # the rungs are scored
            # A failure of the trial itself, such as a loss that is not finite, would repeat.
            "cluster": config.cluster.model_copy(update={"max_failures": min(1, config.cluster.max_failures)}),
        }
    )


class TrainingTrial(tune.Trainable):
    """A Ray Tune trial that runs a training and reports its scores; the actor and its workers are reused.

    The run trains in a thread. A trial that ASHA stops is asked to stop at a step boundary, as by Ctrl-C, before the
    next one begins. If the actor were killed instead, Ray would free its workers and their resources only later.
    """

    shared: Shared
    workers: ReusableWorkers
    run_config: Config
    thread: threading.Thread
    reported: float
    error: BaseException | None

    def setup(self, config: dict[str, Value], *, shared: Shared) -> None:
        """Create the workers of this actor, and begin the first trial."""
        self.shared = shared
        self.workers = ReusableWorkers(shared.name)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """End the present trial, and begin another with the same workers."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next scores and return them; the last ones are returned when the run has ended.

        Raises:
            TrainingError: the run failed.
        """
        while True:
            ended = not self.thread.is_alive()
            if self.error is not None:
                self.workers.close()
                raise self.error
            unreported = self._scores_above(self.reported)
            last = bool(unreported) and unreported[0]["images_seen"] >= self.rungs[-1]
            if unreported and (ended or not last):
                self.reported = unreported[0]["images_seen"]
                return {**unreported[0], "done": last}
            if ended:
                raise TrainingError(f"run '{self.run_config.name}' ended before its last score")
            self.thread.join(0.5)

    def cleanup(self) -> None:
        """Stop the run and the workers at the end of the actor."""
        self._end()
        self.workers.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the run has its own checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: the run resumes from its own checkpoints."""

    def _begin(self, params: Params) -> None:
        """Start the run of a trial in a thread."""
        shared = self.shared
        config = self.run_config = trial_config(shared, params)
        self.storage = Storage.of(config)
        self.uri = join(config.storage.root, "runs", config.name, "scores")
        self.rungs = rungs(config.images, config.batch_size, shared.study)
        self.reported, self.error = -1.0, None
        self.thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        """Train the run to its end; an error is kept for `step`."""
        shared, config = self.shared, self.run_config
        judge = RungJudge(
            self.rungs,
            shared.study.samples,
            shared.cond,
            shared.encoder,
            shared.reference,
            shared.held_out,
            shared.held_out_cond,
            shared.seed,
            self.storage,
            self.uri,
        )
        try:
            below = {"mlflow.parentRunId": shared.parent, "ddpm.study": shared.name}
            plan = driver.make_plan(config, self.storage, dict(shared.lineage), below)
            driver.train(replace(plan, job=replace(plan.job, evaluation_hook=judge)), workers=self.workers.provide)
        except BaseException as error:  # noqa: BLE001 - it is raised in Tune's own thread
            self.error = error

    def _scores_above(self, images_seen: float) -> list[dict[str, float]]:
        """Return the scores of rungs above a number of images, in order."""
        # The files are named by images seen, so that earlier ones need not be read.
        names = sorted(entry.uri for entry in self.storage.list(self.uri))
        found = [uri for uri in names if int(uri.rsplit("/", 1)[-1].removesuffix(".json")) > images_seen]
        return [json.loads(self.storage.read(uri)) for uri in found]

    def _end(self) -> None:
        """Stop the run and wait until it has.

        Raises:
            TrainingError: it does not stop within `STOP_S`.
        """
        deadline = time.monotonic() + STOP_S
        while self.thread.is_alive():
            # Repeated, because a run that is only starting has no monitor yet that could be asked.
            request_stop(self.run_config)
            self.thread.join(0.5)
            if time.monotonic() > deadline:
                raise TrainingError(f"run '{self.run_config.name}' does not stop")
