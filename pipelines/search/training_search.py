"""`ddpm search training`: what needs training, each trial a distributed Ray Train run, judged by its samples.

Losses of different schedules do not compare: a trial is judged by the Frechet distance of samples of fixed seeds and by
the variational bound, at rungs of growing numbers of images, in the training itself, where the weights are. ASHA ends
trials that are behind at a rung; Optuna chooses the next.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from torch import Tensor

from ddpm.generate import configured, generate, to_uint8
from ddpm.interop import ModelSpec
from ddpm.likelihood import variational_bound
from ddpm.prediction import Conditioning, NetworkDenoiser
from ddpm.quality import FeatureMoments
from ddpm.schedule import make_schedule
from pipelines.config import Config, ConfigError
from pipelines.evaluation.features import EvaluatorNetwork, extract
from pipelines.search.judge import distance_and_error
from pipelines.search.observer import Observer
from pipelines.search.parameters import Params, Value
from pipelines.search.space import apply
from pipelines.search.study import StudyError, TrialRecord, searcher, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig
from pipelines.shards.read import Batch
from pipelines.storage import Storage, join
from pipelines.training import driver
from pipelines.training.goodput import Session, read_sessions
from pipelines.training.preview import collect, share_out
from pipelines.training.resources import TrainingError
from pipelines.training.state import Training, averaged
from pipelines.training.warm import WarmWorkers

# Ray Train looks at its workers every two seconds, and so at the end of every trial; Tune has a table of its own.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

BOUND_STEPS = 64
"""Of the chain whose bound judges a trial: respaced from the schedule's own, and one evaluation each."""
BATCH = 64
STOP_S = 120.0
"""How long a run may take to stop: at most its start, a step, and a checkpoint."""


@dataclass(frozen=True)
class RungJudge:
    """Judges a training's average at given numbers of images; see `pipelines.training.shell.Judge`.

    The scores are files beside the run's checkpoints: a trial that comes again finds those it has earned.

    Attributes:
        rungs: images seen.
        samples: images drawn at each.
        labels: of them, in turn; None for a model without classes.
        evaluator: whose features judge.
        reference: moments of the real train split's features.
        held_out: real test images for the bound, [B, C, H, W] in [-1, 1]; none for B = 0.
        held_out_labels: theirs.
        seed: of the noise.
        storage: where the scores go.
        uri: the folder.
    """

    rungs: tuple[int, ...]
    samples: int
    labels: Tensor | None
    evaluator: EvaluatorNetwork
    reference: FeatureMoments
    held_out: Tensor
    held_out_labels: Tensor | None
    seed: int
    storage: Storage
    uri: str

    def due(self, before: int, seen: int) -> bool:
        """Whether a rung lies in (before, seen]."""
        return any(before < rung <= seen for rung in self.rungs)

    def __call__(self, training: Training, spec: ModelSpec, device: torch.device) -> None:
        """Draw and judge, the work shared out over the ranks; rank 0 writes the scores."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        schedule = make_schedule(**spec.schedule)
        with averaged(training) as network, torch.no_grad():
            denoiser = NetworkDenoiser(network, schedule, spec.prediction)
            mine = share_out(self.samples, rank)
            images = generate(
                denoiser,
                schedule,
                spec.sampling,
                cond=self._labels(self.labels, mine, spec, device),
                shape=spec.shape,
                seed=self.seed,
                images=mine.to(device),
                batch_size=BATCH,
            )
            features = collect(extract(self.evaluator, to_levels(images)).features.to(device), self.samples).cpu()
            scores, _ = distance_and_error(self.reference, features)
            if len(self.held_out):
                part = share_out(len(self.held_out), rank)
                bound = variational_bound(
                    configured(denoiser, schedule, replace(spec.sampling, scale=1.0, rescale=0.0)),
                    schedule,
                    self.held_out[part].to(device),
                    self._labels(self.held_out_labels, part, spec, device),
                    seed=self.seed,
                    images=part.to(device),
                    steps=min(BOUND_STEPS, schedule.num_steps),
                )
                scores["bits_per_dim"] = collect(bound.total, len(self.held_out)).mean().item()
        if rank == 0:
            scores |= {"images_seen": float(training.images_seen), "samples": float(self.samples)}
            where = join(self.uri, f"{training.images_seen:012d}.json")
            self.storage.write(where, json.dumps(scores).encode())

    @staticmethod
    def _labels(labels: Tensor | None, numbers: Tensor, spec: ModelSpec, device: torch.device) -> Conditioning | None:
        if labels is None or not spec.classes:
            return None
        return Conditioning(label=labels[numbers % len(labels)].to(device))


def to_levels(images: Tensor) -> Tensor:
    """Rounded to the 256 levels of a picture, on the CPU."""
    return to_uint8(images).permute(0, 3, 1, 2).float().cpu() / 127.5 - 1


@dataclass(frozen=True)
class Shared:
    """What all trials have in common; put into Ray's object store once."""

    study: StudyConfig
    base: Config
    name: str
    lineage: Mapping[str, Any]
    evaluator: EvaluatorNetwork
    reference: FeatureMoments
    labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None

    @classmethod
    def of(
        cls,
        study: StudyConfig,
        base: Config,
        name: str,
        lineage: Mapping[str, Any],
        evaluator: EvaluatorNetwork,
        splits: Mapping[str, Batch],
    ) -> Shared:
        """From the real splits."""
        train, test = splits["train"], splits["test"]
        count = min(study.bits_per_dim_images, len(test.images))
        return cls(
            study,
            base,
            name,
            lineage,
            evaluator,
            FeatureMoments.of(extract(evaluator, train.images).features),
            test.labels,
            test.images[:count].clone(),
            None if test.labels is None else test.labels[:count].clone(),
        )


def rungs(images: int, batch_size: int, study: StudyConfig) -> tuple[int, ...]:
    """Numbers of images at which trials are judged: the whole length, and that over powers of `reduction`.

    Raises:
        ConfigError: the first would come before a batch has been seen.
    """
    found = [images // study.reduction**i // batch_size * batch_size for i in range(study.rungs - 1, 0, -1)]
    if found and found[0] < batch_size:
        raise ConfigError(
            f"search.rungs = {study.rungs} with search.reduction = {study.reduction} puts the first rung before the "
            f"first batch: use fewer rungs, or more images than {images:,}"
        )
    return (*found, -(-images // batch_size) * batch_size)


def trial_config(shared: Shared, params: Params) -> Config:
    """The run of a trial: the base with what it tries, judged by its own rungs and nothing on the side."""
    config, study = apply(shared.base, params), shared.study
    first = rungs(config.images, config.batch_size, study)[0]
    return config.model_copy(
        update={
            "name": f"{shared.name}-{trial_name(params)}",
            "tracking": config.tracking.model_copy(update={"grid_every": None}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every": first, "keep": 1, "publish_every": 2 * config.images}
            ),
            # What fails by itself, such as a loss that is not finite, fails again.
            "cluster": config.cluster.model_copy(update={"max_failures": min(1, config.cluster.max_failures)}),
        }
    )


class TrainingTrial(tune.Trainable):
    """One trial after another in an actor that lives as long as the study: fits its run and reports each score.

    Its workers stay as well, from trial to trial. The run trains in a thread; a trial that is not to go on is asked to
    stop, as by Ctrl-C, before the next begins. An actor that were killed instead would leave its workers and their
    resources to Ray to find.
    """

    shared: Shared
    warm: WarmWorkers
    run_config: Config
    thread: threading.Thread
    reported: float
    error: BaseException | None

    def setup(self, config: dict[str, Value], *, shared: Shared) -> None:
        """Once per actor."""
        self.shared = shared
        self.warm = WarmWorkers(join(shared.base.storage.root, "studies", shared.name, "workers"))
        self._begin(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """Another trial."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next score; the last one when the run has ended.

        Raises:
            TrainingError: the run failed.
        """
        while True:
            ended = not self.thread.is_alive()
            if self.error is not None:
                self.warm.close()
                raise self.error
            fresh = self._scores_above(self.reported)
            last = bool(fresh) and fresh[0]["images_seen"] >= self.rungs[-1]
            if fresh and (ended or not last):
                self.reported = fresh[0]["images_seen"]
                return {**fresh[0], "done": last}
            if ended:
                raise TrainingError(f"run '{self.run_config.name}' ended before its last score")
            self.thread.join(0.5)

    def cleanup(self) -> None:
        """At the actor's end."""
        self._end()
        self.warm.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run has its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""

    def _begin(self, params: Params) -> None:
        shared = self.shared
        config = self.run_config = trial_config(shared, params)
        self.storage = Storage.of(config)
        self.uri = join(config.storage.root, "runs", config.name, "scores")
        self.rungs = rungs(config.images, config.batch_size, shared.study)
        self.reported, self.error = -1.0, None
        self.thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        shared, config = self.shared, self.run_config
        judge = RungJudge(
            self.rungs,
            shared.study.samples,
            shared.labels,
            shared.evaluator,
            shared.reference,
            shared.held_out,
            shared.held_out_labels,
            config.evaluation.seed,
            self.storage,
            self.uri,
        )
        try:
            plan = driver.make_plan(config, self.storage, dict(shared.lineage))
            driver.train(replace(plan, job=replace(plan.job, judge=judge)), workers=self.warm.take)
        except BaseException as error:  # noqa: BLE001 - it is raised in Tune's own thread
            self.error = error

    def _scores_above(self, images_seen: float) -> list[dict[str, float]]:
        # Named by the number of images, so that most are passed over unread.
        names = sorted(entry.uri for entry in self.storage.list(self.uri))
        fresh = [uri for uri in names if int(uri.rsplit("/", 1)[-1].removesuffix(".json")) > images_seen]
        return [json.loads(self.storage.read(uri)) for uri in fresh]

    def _end(self) -> None:
        """Stop the run and wait until it has.

        Raises:
            TrainingError: it does not stop.
        """
        deadline = time.monotonic() + STOP_S
        while self.thread.is_alive():
            # Again and again: the run may only be starting, and then has nobody to ask yet.
            driver.request_stop(self.run_config)
            self.thread.join(0.5)
            if time.monotonic() > deadline:
                raise TrainingError(f"run '{self.run_config.name}' does not stop")


def trial_seconds(record: TrialRecord, sessions: Sequence[Session]) -> dict[str, float] | None:
    """Where the wall time of a trial went, in the order in which it went; None where it did not run in one go.

    Args:
        record: of a finished trial.
        sessions: of its run's ledger.
    """
    attempts = [attempt for session in sessions for attempt in session.attempts]
    if record.state != "finished" or len(attempts) != 1:
        return None
    (attempt,) = attempts
    spent = attempt.seconds
    return {
        "placement": attempt.began - record.began,
        "start-up": spent["startup"],
        "training": spent["step"] + spent["data"],
        "judging": spent["grid"],
        "checkpoints": spent["checkpoint"],
        "teardown": record.began + record.seconds - attempt.ended,
    }


def trial_sessions(record: TrialRecord, config: Config, name: str, storage: Storage) -> Sequence[Session]:
    """The ledger of a trial's run in the study of this name."""
    return read_sessions(storage, join(config.storage.root, "runs", f"{name}-{record.trial}"))


def median_seconds(records: Sequence[TrialRecord], config: Config, name: str, storage: Storage) -> dict[str, float]:
    """The medians of `trial_seconds` over a study's trials; empty where there are none."""
    found = [trial_seconds(record, trial_sessions(record, config, name, storage)) for record in records]
    spent = [seconds for seconds in found if seconds is not None]
    return {part: statistics.median(s[part] for s in spent) for part in spent[0]} if spent else {}


def concurrency(study: StudyConfig, base: Config, resources: Mapping[str, float]) -> int:
    """Trials at a time, so that each has its workers.

    Raises:
        StudyError: the cluster has no room for one.
    """
    cluster = base.cluster
    workers = cluster.max_workers
    needed = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    room = min(int(resources.get(kind, 0) // need) for kind, need in needed.items() if need)
    if room < 1:
        listed = ", ".join(f"{need:g} {k} needed, {resources.get(k, 0):g} there" for k, need in needed.items() if need)
        raise StudyError(f"the Ray cluster has no room for one trial of {workers} workers: {listed}")
    return min(room, study.concurrent or room)


def run_trials(
    shared: Shared, records: Sequence[TrialRecord], observer: Observer, first: Sequence[Params] = ()
) -> None:
    """Every trial that is still to be run; the records are written on the way.

    Args:
        first: what is tried after the configuration as it stands and before anything else.
    """
    study, base = shared.study, shared.base
    left = study.trials - sum(record.state != "running" for record in records)
    if left <= 0:
        return
    at = rungs(base.images, base.batch_size, study)
    # The workers have placement groups of their own; the trial itself waits and reports.
    trainable = tune.with_resources(tune.with_parameters(TrainingTrial, shared=shared), {"cpu": 0, "memory": 1 << 20})
    with tempfile.TemporaryDirectory(prefix="ddpm-tune-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher(study, base, records, Path(scratch), first=[study.nearest(base), *first]),
                scheduler=AsyncHyperBandScheduler(
                    time_attr="images_seen",
                    metric=study.objectives[0],
                    mode=DIRECTIONS[study.objectives[0]],
                    max_t=at[-1],
                    grace_period=at[0],
                    reduction_factor=study.reduction,
                ),
                num_samples=left,
                max_concurrent_trials=concurrency(study, base, ray.cluster_resources()),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
