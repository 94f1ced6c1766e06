"""The confirmation of a training study: its best trained models against that of the configuration as it stands.

What is judged again are trained models. Another training of the same settings with another seed would give another
model, so a confirmed model is better beyond the noise of its samples, which says less of its settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ray
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.model import Model
from ddpm.quality import Measured
from pipelines import references
from pipelines.checkpoints import ModelError
from pipelines.config import Config, ConfigError, sampling
from pipelines.display import Notice
from pipelines.evaluation.compare import Distance
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.real import Real
from pipelines.search.confirmation import DEFAULT, Candidate, Confirmed, decide
from pipelines.search.fresh_samples import bounds, draw_all
from pipelines.search.judge import Subject, scores
from pipelines.search.space import apply
from pipelines.search.study import TrialRecord, loss, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.shards.captions import Captions
from pipelines.storage import Storage

BOUND_IMAGES = 32
"""Real test images, at least, that have judged no trial and on which the bound is confirmed."""


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


def confirm(
    study: StudyConfig,
    base: Config,
    evaluator: Evaluator,
    real: Real,
    records: Sequence[TrialRecord],
    storage: Storage,
    captions: Captions | None,
    fresh: tuple[Tensor, Conditioning | None],
    *,
    trials_seed: int,
    seed: int,
    notice: Notice,
) -> list[Confirmed]:
    """Judge the models of the best trials and of the default again, with more samples and noise that no trial has used.

    The distance of their samples decides; of a study that optimises bits/dim, the bound of test images that have judged
    no trial.

    Args:
        captions: as for `Shared.of`.
        fresh: of `fresh_images`.
        trials_seed: of the order of labels and captions, as in the trials.
        seed: of the noise.

    Returns:
        The scores, best first; none where the default did not train to its end.
    """
    selected = chosen(study, base, records)
    if not selected:
        notice("nothing is confirmed: the configuration as it stands did not train to its end, see its trial")
        return []
    models: dict[str, Model] = {}
    for trial, record in selected.items():
        reference = f"runs:/{record.run_id}/{int(record.scores['images_seen'])}"
        try:
            models[trial] = references.resolve(reference, tracking_uri=base.tracking.uri, storage=storage).model
        except ModelError as error:
            notice(f"trial {record.trial} is not confirmed: {error}")
    if DEFAULT not in models or len(models) == 1:
        notice("nothing is confirmed: a comparison needs the model of the default and that of another trial")
        return []
    subject = Subject.of(models[DEFAULT], evaluator, real, {}, trials_seed, captions)
    settings = {trial: sampling(apply(base, selected[trial].params)) for trial in models}
    candidates = {trial: Candidate(trial, selected[trial].params, settings[trial]) for trial in models}
    shared = {trial: ray.put(replace(subject, model=model)) for trial, model in models.items()}
    drawn = draw_all([(shared[t], settings[t]) for t in models], study.confirm_samples, seed, base, notice)
    by_trial = dict(zip(models, drawn, strict=True))
    values = {trial: scores(subject, samples)[0] for trial, samples in by_trial.items()}
    if study.objectives == ("bits_per_dim",):
        found = bounds([shared[trial] for trial in models], *fresh, seed, base, notice)
        measured = {trial: Measured.mean(bound) for trial, bound in zip(models, found, strict=True)}
        return decide(candidates, measured, values, "bits_per_dim")
    distance = Distance.of(real)
    measured = {trial: distance(samples.features) for trial, samples in by_trial.items()}
    return decide(candidates, measured, values, distance.measure)
