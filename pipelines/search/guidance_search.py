"""The study behind `ddpm search guidance`: guidance, sampler and steps of one trained model, without any training.

Trials are Ray Tune trials whose actors are reused: each actor loads model, evaluator and features once, and gets a new
configuration for the next trial.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Stopper

from ddpm.generate import Sampling
from ddpm.model import Model
from ddpm.models.classifier import NoisyClassifier
from ddpm.quality import Interval
from pipelines.config import Config, from_dict, sampling
from pipelines.config.choices import VARIANTS
from pipelines.evaluation.compare import NEIGHBOURS
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.real import Real
from pipelines.evaluation.samples import balanced_labels
from pipelines.evaluation.tasks import finished
from pipelines.references import classifier_for, weaker_for
from pipelines.scratch import scratch_folder
from pipelines.search.judge import Drawn, SampleScorer, Subject, gain, hopeless, interval, rungs, scores
from pipelines.search.observer import Observer
from pipelines.search.optuna_search import searcher
from pipelines.search.parameters import Params, Value
from pipelines.search.space import apply, check_space
from pipelines.search.study import StudyStore, TrialRecord, loss, pareto_front
from pipelines.search.study_config import StudyConfig
from pipelines.storage import Storage

# Tune's own tables and log files are switched off: a study has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

SHOWN = 20
"""Images that the study's page shows of each setting on the front."""


@dataclass(frozen=True)
class Confirmed:
    """The scores of a setting that was judged again with noise seeds that no trial has used.

    Attributes:
        trial: name of the trial; "default" for the model's present setting.
        params: the searched parameters.
        settings: the complete sampling settings.
        distance: Frechet distance with its interval.
        scores: the scores that trials report, by name.
        gain: by how much the distance is below that of the default, with its interval; None for the default.
    """

    trial: str
    params: dict[str, Value]
    settings: Sampling
    distance: Interval
    scores: dict[str, float]
    gain: Interval | None = None

    @property
    def better(self) -> bool:
        """Return whether the setting is significantly better than the default."""
        return self.gain is not None and self.gain.low > 0


@dataclass(frozen=True)
class GuidanceResult:
    """The result of a guidance study.

    Attributes:
        records: all trials.
        front: the Pareto front of the study's objectives, ordered by the last of them.
        confirmed: the default and the best settings, judged with fresh seeds, best first.
        pictures: trial -> its images, uint8 [N, H, W, C].
    """

    records: list[TrialRecord]
    front: list[TrialRecord]
    confirmed: list[Confirmed]
    pictures: dict[str, Any]

    @property
    def winner(self) -> Confirmed | None:
        """Return the best setting that is significantly better than the default, or None."""
        return next((c for c in self.confirmed if c.better), None)


def guides_of(model: Model, study: StudyConfig, base: Config, storage: Storage) -> dict[str, NoisyClassifier | Model]:
    """Load the classifiers and weaker models that the settings of a study may name, by reference.

    Raises:
        ModelError: one of them does not exist or does not fit the model.
    """
    kinds, uri = _values(study, base, "guidance.kind"), base.tracking.uri
    found: dict[str, NoisyClassifier | Model] = {}
    if "classifier" in kinds:
        names = _values(study, base, "guidance.classifier")
        found |= {name: classifier_for(model, name, uri, storage) for name in names}
    if "auto" in kinds:
        found |= {name: weaker_for(model, name, uri, storage) for name in _values(study, base, "guidance.weak")}
    return found


def _values(study: StudyConfig, base: Config, path: str) -> list[str]:
    """Return the values that a path can have in a study."""
    searched = study.space.get(path)
    values = searched.corners() if searched is not None else [getattr(base.guidance, path.split(".")[1])]
    return [str(value) for value in values if value is not None]


def subject_of(
    model: Model, evaluator: Evaluator, real: Real, guides: Mapping[str, NoisyClassifier | Model], seed: int
) -> Subject:
    """Return the model and the data that all trials share.

    Args:
        real: the real images, as the evaluator sees them.
        seed: of the order of the labels.
    """
    with tempfile.TemporaryDirectory(prefix="real-", dir=scratch_folder()) as scratch:
        test = real.load("test", Path(scratch), most=NEIGHBOURS).features.read(0, NEIGHBOURS)
    labels = balanced_labels(real.test.count, real.train.class_counts, seed) if model.spec.classes else None
    return Subject(
        model=replace(model, classifier=None, weak=None).to("cpu"),
        evaluator=evaluator,
        reference=real.train.moments,
        real=torch.from_numpy(test),
        labels=None if labels is None else torch.from_numpy(labels),
        guides=guides,
    )


def base_of(config: Config, settings: Sampling) -> Config:
    """Return the configuration with a model's own sampling settings.

    The classifier and the weaker model come from `config` where the settings name none.
    """
    plain, given = config.model_dump(mode="json"), settings.to_json()
    references = {name: plain["guidance"][name] for name in ("classifier", "weak")}
    own = {name: value for name, value in given.items() if name in plain["guidance"] and value is not None}
    plain["guidance"] = {**references, **own, "kind": given["guidance"]}
    sampler = VARIANTS["sampler"][given["kind"]]
    plain["sampler"] = {name: given[name] for name in sampler.model_fields}
    return from_dict(plain)


class GuidanceTrial(tune.Trainable):
    """A Ray Tune trial of one setting: draws growing numbers of images and reports their scores."""

    def setup(self, config: dict[str, Value], *, shared: Mapping[str, Any]) -> None:
        """Load the networks; called once per actor."""
        torch.set_num_threads(1)
        self.subject: Subject = shared["subject"]
        self.study: StudyConfig = shared["study"]
        self.base: Config = shared["base"]
        self.scorer = SampleScorer(self.subject)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """Start a trial of another setting with the loaded networks."""
        self.params = new_config
        self.settings = sampling(apply(self.base, new_config))
        self.drawn: Drawn | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Draw images up to the next rung, and return the scores of all of them."""
        counts = rungs(self.study.samples, self.study.rungs)
        first = len(self.drawn.features) if self.drawn else 0
        stop = next(n for n in counts if n > first)
        more = self.scorer.draw(self.settings, torch.arange(first, stop), seed=self.base.evaluation.seed)
        self.drawn = more if self.drawn is None else self.drawn + more
        values, distances = scores(self.subject, self.drawn)
        return {**values, "halves": distances.tolist(), "done": stop == counts[-1]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a trial takes seconds, and ended trials are recorded."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing, because nothing is saved."""


class Hopeless(Stopper):
    """Stop trials that are significantly worse than a cheaper one; see `judge.hopeless`."""

    def __init__(self) -> None:
        self.seen: dict[float, dict[str, dict[str, Any]]] = defaultdict(dict)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether the trial stops at this report."""
        others = self.seen[result["samples"]]
        stop = hopeless(result, [scores for other, scores in others.items() if other != trial_id])
        names = ("frechet_distance", "halves", "evaluations", "samples")
        others[trial_id] = {name: result[name] for name in names}
        return stop and not result["done"]

    def stop_all(self) -> bool:
        """Return False: trials stop one by one."""
        return False


def run_trials(
    subject: Subject,
    study: StudyConfig,
    base: Config,
    records: Sequence[TrialRecord],
    observer: Observer,
    first: Sequence[Params] = (),
) -> None:
    """Run the trials that the study still lacks; the observer records them.

    Args:
        records: the trials so far.
        first: parameters to try after the present setting and before any other.
    """
    left = study.trials - sum(record.state != "running" for record in records)
    if left <= 0:
        return
    room = int(ray.cluster_resources().get("GPU" if base.cluster.gpus_per_worker else "CPU", 1))
    resources = {"cpu": 1, "gpu": 1} if base.cluster.gpus_per_worker else {"cpu": 1}
    trainable = tune.with_resources(
        tune.with_parameters(GuidanceTrial, shared={"subject": subject, "study": study, "base": base}), resources
    )
    # Tune needs a folder for its own state, which is not used: the records are the state of the study.
    with tempfile.TemporaryDirectory(prefix="tune-", dir=scratch_folder()) as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher(study, base, records, Path(scratch), first=[study.nearest(base), *first]),
                num_samples=left,
                max_concurrent_trials=min(study.concurrent or room, room),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                # `Hopeless` looks at distance and cost only; a setting may be good in another objective.
                stop=Hopeless() if set(study.objectives) <= {"frechet_distance", "evaluations"} else None,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


def confirm(subject: Subject, study: StudyConfig, base: Config, records: Sequence[TrialRecord]) -> list[Confirmed]:
    """Judge the default and the best settings again, with more samples and noise seeds that no trial has used.

    Returns:
        The scores, best first.
    """
    front = pareto_front(records, study.objectives)
    chosen = sorted(front, key=lambda r: loss(r, study.objectives[0]))[: study.confirm]
    shared = ray.put(subject)
    settings = {"default": sampling(base)}
    settings |= {record.trial: sampling(apply(base, record.params)) for record in chosen}
    seed = base.evaluation.seed + 1_000_003
    drawn = dict(zip(settings, _draw_all(shared, settings.values(), study.confirm_samples, seed, base), strict=True))
    params: dict[str, dict[str, Value]] = {"default": {}} | {r.trial: dict(r.params) for r in chosen}
    found = []
    for trial, samples in drawn.items():
        gained = None
        if trial != "default":
            gained = gain(subject.reference, drawn["default"].features, samples.features, draws=200)
        distance = interval(subject.reference, samples.features, draws=200)
        values, _ = scores(subject, samples)
        found.append(Confirmed(trial, params[trial], settings[trial], distance, values, gained))
    return sorted(found, key=lambda c: c.distance.value)


def draw_front(subject: Subject, base: Config, front: Sequence[TrialRecord]) -> dict[str, Any]:
    """Draw the same few images with the settings of each trial on the front.

    Returns:
        trial -> images, uint8 [N, H, W, C].
    """
    settings = [sampling(apply(base, record.params)) for record in front]
    drawn = _draw_all(ray.put(subject), settings, SHOWN, base.evaluation.seed, base)
    return {record.trial: found.pixels for record, found in zip(front, drawn, strict=True)}


def _draw_all(shared: Any, settings: Iterable[Sampling], samples: int, seed: int, base: Config) -> list[Drawn]:
    """Draw images 0..samples - 1 of a seed with each of the settings, a Ray task each.

    Args:
        shared: reference to the subject.
    """
    needs = {"CPU": 1, "GPU": min(base.cluster.gpus_per_worker, 1)}
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_draw_fresh)
    waiting = [task.remote(shared, chosen, samples, seed) for chosen in settings]
    return [drawn for _, drawn in sorted(finished(waiting, needs, "draw samples"), key=lambda pair: pair[0])]


def _draw_fresh(subject: Subject, settings: Sampling, samples: int, seed: int) -> Drawn:
    """Draw images 0..samples - 1 of a seed in a Ray task."""
    torch.set_num_threads(1)
    return SampleScorer(subject).draw(settings, torch.arange(samples), seed=seed, keep=SHOWN)


def search(
    subject: Subject,
    study: StudyConfig,
    base: Config,
    store: StudyStore,
    observer: Observer,
    *,
    subject_name: str,
    resume: bool,
    first: Sequence[Params] = (),
) -> GuidanceResult:
    """Run a whole guidance study: trials, confirmation, and images of the front.

    Args:
        subject: the model and the data that score it.
        study: the settings of the study.
        base: the configuration with the model's present sampling settings.
        store: holds the records.
        observer: records and logs the trials.
        subject_name: identifies the model; a study is resumed on the same model only.
        resume: whether the study may exist already.
        first: parameters to try after the model's present setting and before any other.

    Raises:
        ConfigError: the space gives invalid configurations.
        StudyError: the study exists and `resume` is false, or it has other settings.
    """
    check_space(study, base)
    records = store.open(study, base, subject_name, resume=resume)
    observer.begin(records)
    run_trials(subject, study, base, records, observer, first)
    records = store.records()
    front = pareto_front(records, study.objectives)
    return GuidanceResult(records, front, confirm(subject, study, base, records), draw_front(subject, base, front))
