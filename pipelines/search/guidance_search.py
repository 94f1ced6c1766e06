"""The study behind `ddpm search guidance`: guidance, sampler and steps of one trained model, without any training.

Trials are Ray Tune trials whose actors are reused: each actor loads model, evaluator and features once, and gets a new
configuration for the next trial.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Stopper

from ddpm.generate import Sampling
from ddpm.model import Model
from ddpm.models.classifier import NoisyClassifier
from pipelines.config import Config, from_dict, sampling
from pipelines.config.choices import VARIANTS
from pipelines.display import Notice
from pipelines.evaluation.compare import Distance
from pipelines.ray_actors import processors
from pipelines.references import classifier_for, weaker_for
from pipelines.search.confirmation import DEFAULT, Candidate, Confirmed, decide, winner_of
from pipelines.search.fresh_samples import SHOWN, draw_all
from pipelines.search.judge import Drawn, SampleScorer, Subject, hopeless, rungs, scores
from pipelines.search.observer import Observer
from pipelines.search.parameters import Params, Value
from pipelines.search.seeds import NoiseSeeds
from pipelines.search.space import apply
from pipelines.search.study import StudyStore, TrialRecord, ended, loss, pareto_front
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import run_trials
from pipelines.storage import Storage


@dataclass(frozen=True)
class GuidanceResult:
    """The result of a guidance study.

    Attributes:
        records: all trials.
        front: the Pareto front of the study's objectives, ordered by the last of them.
        confirmed: the default and the best settings, judged with fresh seeds, best first.
        pictures: trial -> its images, uint8 [N, H, W, C].
        confirmation_seed: of the noise of `confirmed`.
    """

    records: list[TrialRecord]
    front: list[TrialRecord]
    confirmed: list[Confirmed]
    pictures: dict[str, Any]
    confirmation_seed: int

    @property
    def winner(self) -> Confirmed | None:
        """Return the best setting that is significantly better than the default, or None."""
        return winner_of(self.confirmed)


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
    """Return the values that a path can have in a study, without None."""
    return [str(value) for value in study.values(path, base) if value is not None]


def base_of(config: Config, settings: Sampling) -> Config:
    """Return the configuration with a model's sampling settings.

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
        self.seed: int = shared["seed"]
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
        more = self.scorer.draw(self.settings, torch.arange(first, stop), seed=self.seed)
        self.drawn = more if self.drawn is None else self.drawn + more
        values, influence = scores(self.subject, self.drawn)
        return {**values, "influence": influence.float().numpy(), "done": stop == counts[-1]}

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
        names = ("frechet_distance", "influence", "evaluations", "samples")
        others[trial_id] = {name: result[name] for name in names}
        return stop and not result["done"]

    def stop_all(self) -> bool:
        """Return False: trials stop one by one."""
        return False


def confirm(
    subject: Subject,
    study: StudyConfig,
    base: Config,
    records: Sequence[TrialRecord],
    distance: Distance,
    seed: int,
    notice: Notice,
) -> list[Confirmed]:
    """Judge the default and the best settings again, with more samples and noise that no trial has used.

    Args:
        distance: decides.
        seed: of the noise.

    Returns:
        The scores, best first.
    """
    candidates = {DEFAULT: Candidate(DEFAULT, {}, sampling(base))}
    for record in sorted(pareto_front(records, study.objectives), key=lambda r: loss(r, study.objectives[0])):
        settings = sampling(apply(base, record.params))
        if settings != candidates[DEFAULT].settings and len(candidates) <= study.confirm:
            candidates[record.trial] = Candidate(record.trial, record.params, settings)
    shared = ray.put(subject)
    drawn = draw_all([(shared, c.settings) for c in candidates.values()], study.confirm_samples, seed, base, notice)
    by_trial = dict(zip(candidates, drawn, strict=True))
    measured = {trial: distance(samples.features) for trial, samples in by_trial.items()}
    values = {trial: scores(subject, samples)[0] for trial, samples in by_trial.items()}
    return decide(candidates, measured, values, distance.measure)


def draw_front(
    subject: Subject, base: Config, front: Sequence[TrialRecord], seed: int, notice: Notice
) -> dict[str, Any]:
    """Draw the same few images with the settings of each trial on the front.

    Returns:
        trial -> images, uint8 [N, H, W, C].
    """
    shared = ray.put(subject)
    drawn = draw_all([(shared, sampling(apply(base, record.params))) for record in front], SHOWN, seed, base, notice)
    return {record.trial: found.pixels for record, found in zip(front, drawn, strict=True)}


def search(
    subject: Subject,
    study: StudyConfig,
    base: Config,
    store: StudyStore,
    observer: Observer,
    records: Sequence[TrialRecord],
    distance: Distance,
    notice: Notice,
    first: Sequence[Params] = (),
) -> GuidanceResult:
    """Run a whole guidance study: trials, confirmation, and images of the front.

    Args:
        subject: the model and the data that score it.
        study: the settings of the study.
        base: the configuration with the model's present sampling settings.
        store: holds the records.
        observer: records and logs the trials.
        records: the trials so far.
        distance: decides the confirmation.
        notice: called with lines for the user.
        first: parameters to try after the model's present setting and before any other.
    """
    seeds = NoiseSeeds.of(base, store.name)
    observer.begin(records)
    use_gpu = base.cluster.gpus_per_worker > 0
    room = processors(use_gpu=use_gpu)
    shared = {"subject": subject, "study": study, "base": base, "seed": seeds.trials}
    # `Hopeless` looks at distance and cost only; a setting may be good in another objective.
    stop = Hopeless() if set(study.objectives) <= {"frechet_distance", "evaluations"} else None
    run_trials(
        tune.with_parameters(GuidanceTrial, shared=shared),
        {"cpu": 1, **({"gpu": 1} if use_gpu else {})},
        study,
        base,
        records,
        observer,
        min(study.concurrent or room, room),
        first,
        stop=stop,
    )
    records = store.records()
    front, fresh = pareto_front(records, study.objectives), seeds.confirmation(ended(records))
    confirmed = confirm(subject, study, base, records, distance, fresh, notice)
    return GuidanceResult(records, front, confirmed, draw_front(subject, base, front, seeds.trials, notice), fresh)
