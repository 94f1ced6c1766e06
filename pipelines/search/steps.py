"""The time steps of a sampler, chosen or learned for one trained model in seconds or minutes: `ddpm search steps`.

Unlike the other studies it judges nothing by scores of samples, but by how far samples end from where the model's own
fine trajectories do, on noise that the search has not seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.inference import can_inpaint
from ddpm.model import Model
from ddpm.prediction import Denoiser
from ddpm.samplers import DPMSolver, initial_noise, last
from ddpm.samplers.generalized import weights_of
from ddpm.schedule import NoiseSchedule
from ddpm.step_learning import StepLearning
from ddpm.step_search import StepSearch
from pipelines import tracking
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config, ConfigError, sampling_overrides
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.prompts import open_captions
from pipelines.presentation.progress import StageNotice
from pipelines.search.study import StudyStore, confirmation_seed, open_study_run, trials_seed
from pipelines.shards.captions import Captions
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage, join, layout

COMPARED = ("trailing", "karras", "exponential")
"""Spacings that the chosen levels are compared with, beside that of the model's own settings."""
LEVELS_OF = {"ddim": "ddim", "dpm_solver": "dpm_solver", "unipc": "dpm_solver"}
"""Samplers whose steps can be chosen -> that by whose local errors they are.

Those of UniPC depend on states that its corrector changes; its predictor is much the same as DPM-Solver++."""
CHOSEN, LEARNED = "chosen", "learned"


@dataclass(frozen=True)
class StepsAsked:
    """How the steps of a sampler are found.

    Attributes:
        trajectories: fine trajectories that are followed, and as many again to compare with.
        search: how levels are chosen by them.
        learning: how levels and weights are learned after the levels were chosen; None only chooses levels.
    """

    trajectories: int
    search: StepSearch
    learning: StepLearning | None = None


@dataclass(frozen=True)
class FoundSteps:
    """Levels that were chosen for a model, or levels and weights that were learned for it.

    Attributes:
        settings: the model's settings with them.
        distances: root mean square per pixel between samples in so many steps and the ends of the fine trajectories
            from the same fresh noise, for what was chosen and learned and for spacings, by name.
    """

    settings: Sampling
    distances: dict[str, float]


def find_steps(
    model: Model,
    settings: Sampling,
    asked: StepsAsked,
    seeds: tuple[int, int],
    captions: Captions | None = None,
    notice: StageNotice = lambda stage, text: None,
) -> FoundSteps:
    """Return settings whose sampler suits a model best, in as many steps as it has.

    Args:
        model: with the networks that its guidance needs, on the device to use.
        settings: of a sampler of `LEVELS_OF`.
        seeds: of the noise of the search, and of that of the comparison.
        captions: that a model on text is asked for.
        notice: called with "steps" and a line of text as learning goes on.

    Raises:
        ValueError: the grid has fewer levels than the sampler.
    """
    schedule, kind, search = model.schedule, settings.to_json()["kind"], asked.search
    exact = settings.exact.wrap(model.denoiser, schedule, model.guides)
    device = next(model.network.parameters()).device
    ids = torch.arange(asked.trajectories, device=device)
    cond = _conditions(model, ids, captions)
    noise, fresh = (initial_noise(seed, ids, model.spec.shape) for seed in seeds)
    followed = search.trajectories(exact, schedule, noise, cond)
    levels, _ = search.find(followed, schedule, LEVELS_OF[kind], settings.sampler.steps)
    found = {CHOSEN: settings.with_fields(timesteps=levels)}
    if asked.learning is not None:
        total = asked.learning.updates

        def on_check(update: int, distance: float) -> None:
            notice("steps", f"{update:,} of {total:,} updates: {distance:.4g} from the ends of held-out trajectories")

        pairs = noise, followed.ends
        found[LEARNED] = learn_steps(found[CHOSEN], asked.learning, exact, schedule, pairs, cond, on_check)

    def ends(sampler: Any) -> Tensor:
        parts = [slice(i, i + 64) for i in range(0, asked.trajectories, 64)]
        with torch.no_grad():
            return torch.cat(
                [last(sampler(exact, schedule, fresh[p], None if cond is None else cond[p])) for p in parts]
            )

    fine = ends(DPMSolver(steps=search.grid, spacing=search.spacing))
    own = getattr(settings.sampler, "spacing", COMPARED[0])
    others = {name: settings.with_fields(spacing=name, timesteps=None) for name in dict.fromkeys((own, *COMPARED))}
    distances = {
        name: (ends(each.sampler) - fine).square().mean().sqrt().item() for name, each in {**found, **others}.items()
    }
    return FoundSteps(found.get(LEARNED, found[CHOSEN]), distances)


def learn_steps(
    chosen: Sampling,
    learning: StepLearning,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    pairs: tuple[Tensor, Tensor],
    cond: Conditioning | None = None,
    on_check: Callable[[int, float], None] | None = None,
) -> Sampling:
    """Return settings with levels and weights that were learned, beginning with those of a sampler at chosen levels.

    Args:
        chosen: settings of a sampler of `LEVELS_OF` with `timesteps`.
        pairs: where fine trajectories begin, and where they end, [B, C, H, W] each.
        denoiser, cond, on_check: see `StepLearning.learn`.
    """
    sampler: Any = chosen.sampler
    weights = weights_of(sampler, schedule, sampler.timesteps)
    learned = learning.learn(denoiser, sampler.timesteps, weights, *pairs, cond, on_check)
    return chosen.with_fields(kind="generalized", timesteps=learned.timesteps, weights=learned.weights)


def search_steps(
    config: Config,
    reference: str,
    name: str,
    changes: dict[str, Any],
    asked: StepsAsked,
    notice: StageNotice,
) -> dict[str, Any]:
    """Choose or learn the steps of a model, store them beside the studies and in MLflow, and return them as JSON types.

    Args:
        reference: the model, such as `models:/NAME@alias`.
        name: of the search.
        changes: fields of the model's settings to change: `kind` and `steps` of the sampler, `scale` of guidance.
        notice: called with "steps" and a line of text.

    Raises:
        ConfigError: the steps of such a sampler or model cannot be chosen.
        ModelError: there is no such model.
    """
    resolved = references.open_model(reference, config, str(task_device()))
    try:
        settings = _settings(resolved, changes)
        seeds = trials_seed(config, name), confirmation_seed(config, name, [])
        captions = _captions(resolved, config, notice, seeds[0])
        found = find_steps(resolved.model, settings, asked, seeds, captions, notice)
    except ValueError as error:
        raise ConfigError(f"search steps: {error}") from error
    for spacing, distance in sorted(found.distances.items(), key=lambda item: item[1]):
        notice("steps", f"{spacing}: {distance:.4g} from the ends of fine trajectories")
    overrides = " ".join(sampling_overrides(found.settings))
    notice("steps", f"use them with `ddpm register {reference} {overrides}`")
    return _store(found, config, name, reference)


def _settings(resolved: Resolved, changes: dict[str, Any]) -> Sampling:
    """Return the model's settings with the changes.

    Raises:
        ValueError: the sampler's steps cannot be chosen.
    """
    own = resolved.model.spec.sampling
    kind = changes.get("kind", own.to_json()["kind"])
    if kind not in LEVELS_OF:
        raise ValueError(f"the steps of {kind!r} cannot be chosen: name --sampler {', '.join(LEVELS_OF)}")
    settings = own.with_fields(**{**changes, "kind": kind})
    if settings.to_json().get("eta"):
        settings = settings.with_fields(eta=0.0)  # the steps of a deterministic sampler are chosen
    return settings


def _captions(resolved: Resolved, config: Config, notice: StageNotice, seed: int) -> Captions | None:
    """Return the captions of the test split of a model's data in a seeded order, for a model on text."""
    spec = resolved.model.spec
    if can_inpaint(spec):
        raise ValueError("a model that sees known pixels has no trajectories without them: name one without inpainting")
    if not spec.network.text_dim:
        return None
    dataset = read_dataset(spec.lineage.get("dataset_uri", config.data.uri), Storage.of(config))
    found = open_captions(spec.network.text_dim, dataset, config, lambda text: notice("steps", text))
    return None if found is None else found[0].shuffled(seed)


def _conditions(model: Model, ids: Tensor, captions: Captions | None) -> Conditioning | None:
    """Return the conditions of trajectories: the captions in turn, with the classes of their images, or the classes."""
    classes = len(model.spec.classes)
    if captions is not None:
        cond = captions.condition((ids % len(captions)).cpu(), labels=classes > 0).to(ids.device)
        return cond if cond.label is not None or not classes else replace(cond, label=ids % classes)
    return Conditioning(label=ids % classes) if classes else None


def _store(found: FoundSteps, config: Config, name: str, reference: str) -> dict[str, Any]:
    """Write what was found into the folder of the study and an MLflow run, and return it as JSON types."""
    note = f"Time steps that were {LEARNED if LEARNED in found.distances else CHOSEN} for {reference}."
    tracker = open_study_run(config, name, "steps", note)
    plain = {
        "study": name,
        "model": reference,
        "run_id": tracker.run_id,
        "sampling": found.settings.to_json(),
        "distances": found.distances,
    }
    Storage.of(config).write(join(StudyStore.of(config, name).uri, layout.STEPS), json.dumps(plain, indent=1).encode())
    with tracking.warn_on_error("the learned steps"):
        tracker.text(tracking.to_json(found.settings.to_json()), layout.BEST_SAMPLING)
        tracker.text("\n".join(sampling_overrides(found.settings)), layout.BEST_OVERRIDES)
        tracker.metrics({f"steps/{spacing}": distance for spacing, distance in found.distances.items()}, 0)
        tracker.status("FINISHED")
    return plain
