"""`ddpm search guidance`: guidance, sampler and steps of one trained model, searched without any training.

Trials are Ray Tune trials in actors that live as long as the study: model, evaluator and features are loaded once in
each, and a new trial is a new configuration of an old actor.
"""

from __future__ import annotations

import os
import tempfile
import typing
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Stopper

from ddpm.generate import SamplingSettings
from ddpm.interop import Model
from ddpm.models.classifier import NoisyClassifier
from ddpm.quality import FeatureMoments, Interval
from pipelines.config import Config, from_dict
from pipelines.config.schema import SamplerConfig
from pipelines.evaluation.evaluate import Evaluator
from pipelines.evaluation.features import extract
from pipelines.models import classifier_for, sampling_settings, weaker_for
from pipelines.search.judge import Drawn, Painter, Subject, gain, hopeless, interval, rungs, scores
from pipelines.search.observer import Observer
from pipelines.search.optuna_search import searcher
from pipelines.search.parameters import Params, Value
from pipelines.search.space import apply, check_space
from pipelines.search.study import StudyStore, TrialRecord, loss, pareto_front
from pipelines.search.study_config import StudyConfig
from pipelines.shards.read import Batch
from pipelines.storage import Storage

# Tune's own tables and log files: a study has its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

SHOWN = 20
"""Images of each point that the study's page shows."""


@dataclass(frozen=True)
class Confirmed:
    """A setting judged again on fresh noise seeds.

    Attributes:
        trial: its name; "default" for the model's present setting.
        params: that were searched.
        settings: all of it.
        distance: Frechet distance with its interval.
        scores: as trials report them.
        gain: distance of the default minus its own, with the interval of the difference; None for the default.
    """

    trial: str
    params: dict[str, Value]
    settings: SamplingSettings
    distance: Interval
    scores: dict[str, float]
    gain: Interval | None = None

    @property
    def better(self) -> bool:
        """Whether it beats the default by more than chance."""
        return self.gain is not None and self.gain.low > 0


@dataclass(frozen=True)
class GuidanceResult:
    """What a guidance study found.

    Attributes:
        records: every trial.
        front: those that no other beats in both distance and cost, cheapest first.
        confirmed: the default and the best, on fresh seeds, best first.
        pictures: trial -> images of it, uint8 [N, H, W, C].
    """

    records: list[TrialRecord]
    front: list[TrialRecord]
    confirmed: list[Confirmed]
    pictures: dict[str, Any]

    @property
    def winner(self) -> Confirmed | None:
        """The best that beats the default by more than chance."""
        return next((c for c in self.confirmed if c.better), None)


def guides_of(model: Model, study: StudyConfig, base: Config, storage: Storage) -> dict[str, NoisyClassifier | Model]:
    """The classifiers and weaker models that the settings of a study may name, by reference.

    Raises:
        ModelError: one that does not exist or does not go with the model.
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
    """What a path may be in a study."""
    searched = study.space.get(path)
    values = searched.corners() if searched is not None else [getattr(base.guidance, path.split(".")[1])]
    return [str(value) for value in values if value is not None]


def subject_of(
    model: Model, evaluator: Evaluator, splits: Mapping[str, Batch], guides: Mapping[str, NoisyClassifier | Model]
) -> Subject:
    """What all trials share."""
    train, test = splits["train"], splits["test"]
    return Subject(
        model=replace(model, classifier=None, weak=None).to("cpu"),
        evaluator=evaluator.network,
        reference=FeatureMoments.of(extract(evaluator.network, train.images).features),
        real=extract(evaluator.network, test.images).features,
        labels=test.labels if model.spec.classes else None,
        guides=guides,
    )


def base_of(config: Config, settings: SamplingSettings) -> Config:
    """The configuration whose sampler and guidance are a model's own; guides that it has not come from `config`."""
    plain, given = config.model_dump(mode="json"), asdict(settings)
    given_guides = {name: plain["guidance"][name] for name in ("classifier", "weak") if given[name] is None}
    plain["guidance"] = {"kind": settings.guidance} | {
        name: given[name] for name in plain["guidance"] if name != "kind"
    }
    plain["guidance"] |= given_guides
    for variant in typing.get_args(typing.get_args(SamplerConfig)[0]):
        if typing.get_args(variant.model_fields["kind"].annotation) == (settings.kind,):
            plain["sampler"] = {name: given[name] for name in variant.model_fields}
    return from_dict(plain)


class GuidanceTrial(tune.Trainable):
    """One setting at a time: samples more and more images and reports how they are judged."""

    def setup(self, config: dict[str, Value], *, shared: Mapping[str, Any]) -> None:
        """Once per actor."""
        torch.set_num_threads(1)
        self.subject: Subject = shared["subject"]
        self.study: StudyConfig = shared["study"]
        self.base: Config = shared["base"]
        self.painter = Painter(self.subject)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """Another setting; all that was loaded stays."""
        self.params = new_config
        self.settings = sampling_settings(apply(self.base, new_config))
        self.drawn: Drawn | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Up to the next rung."""
        steps = rungs(self.study.samples, self.study.rungs)
        here = len(self.drawn.features) if self.drawn else 0
        there = next(n for n in steps if n > here)
        more = self.painter.draw(self.settings, torch.arange(here, there), seed=self.base.evaluation.seed)
        self.drawn = more if self.drawn is None else self.drawn + more
        values, distances = scores(self.subject, self.drawn)
        return {**values, "halves": distances.tolist(), "done": there == steps[-1]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial takes seconds, and what has ended is recorded."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


class Hopeless(Stopper):
    """Ends trials that are worse than a cheaper one beyond chance; see `judge.hopeless`."""

    def __init__(self) -> None:
        self.seen: dict[float, dict[str, dict[str, Any]]] = defaultdict(dict)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial ends here."""
        others = self.seen[result["samples"]]
        stop = hopeless(result, [scores for other, scores in others.items() if other != trial_id])
        names = ("frechet_distance", "halves", "evaluations", "samples")
        others[trial_id] = {name: result[name] for name in names}
        return stop and not result["done"]

    def stop_all(self) -> bool:
        """Never."""
        return False


def run_trials(
    subject: Subject,
    study: StudyConfig,
    base: Config,
    records: Sequence[TrialRecord],
    observer: Observer,
    first: Sequence[Params] = (),
) -> None:
    """Every trial that is still to be run; the records are written on the way."""
    left = study.trials - sum(record.state != "running" for record in records)
    if left <= 0:
        return
    room = int(ray.cluster_resources().get("GPU" if base.cluster.gpus_per_worker else "CPU", 1))
    resources = {"cpu": 1, "gpu": 1} if base.cluster.gpus_per_worker else {"cpu": 1}
    trainable = tune.with_resources(
        tune.with_parameters(GuidanceTrial, shared={"subject": subject, "study": study, "base": base}), resources
    )
    # The records are the study's state; Tune's own, which it cannot do without, goes with the call.
    with tempfile.TemporaryDirectory(prefix="ddpm-tune-") as scratch:
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
                # By distance and cost; a setting that is bad in them may be good in something else.
                stop=Hopeless() if set(study.objectives) <= {"frechet_distance", "evaluations"} else None,
                callbacks=[observer],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


def confirm(subject: Subject, study: StudyConfig, base: Config, records: Sequence[TrialRecord]) -> list[Confirmed]:
    """The default and the best settings on noise seeds that no trial has seen, with more samples; best first."""
    front = pareto_front(records, study.objectives)
    chosen = sorted(front, key=lambda r: loss(r, study.objectives[0]))[: study.confirm]
    shared = ray.put(subject)
    settings = {"default": sampling_settings(base)}
    settings |= {record.trial: sampling_settings(apply(base, record.params)) for record in chosen}
    task = ray.remote(num_cpus=1, num_gpus=1 if base.cluster.gpus_per_worker else 0)(_draw_fresh)
    seed = base.evaluation.seed + 1_000_003
    drawn: dict[str, Drawn] = dict(
        zip(
            settings,
            ray.get([task.remote(shared, s, study.confirm_samples, seed) for s in settings.values()]),
            strict=True,
        )
    )
    params: dict[str, dict[str, Value]] = {"default": {}} | {r.trial: dict(r.params) for r in chosen}
    found = []
    for trial, samples in drawn.items():
        gained = None
        if trial != "default":
            gained = gain(subject.reference, drawn["default"].features, samples.features, draws=200)
        spread = interval(subject.reference, samples.features, draws=200)
        values, _ = scores(subject, samples)
        found.append(Confirmed(trial, params[trial], settings[trial], spread, values, gained))
    return sorted(found, key=lambda c: c.distance.value)


def draw_front(subject: Subject, base: Config, front: Sequence[TrialRecord]) -> dict[str, Any]:
    """The same few images under each setting, uint8 [N, H, W, C]."""
    task = ray.remote(num_cpus=1, num_gpus=1 if base.cluster.gpus_per_worker else 0)(_draw_fresh)
    shared, seed = ray.put(subject), base.evaluation.seed
    drawn = [task.remote(shared, sampling_settings(apply(base, r.params)), SHOWN, seed) for r in front]
    return {record.trial: found.pixels for record, found in zip(front, ray.get(drawn), strict=True)}


def _draw_fresh(subject: Subject, settings: SamplingSettings, samples: int, seed: int) -> Drawn:
    torch.set_num_threads(1)
    return Painter(subject).draw(settings, torch.arange(samples), seed=seed, keep=SHOWN)


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
    """The whole study.

    Args:
        subject: the model and what judges it.
        study: what is tried.
        base: the configuration whose sampler and guidance are the model's present ones.
        store: of the records.
        observer: watches.
        subject_name: of the model; a study is resumed on the same one only.
        resume: whether it may have begun.
        first: what is tried after the model's present setting and before anything else.

    Raises:
        ConfigError: a space that gives invalid configurations.
        StudyError: it has begun before, with other settings or without `resume`.
    """
    check_space(study, base)
    records = store.open(study, base, subject_name, resume=resume)
    observer.begin(records)
    run_trials(subject, study, base, records, observer, first)
    records = store.records()
    front = pareto_front(records, study.objectives)
    return GuidanceResult(records, front, confirm(subject, study, base, records), draw_front(subject, base, front))
