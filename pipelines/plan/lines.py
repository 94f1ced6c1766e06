"""The lines of a plan: each choice with its settings and reason, and warnings for the user."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from ddpm.image_size import as_setting, in_words
from pipelines.config import override_value
from pipelines.evaluation.copies import LEAST
from pipelines.plan import clock
from pipelines.plan.budget import format_duration, written
from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.choose import MOST_PASSES, PIECE, SAMPLING, Basis, drawing_precision, methods, most_images
from pipelines.plan.facts import MachineFacts, PlanLine, SourceFacts, UserOverrides
from pipelines.plan.networks import JIT, Recipe, candidates, follows_own_method, native_size
from pipelines.storage import layout

FEW = 500
"""Training images below which a long training memorises them."""
MIRROR_PAIRS, MIRROR_ACCURACY = 60, 0.62
"""Images are mirrored only if at least this many held-out images were tested, and the upper end of the interval of the
accuracy of recognizing mirrored ones is below this."""
NAME = "name"
"""Title of the line about the names, which may change when a plan is stored."""
COMPARISON = "docs/training-methods.md"
GENERAL = ("train", "images", "data", "dataset", "metadata")
"""Names of folders and files that say nothing about the images."""
DECISIVE = ("data.image_size", "data.channels", "data.geometry", "data.text_encoder", "data.test_fraction")
"""Settings that distinguish datasets of the same source."""


def data_lines(source: SourceFacts, basis: Basis, user: UserOverrides) -> list[PlanLine]:
    """Return the lines about the data."""
    size, name = basis.candidate.size, source_name(source.source)
    low, usual, high = source.shorter_sides
    if native_size(source) == size:
        why_size, geometry = "every image has this size", "keep"
    else:
        mixed = f"the images' shorter sides are {usual} pixels" if low == high else f"shorter sides are {low} to {high}"
        why_size, geometry = f"{mixed}; the largest size at which this budget trains a good network", "crop"
    channels = 1 if source.grey else 3
    shapes = {"data.image_size": size, "data.geometry": geometry, "data.channels": channels}
    decided = {key: user.get(key, shapes.get(key)) for key in DECISIVE}
    digest = hashlib.sha256(json.dumps([source.source, decided], default=str).encode()).hexdigest()[:8]
    classes = len(source.class_counts)
    shards = max(16, min(1000, source.train_images // 16))
    flips, why_flip = mirrored(source)
    return [
        user.line(
            "dataset",
            {
                "data": "folder",
                "data.source": source.source,
                "data.uri": layout.dataset_folder("${storage.root}", f"{name}-{as_setting(size)}px-{digest}"),
                "data.num_classes": classes,
                "data.shard_samples": shards,
                "data.lanes": math.gcd(4, basis.batch),
                "data.window": 3,
            },
            f"{source.images:,} images" + (f", {classes} classes" if classes else ""),
            f"{source.test_images:,} of them are kept for testing",
        ),
        user.line("image size", {"data.image_size": size, "data.geometry": geometry}, in_words(size), why_size),
        user.line(
            "channels",
            {"data.channels": channels},
            "grey" if source.grey else "colour",
            f"of {source.opened:,} opened images {'none has' if source.grey else 'some have'} colour",
        ),
        user.line("mirroring", {"data.flip": flips}, "yes" if flips else "no", why_flip),
    ]


def mirrored(source: SourceFacts) -> tuple[bool, str]:
    """Return whether images are mirrored at random in training, and why."""
    found = source.mirror
    told = f"a small network tells {found.accuracy:.0%} of {found.pairs:,} unseen images from their mirror images"
    if source.names_sides:
        return False, "captions name left and right"
    if found.pairs < MIRROR_PAIRS:
        return False, f"{source.images:,} images are too few to test whether mirror images look alike"
    if found.highest >= MIRROR_ACCURACY:
        sure = "are" if found.accuracy >= MIRROR_ACCURACY else "may be"
        return False, f"{told}: mirror images {sure} different pictures, as for letters or digits"
    return True, f"{told}, hardly better than guessing"


def network_lines(source: SourceFacts, basis: Basis, user: UserOverrides) -> list[PlanLine]:
    """Return the lines about the network, its conditions, the objective and the schedule."""
    candidate, millions = basis.candidate, basis.speed.parameters / 1e6
    larger = next(
        (c for c in candidates(source, user) if c.size == candidate.size and c.needed > candidate.needed), None
    )
    why = "the largest network that sees the images it needs"
    if larger is not None:
        why = f"the next larger one would not see the {larger.needed:,} images that it needs to be better"
    if candidate.recipe is not None:
        return [*_recipe_lines(basis, candidate.recipe, user), _condition_line(source, basis, user)]
    why += f"; {_no_transformer(basis, user)}"
    objective = {key: value for key, value in methods(user).items() if key.partition(".")[0] == "objective"}
    weight = ", learned weight" if "objective.learned_weight" in objective else ""
    shift = math.log(64**2 / candidate.pixels) if candidate.pixels > 64**2 else 0.0
    network = user.line("network", candidate.settings, f"{candidate.network} UNet, {millions:.1f} M parameters", why)
    if candidate.network == "hand":
        given = {key: value for key, value in user.settings.items() if key.partition(".")[0] == "model"}
        text = ", ".join(f"{key}={override_value(value)}" for key, value in given.items())
        network = PlanLine("network", {}, f"{text}: {millions:.1f} M parameters", "set by hand")
    return [
        network,
        _condition_line(source, basis, user),
        user.line("objective", objective, f"v-prediction{weight}", f"the best in the comparison ({COMPARISON})"),
        user.line(
            "schedule",
            {"schedule": "cosine", "schedule.log_snr_shift": round(shift, 3)},
            "cosine" + (f", shifted by {shift:.2f}" if shift else ""),
            "more noise for large images (Hoogeboom et al. 2023)"
            if shift
            else f"better than linear, as good as sigmoid with these methods ({COMPARISON})",
        ),
    ]


def _recipe_lines(basis: Basis, recipe: Recipe, user: UserOverrides) -> list[PlanLine]:
    """Return the lines about the network, the objective and the schedule of a recipe."""
    why = f"a transformer: this budget sees {basis.images:,} images, and its recipe {recipe.images:,} ({recipe.source})"
    return [
        user.line("network", recipe.model, f"{recipe.title}, {basis.speed.parameters / 1e6:.1f} M parameters", why),
        user.line("objective", recipe.objective, "x_0-prediction, loss of the velocity", "the recipe's"),
        user.line("schedule", {"schedule": "flow"}, "flow matching", "the recipe's"),
    ]


def _no_transformer(basis: Basis, user: UserOverrides) -> str:
    """Return why the network is no transformer."""
    if basis.candidate.size != JIT.size:
        return f"no transformer: {JIT.title}, the one with a recipe, is for {in_words(JIT.size)} ({JIT.source})"
    if follows_own_method(user):
        return f"no transformer: the recipe of {JIT.title} has its own loss, path, optimizer and sampler"
    return f"no transformer: the recipe of {JIT.title} sees {JIT.images:,} images ({JIT.source})"


def _condition_line(source: SourceFacts, basis: Basis, user: UserOverrides) -> PlanLine:
    settings: dict[str, Any] = {"model.class_conditional": basis.labels}
    parts = [f"{len(source.class_counts)} classes"] if basis.labels else []
    why = "the folders or labels of the images" if basis.labels else "the images have no labels"
    if basis.texts:
        settings |= {"data.text_encoder": source.encoder, "model.text_dim": source.encoder_width}
        parts.append("captions")
        why = f"{source.captions:,} images have captions" + (f"; {why}" if basis.labels else "")
    elif source.captions:
        why += "; the captions are not used"
    if basis.guided:
        settings |= {"objective.label_drop": 0.1}
    elif len(source.class_counts) == 1:
        why = "a single class carries no information"
    return user.line("conditions", settings, " and ".join(parts) or "none", why)


def optim_lines(source: SourceFacts, machine: MachineFacts, basis: Basis, user: UserOverrides) -> list[PlanLine]:
    """Return the lines about the optimization."""
    images, batch = basis.images, basis.batch
    passes = images / source.train_images
    capped = images + batch > most_images(source) and not user.sets("images")
    known = capped or user.sets("images") or user.get("objective", user.get("objective.loss", "")) == "consistency"
    length = {"images": images} if known else {"images": images, "training_s": round(basis.training_s)}
    rate_s = images / basis.training_s
    why = f"{format_duration(basis.training_s)} at {rate_s:,.0f} images/s; each image is seen {passes:.0f} times" + (
        "" if known else "; corrected by the measured speed during training"
    )
    return [
        _optimizer_line(basis, user),
        user.line(
            "length",
            length,
            f"{images:,} images" if known else f"about {images:,} images",
            f"each image is seen {MOST_PASSES:,} times, more would only memorise them" if capped else why,
        ),
        _batch_line(machine, basis, user),
        _rate_line(basis, user),
        user.line(
            "average",
            {"optim.ema_half_life": max(batch, images // 20)},
            f"half-life {max(batch, images // 20):,} images",
            "a twentieth of the run: a longer half-life would keep its beginning",
        ),
    ]


def _optimizer_line(basis: Basis, user: UserOverrides) -> PlanLine:
    if basis.candidate.recipe is not None:
        return user.line("optimizer", {"optim": "adamw"}, "AdamW", "the recipe's")
    kind = {"optim.kind": methods(user)["optim.kind"]}
    return user.line("optimizer", kind, "Muon", f"the better one in the comparison ({COMPARISON})")


def _rate_line(basis: Basis, user: UserOverrides) -> PlanLine:
    recipe, warmup = basis.candidate.recipe, {"optim.warmup_images": max(basis.batch, basis.images // 20)}
    if recipe is not None:
        scaled = recipe.optim["optim.lr"] * basis.batch / recipe.batch
        settings = {**recipe.optim, "optim.lr": float(f"{scaled:.2g}"), **warmup}
        return user.line("learning rate", settings, f"{scaled:.2g}, constant", "the recipe's, by the batch size")
    rate = CALIBRATION.networks.learning_rates[basis.candidate.network] * math.sqrt(min(basis.batch, 512) / 128)
    return user.line(
        "learning rate",
        {
            "optim.lr": float(f"{rate:.2g}"),
            "optim.betas": [0.9, 0.99],
            "optim.weight_decay": 0.01,
            **warmup,
            "optim.decay": "linear",
        },
        f"{rate:.2g}, decaying to the end",
        "wider networks need lower rates; the decay ends with the budget",
    )


def _batch_line(machine: MachineFacts, basis: Basis, user: UserOverrides) -> PlanLine:
    """Return the line about the batch size; a GPU processes at most as many images at once as were measured."""
    settings, why = {"batch_size": basis.batch}, f"{max(1, basis.images // basis.batch):,} steps"
    if machine.gpus and math.ceil(basis.batch / basis.workers) > PIECE["cuda"]:
        settings["micro_batch_size"] = PIECE["cuda"]
        why += f"; a GPU processes {PIECE['cuda']} images at once, which were measured to fit its memory"
    return user.line("batch", settings, str(basis.batch), why)


def machine_lines(machine: MachineFacts, basis: Basis, user: UserOverrides) -> list[PlanLine]:
    """Return the lines about workers, checkpoints and sample grids."""
    images, batch = basis.images, basis.batch
    marks = 4 if basis.training_s < 1_800 else 12
    every = max(batch, images // marks // batch * batch)
    grids = basis.grids
    return [
        user.line(
            "workers",
            {
                "cluster.num_workers": basis.workers,
                "cluster.gpus_per_worker": 1 if machine.gpus else 0,
                "cluster.threads_per_worker": 1,
            },
            f"{basis.workers} of one {'GPU' if machine.gpus else 'core'}, {machine.precision}",
            _why_workers(machine, basis),
        ),
        user.line(
            "checkpoints",
            {"checkpoint.every": every, "checkpoint.publish_every": 10 * images},  # the last one is, in any case
            f"every {every:,} images",
            f"after a crash at most {format_duration(basis.training_s / marks)} are repeated",
        ),
        user.line(
            "grids",
            {
                "tracking.grid_every": max(batch, images // grids.count // batch * batch),
                "tracking.grid_images": grids.images,
                "tracking.log_every": max(batch, images // 50 // batch * batch),
            },
            f"{grids.count} of {grids.images} samples",
            f"they take about {grids.seconds / basis.training_s:.0%} of the training",
        ),
    ]


def _why_workers(machine: MachineFacts, basis: Basis) -> str:
    cores = clock.processes(machine)
    if machine.gpus or cores == 1 or basis.workers not in (1, cores):
        return f"what {machine.where} has"
    gain = f"{clock.gain_of_workers(machine):.2f} times as fast"
    return f"{cores} would be {gain}: they share physical cores" if basis.workers == 1 else f"{gain} as one"


def judging_lines(
    source: SourceFacts, machine: MachineFacts, basis: Basis, budget_s: float, user: UserOverrides
) -> list[PlanLine]:
    """Return the lines about sampling, scores and the registered model."""
    judging, name = basis.judging, source_name(source.source)
    precision = drawing_precision(machine.precision, user)
    guidance: dict[str, Any] = {"guidance": "classifier_free" if basis.guided else "none"}
    if basis.guided:
        guidance["guidance.scale"] = basis.scale
    judge = "contrastive network" if judging.kind == "contrastive" else judging.kind
    sampler: dict[str, Any] = {"sampler": "dpm_solver", "sampler.steps": SAMPLING.steps}
    drawn, why = (
        f"DPM-Solver++, {SAMPLING.steps} steps",
        "on digits its 8 steps are as good as 50 of DDIM (docs/few-steps.md)",
    )
    if (recipe := basis.candidate.recipe) is not None:
        kept = lambda key: basis.guided or not key.startswith("guidance")  # noqa: E731
        sampler = {key: value for key, value in recipe.sampler.items() if kept(key)}
        drawn, why = f"Heun's method, {sampler['sampler.steps']} steps", "the recipe's"
    return [
        user.line(
            "sampler",
            {**sampler, "sampler.precision": precision, **guidance},
            drawn
            + (f", guidance {basis.scale:g}" if basis.guided else "")
            + (", in bf16" if precision == "bf16" else ""),
            why + ("; bf16 samples are as good and faster (docs/performance.md)" if precision == "bf16" else ""),
        ),
        user.line(
            "scores",
            {
                "evaluation.n": judging.n,
                "evaluation.seeds": judging.seeds,
                "evaluation.likelihood_images": judging.likelihood_images,
                "evaluation.evaluator": judging.kind,
                "evaluation.evaluator_passes": judging.passes,
                "evaluation.every": None,
                "registry.n": judging.n,
            },
            f"{judging.seeds} x {judging.n:,} samples, judged by a {judge}",
            f"they take at most {clock.SCORE_SHARE:.0%} of the budget; its training is {judging.passes} passes",
        ),
        name_line(f"{name}-{written(budget_s)}", name, user),
    ]


def name_line(run: str, model: str, user: UserOverrides) -> PlanLine:
    """Return the line about the names of the run and of the registered model."""
    return user.line(
        NAME,
        {"name": run, "registry.model": model},
        f"run {run}, model {model}",
        "runs of other budgets become versions of the same model",
    )


def warnings(source: SourceFacts, machine: MachineFacts, basis: Basis, budget_s: float) -> tuple[str, ...]:
    """Return warnings for the user before the training starts."""
    found = []
    if source.train_images < FEW:
        found.append(
            f"{source.train_images:,} images are few: a model of fewer than about {FEW} memorises them and draws "
            "copies, which the scores will show; use more images, or a shorter budget"
        )
    if source.test_images < LEAST:
        found.append(
            f"{source.test_images} test images are too few to test whether samples are copies of training images. The "
            f"gate requires at least {LEAST} and will refuse the model: add images, or raise data.test_fraction"
        )
    if source.class_counts:
        least = min(source.class_counts, key=lambda name: source.class_counts[name])
        if source.class_counts[least] < 20:
            found.append(f"class {least} has {source.class_counts[least]} images: samples of it will resemble them")
    if basis.images < basis.candidate.needed and basis.candidate.network != "hand":
        needed_s = budget_s + (basis.candidate.needed - basis.images) * basis.training_s / max(basis.images, 1)
        found.append(
            f"{basis.images:,} images are a short training, even for the smallest network: expect blurred samples; "
            f"budget={written(math.ceil(needed_s / 60) * 60)} trains it long enough"
        )
    total_s = sum(basis.seconds.values())
    if total_s > budget_s:
        found.append(
            f"what is set by hand takes {format_duration(total_s)}, more than the budget of {format_duration(budget_s)}"
        )
    if source.captions and not basis.texts:
        found.append(f"the captions of {source.captions:,} images are not used")
    if 0 < source.captions < source.images:
        found.append(f"{source.images - source.captions:,} images have no caption")
    if source.unreadable:
        found.append(f"{source.unreadable} of {source.opened} opened images cannot be read and will be left out")
    return tuple(found)


def source_name(source: str) -> str:
    """Return a name for runs and models of a source: that of its folder or file, or of the parent folder.

    The parent is used if the name says nothing about the images: photos/train is called photos.
    """
    above, _, last = source.rstrip("/").rpartition("/")
    name = _as_name(last)
    if name.lower() in GENERAL and _as_name(above.rpartition("/")[2]):
        return source_name(above)
    return name or "pictures"


def _as_name(part: str) -> str:
    """Return a part of a path in characters that names of runs and models may have; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"\.(zip|csv|jsonl)$", "", part)).strip("-._")
