"""The study behind `ddpm search guidance`: guidance, sampler and steps of one trained model, without any training.

Trials are Ray Tune trials whose actors are reused: each actor loads model, evaluator and features once, and gets a new
configuration for the next trial.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ray import tune

from ddpm.generate import Sampling
from ddpm.guidance import GUIDANCE
from ddpm.model import Model
from ddpm.models.classifier import NoisyClassifier
from ddpm.settings import settings_of
from pipelines import registry, tracking
from pipelines.checkpoints import references
from pipelines.config import Config, changed_sampling, from_dict, sampling, sampling_overrides
from pipelines.config.choices import VARIANTS
from pipelines.evaluation import samples
from pipelines.evaluation.samples import read_images
from pipelines.evaluation.scoring import digest_of, subject_of
from pipelines.presentation.errors import PipelineError
from pipelines.remote.actors import processors
from pipelines.search.confirmation import DEFAULT, Confirmed, winner_of
from pipelines.search.judge import TrialSamples, TrialSubject, asked_for, hopeless, rungs
from pipelines.search.space import Params, Value, apply
from pipelines.search.studies import Lines, Search
from pipelines.search.study import TrialRecord, done, loss, pareto_front
from pipelines.search.study_config import StudyConfig
from pipelines.search.tune_trials import Trial, Trials
from pipelines.shards.index import Dataset, read_dataset
from pipelines.storage import Storage, layout
from pipelines.tracking import ModelVersion, Tracker

SHOWN = 20
"""Images that are drawn with each setting of the Pareto front, for the study's page."""


def guides_of(model: Model, study: StudyConfig, base: Config, storage: Storage) -> dict[str, NoisyClassifier | Model]:
    """Load the classifiers and weaker models that the settings of a study may name, by reference.

    Raises:
        ModelError: one of them does not exist or does not fit the model.
    """
    kinds = [GUIDANCE.find(str(kind)) for kind in study.values("guidance.kind", base)]
    asked = {setting.name for kind in kinds for setting in settings_of(kind) if setting.reference}
    named = {
        str(value): name for name in asked for value in study.values(f"guidance.{name}", base) if value is not None
    }
    return {value: references.GUIDES[name](model, value, base.tracking.uri, storage) for value, name in named.items()}


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


class GuidanceTrial(Trial):
    """A Ray Tune trial of one setting: draws growing numbers of images and reports their scores."""

    def setup(
        self, config: dict[str, Value], *, subject: TrialSubject, study: StudyConfig, base: Config, seed: int
    ) -> None:
        """Load the networks; called once per actor."""
        torch.set_num_threads(1)
        self.subject, self.study, self.base, self.seed = subject, study, base, seed
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Value]) -> bool:
        """Start a trial of another setting with the loaded networks."""
        self.params = new_config
        self.settings = sampling(apply(self.base, new_config))
        self.drawn: TrialSamples | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Draw images up to the next rung, and return the scores of all of them."""
        counts = rungs(self.study.samples, self.study.rungs)
        first = len(self.drawn.features) if self.drawn else 0
        stop = next(n for n in counts if n > first)
        more = self.subject.draw(self.settings, torch.arange(first, stop), self.seed)
        self.drawn = more if self.drawn is None else self.drawn + more
        drawn = self.drawn
        values, influence = self.subject.reference.scores(drawn.features, drawn.accuracy, drawn.evaluations)
        return {**values, "influence": influence.float().numpy(), "done": stop == counts[-1]}


def stop_hopeless() -> Callable[[str, dict[str, Any]], bool]:
    """Return what says at a report whether a trial is significantly worse than a cheaper one; see `hopeless`."""
    seen: dict[float, dict[str, dict[str, Any]]] = defaultdict(dict)

    def stops(trial_id: str, result: dict[str, Any]) -> bool:
        others = seen[result["samples"]]
        stop = hopeless(result, [scores for other, scores in others.items() if other != trial_id])
        others[trial_id] = {n: result[n] for n in ("frechet_distance", "influence", "evaluations", "samples")}
        return stop and not result["done"]

    return stops


@dataclass
class GuidanceSearch(Search):
    """The study behind `ddpm search guidance`.

    Attributes:
        reference: the model, such as `models:/NAME@alias`.
        overrides: of the configuration; they change the model's own sampling settings, which else replace those in it.
    """

    COMMAND = "ddpm search guidance --model {search.reference} --study {search.name}"

    reference: str
    overrides: Sequence[str]

    def begin(self) -> Dataset:
        """Find the model, and begin with its own sampling settings."""
        config, self.subject = self.config, self.reference
        resolved = references.open_model(self.reference, config)
        if resolved.version is not None:
            registry.check_signing(config.registry)  # the winner becomes a version
        self.resolved, spec = resolved, resolved.model.spec
        self.base = base_of(config, changed_sampling(spec.sampling, self.overrides))
        known = ("run_id", "images_seen", "dataset_digest", "sigma_rel")  # equal for equal weights
        self.identity = json.dumps({key: spec.lineage[key] for key in known if key in spec.lineage}, sort_keys=True)
        return read_dataset(spec.lineage.get("dataset_uri", config.data.uri), self.storage)

    def open(self) -> None:
        """Load the networks that may guide the model, and what scores its samples."""
        model, data = self.resolved.model, self.data
        guides = guides_of(model, self.study, self.base, self.storage)
        prompts = data.prompts(model.spec)
        captions = None if prompts is None else prompts.captions
        cond = asked_for(data.real, captions, self.study.samples, self.noise_seed)
        self.model = TrialSubject.of(model, data.evaluator, data.real, guides, cond)

    def drawing(self, params: Params) -> samples.SampledModel:
        """Return the model with the settings of a trial."""
        settings = sampling(apply(self.base, params))
        return subject_of(self.model.guided(settings), digest_of(self.resolved), settings, self.data)

    def trials(self, records: Sequence[TrialRecord], parent: str) -> Trials:
        """Return how trials are run: on as many processors as there are."""
        study, use_gpu = self.study, self.base.cluster.gpus_per_worker > 0
        room = processors(use_gpu=use_gpu)
        # `hopeless` looks at distance and cost only; a setting may be good in another objective.
        cheap = set(study.objectives) <= {"frechet_distance", "evaluations"}
        return Trials(
            tune.with_parameters(GuidanceTrial, subject=self.model, study=study, base=self.base, seed=self.noise_seed),
            {"cpu": 1, **({"gpu": 1} if use_gpu else {})},
            min(study.concurrent or room, room),
            stop=stop_hopeless() if cheap else None,
        )

    def confirm(self, records: Sequence[TrialRecord], seed: int) -> list[Confirmed]:
        """Judge the default and the best settings of the Pareto front again."""
        default, chosen = sampling(self.base), dict[str, Params]({DEFAULT: {}})
        front = pareto_front(records, self.study.objectives)
        for record in sorted(front, key=lambda r: loss(r, self.study.objectives[0])):
            if sampling(apply(self.base, record.params)) != default and len(chosen) <= self.study.confirm:
                chosen[record.trial] = record.params
        return self.judge_again(chosen, {trial: self.drawing(params) for trial, params in chosen.items()}, seed)

    def conclude(
        self, records: Sequence[TrialRecord], confirmed: Sequence[Confirmed], tracker: Tracker
    ) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
        """Register the winner's settings as a version, and draw the same few images with each setting of the front."""
        winner = winner_of(confirmed)
        version = None if winner is None else self.register(winner)
        if winner is not None:
            with tracking.warn_on_error("the best settings"):
                tracker.text(tracking.to_json(winner.settings.to_json()), layout.BEST_SAMPLING)
                tracker.text("\n".join(sampling_overrides(winner.settings)), layout.BEST_OVERRIDES)
        front = pareto_front(records, self.study.objectives)
        drawn = self.measure({record.trial: self.drawing(record.params) for record in front}, SHOWN, self.noise_seed)
        channels = self.model.model.spec.shape[0]
        pictures = {trial: read_images(found.files, channels, np.arange(SHOWN)) for trial, found in drawn.items()}
        answer = {"front": [asdict(record) for record in front], "version": None if version is None else version.uri}
        return answer, [self._cost(records, confirmed)], pictures

    def register(self, winner: Confirmed) -> ModelVersion | None:
        """Score a registered version with the winner's settings and register that as a new one; no guarded alias moves.

        Returns:
            The new version; None where the model is no registered version, or it cannot be registered.
        """
        resolved, config = self.resolved, self.config
        overrides = " ".join(sampling_overrides(winner.settings))
        at_hand = f"register it with `ddpm register {resolved.reference} {overrides}`"
        if resolved.version is None:
            self.say(f"the model is no registered version: {at_hand}")
            return None
        named = {"registry": config.registry.model_copy(update={"model": resolved.version.name})}
        try:
            version = registry.register_scored(
                resolved,
                winner.settings,
                config.model_copy(update=named),
                Lines(self.notice),
                lambda: None,  # the study is connected
            )
        except PipelineError as error:  # what the study found is not lost for it
            self.say(f"the winner is not registered: {error}; {at_hand}")
            return None
        assert resolved.tracker is not None
        if "study" not in version.tags:  # of an earlier study that found the same
            tags = {"study": self.name, "study.gain": winner.gained}
            tracking.set_version_tags(resolved.tracker.uri, version.name, version.version, tags)
        self.say(f"{version.uri} serves these settings; `ddpm promote {version.uri} --alias {config.registry.alias}`")
        return version

    def _cost(self, records: Sequence[TrialRecord], confirmed: Sequence[Confirmed]) -> str:
        """Return the cost of the study in network evaluations, compared with that of the model's training, in words."""
        trials = sum(r.scores.get("evaluations", 0) * r.scores.get("samples", 0) for r in done(records))
        confirming = sum(c.scores["evaluations"] * self.study.confirm_samples for c in confirmed)
        # A training step costs about three evaluations per image: a forward pass, and a backward pass that costs two.
        seen = int(self.resolved.model.spec.lineage.get("images_seen") or 0)
        beside = f"; the training of the model took about {3 * seen:,} (3 for each of {seen:,} images)" if seen else ""
        shares = f"{trials:,.0f} in trials, {confirming:,.0f} to confirm"
        return f"{trials + confirming:,.0f} network evaluations ({shares}){beside}."
