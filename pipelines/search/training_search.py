"""The study behind `ddpm search training`: each trial is a distributed Ray Train run, judged by its samples.

Losses of different schedules are not comparable, so a trial is judged by the Frechet distance of samples with fixed
seeds and by the variational bound. Both are computed within the training, at rungs of growing numbers of images. ASHA
stops trials that are behind at a rung, and Optuna chooses the parameters of the next trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from torch import Tensor

from ddpm.conditioning import Conditioning
from pipelines import tracking
from pipelines.checkpoints import ModelError, references
from pipelines.config import Config, ConfigError, sampling
from pipelines.evaluation.likelihoods import held_out_images
from pipelines.evaluation.prompts import open_captions
from pipelines.evaluation.real import HELD_OUT
from pipelines.evaluation.samples import SampledModel
from pipelines.evaluation.scoring import digest_of, subject_of
from pipelines.search.confirmation import DEFAULT, Confirmed, winner_of
from pipelines.search.judge import RungJudge, asked_for
from pipelines.search.observer import identify
from pipelines.search.space import apply
from pipelines.search.studies import Search
from pipelines.search.study import StudyError, TrialRecord, best, loss, trial_name
from pipelines.search.study_config import DIRECTIONS, StudyConfig
from pipelines.search.training_trial import TrainingTrial, median_seconds, rungs
from pipelines.search.tune_trials import Trials
from pipelines.shards.captions import Captions
from pipelines.shards.index import Dataset, read_dataset
from pipelines.shards.joined import with_sources
from pipelines.storage import layout
from pipelines.tracking import Tracker
from pipelines.training.prepare import check_dataset

BOUND_IMAGES = 32
"""Real test images, at least, that have judged no trial and on which the bound is confirmed."""
CONFIRMED, UNCONFIRMED = "config", "config-unconfirmed"
"""Names of the configuration of a winner, and of that of the best trial where nothing is confirmed."""


class StopBehind(AsyncHyperBandScheduler):
    """ASHA, which stops the trials that are behind at a rung, but for one that trains to its end.

    Args:
        spared: name of that trial.
        records: trials of the study that have ended, with which others are compared at the rungs.
        options: of ASHA.
    """

    def __init__(self, spared: str, records: Iterable[TrialRecord] = (), **options: Any) -> None:
        super().__init__(**options)
        self.spared, self.last_rung = spared, options["max_t"]
        for record in records:
            trial = SimpleNamespace(trial_id=record.trial)  # all that ASHA asks of it
            self.on_trial_add(None, trial)
            for scores in record.history:
                super().on_trial_result(None, trial, scores)
            self.on_trial_remove(None, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return what becomes of a trial at a report; its score counts at the rung in any case."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if result.get("images_seen", 0) < self.last_rung and identify(trial)[0] == self.spared:
            return str(self.CONTINUE)
        return action


def concurrency(study: StudyConfig, base: Config, resources: Mapping[str, float]) -> int:
    """Return how many trials the cluster can run at a time, each with all its workers.

    Raises:
        StudyError: the cluster has no room for one trial.
    """
    cluster = base.cluster
    workers = cluster.max_workers
    needed = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    room = min(int(resources.get(kind, 0) // need) for kind, need in needed.items() if need)
    if room < 1:
        listed = ", ".join(f"{need:g} {k} needed, {resources.get(k, 0):g} there" for k, need in needed.items() if need)
        raise StudyError(f"the Ray cluster has no room for one trial of {workers} workers: {listed}")
    return min(room, study.concurrent or room)


def fresh_images(study: StudyConfig, images: Tensor, cond: Conditioning | None) -> tuple[Tensor, Conditioning | None]:
    """Return those of the stored test images that judge no trial, with their classes and captions, if any.

    Args:
        images, cond: of `held_out_images`.

    Raises:
        ConfigError: the study optimises bits/dim, and they are too few to confirm that.
    """
    used = study.bits_per_dim_images
    if study.objectives == ("bits_per_dim",) and len(images) - used < BOUND_IMAGES:
        raise ConfigError(
            f"search.bits_per_dim_images = {used}: of the {len(images)} stored test images {BOUND_IMAGES} at least "
            f"have to be left to confirm the best trial: use {max(len(images) - BOUND_IMAGES, 0)} at most"
        )
    return images[used:], None if cond is None else cond[used:]


def chosen(study: StudyConfig, base: Config, records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """Return the trials to confirm by name: `DEFAULT`, the configuration as it stands, and the best others.

    There is nothing to compare with where the default did not train to its end: the result is empty.
    """
    name = trial_name(study.nearest(base))
    there = [record for record in records if record.state == "finished"]
    default = [record for record in there if record.trial == name]
    others = sorted((r for r in there if r.trial != name), key=lambda r: loss(r, study.objectives[0]))
    return {DEFAULT: default[0]} | {r.trial: r for r in others[: study.confirm]} if default else {}


@dataclass
class TrainingSearch(Search):
    """The study behind `ddpm search training`.

    Attributes:
        lineage: which code runs, see `pipelines.environment.lineage`.
    """

    COMMAND = "ddpm search training --study {search.name} …"

    lineage: dict[str, Any]

    def begin(self) -> Dataset:
        """Check that trials of this configuration can be compared, and that the dataset is of it."""
        self.base = config = self.config
        if config.training_s is not None:
            raise ConfigError(
                f"training_s = {config.training_s:g}: trials are compared after as many images each, so set images, "
                "and leave training_s at null"
            )
        rungs(config.images, config.batch_size, self.study)
        dataset = read_dataset(config.data.uri, self.storage)
        trained, _ = with_sources(config.data, dataset, None, self.storage)
        check_dataset(trained, config)
        self.subject, self.identity = dataset.uri, trained.digest
        return dataset

    def open(self) -> None:
        """Load captions and test images, and check that the cluster has room for a trial."""
        config, asked = self.config, (self.config.model.text_dim, *self.study.values("model.text_dim", self.config))
        width = max(int(width or 0) for width in asked)  # 0 where no trial is on text
        found = open_captions(width, self.data.dataset, config, self.say, held_out=HELD_OUT)
        self.captions: Captions | None
        self.captions, held = found or (None, None)
        self.held_out = held_out_images(self.data.real, held)
        self.fresh = fresh_images(self.study, *self.held_out)
        self.concurrent = concurrency(self.study, config, ray.cluster_resources())

    def trials(self, records: Sequence[TrialRecord], parent: str) -> Trials:
        """Return how trials are run: stopped by ASHA where they are behind."""
        study, base = self.study, self.base
        at = rungs(base.images, base.batch_size, study)
        scheduler = StopBehind(
            # The confirmation compares with the configuration as it stands, so that has to be trained.
            trial_name(study.nearest(base)),
            [record for record in records if record.state != "running"],  # those that were running report again
            time_attr="images_seen",
            metric=study.objectives[0],
            mode=DIRECTIONS[study.objectives[0]],
            max_t=at[-1],
            grace_period=at[0],
            reduction_factor=study.reduction,
        )
        return Trials(
            tune.with_parameters(
                TrainingTrial,
                study=study,
                base=base,
                lineage=self.lineage,
                tags={"mlflow.parentRunId": parent, "ddpm.study": self.name},
                judge=self.judge(),
            ),
            # A trial itself needs no CPU, because its workers reserve their own resources.
            {"cpu": 0, "memory": 1 << 20},
            self.concurrent,
            scheduler=scheduler,
        )

    def judge(self) -> RungJudge:
        """Return what judges all trials on the same noise; a trial adds its rungs and where its scores are written."""
        study, real, seed = self.study, self.data.real, self.noise_seed
        images, cond = self.held_out
        judging = slice(study.bits_per_dim_images)
        # Of a part, the whole would be pickled.
        held_out = images[judging].clone(), None if cond is None else cond[judging].map(torch.clone)
        asked, encoder = asked_for(real, self.captions, study.samples, seed), self.data.evaluator.encoder
        return RungJudge((), study.samples, asked, encoder, real.train.moments, held_out, seed, self.storage, "")

    def confirm(self, records: Sequence[TrialRecord], seed: int) -> list[Confirmed]:
        """Judge the models of the best trials and of the default again.

        Another training of the same settings with another seed would give another model, so a model that is better
        beyond the noise of its samples says less of its settings.

        Returns:
            The scores, best first; none where the default did not train to its end.
        """
        selected = chosen(self.study, self.base, records)
        if not selected:
            self.say("nothing is confirmed: the configuration as it stands did not train to its end, see its trial")
            return []
        models: dict[str, SampledModel] = {}
        for trial, record in selected.items():
            try:
                reference = f"runs:/{record.run_id}/{int(record.scores['images_seen'])}"
                found = references.open_model(reference, self.base)
                settings = sampling(apply(self.base, record.params))
                models[trial] = subject_of(found.model, digest_of(found), settings, self.data)
            except ModelError as error:
                self.say(f"trial {record.trial} is not confirmed: {error}")
        if DEFAULT not in models or len(models) == 1:
            self.say("nothing is confirmed: a comparison needs the model of the default and that of another trial")
            return []
        held_out = self.fresh if self.study.objectives == ("bits_per_dim",) else None
        return self.judge_again({trial: selected[trial].params for trial in models}, models, seed, held_out=held_out)

    def conclude(
        self, records: Sequence[TrialRecord], confirmed: Sequence[Confirmed], tracker: Tracker
    ) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
        """Write the configuration of the winner, or of the best trial."""
        top, images = best(records, self.study.objectives[0]), self.config.images
        seen = sum(r.scores.get("images_seen", 0) for r in records)
        spent = median_seconds(records, self.config, self.name)
        notes = [
            f"Each trial trains on up to {images:,} images; together they saw {seen:,.0f}, where training each to its "
            f"end would have taken {images * len(records):,}."
        ]
        if spent:
            listed = ", ".join(f"{part} {value:.1f}" for part, value in spent.items())
            notes.append(f"Median seconds of a trial: {listed}.")
        answer = {
            "best": None if top is None else asdict(top),
            "config": self.write_best(top, winner_of(confirmed), tracker),
            "failed": {r.trial: r.error for r in records if r.state == "failed"},
            "trial_seconds": spent,
        }
        return answer, notes, {}

    def write_best(self, top: TrialRecord | None, winner: Confirmed | None, tracker: Tracker) -> str | None:
        """Write the configuration of the winner, or of the best trial under a name that says what it is.

        Args:
            top: the best trial by its own score.

        Returns:
            The address of the file, ready for `ddpm train --config`; None where no trial finished.
        """
        found = winner or top
        if found is None:
            return None
        name, other = (CONFIRMED, UNCONFIRMED) if winner is not None else (UNCONFIRMED, CONFIRMED)
        config = apply(self.config, found.params).model_copy(update={"name": f"{self.name}-best"})
        text = tracking.to_json(config.model_dump(mode="json"))
        with tracking.warn_on_error("the best configuration"):
            tracker.text(text, f"{layout.BEST}/{name}.json")
        where = layout.best_file(self.store.uri, name)
        self.storage.write(where, text.encode())
        self.storage.delete(layout.best_file(self.store.uri, other))  # of an earlier call of this study
        return where
