"""Parts of a report that are computed with the model: a film, its error by noise level, inpainted images.

They are cheap: a few pictures, drawn in a few dozen network evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ddpm.gaussian import q_sample
from ddpm.generate import Sampling, to_uint8
from ddpm.inference import Drawing, Inpainting, Noise, can_inpaint, inpainting_method
from ddpm.masks import random_mask
from ddpm.model import Model
from ddpm.samplers.base import predict, step_noise
from pipelines.checkpoints import references
from pipelines.checkpoints.references import Resolved
from pipelines.config import Config
from pipelines.evaluation.devices import task_device
from pipelines.evaluation.plots import label_grid
from pipelines.inference.files import film_strip
from pipelines.inference.likelihood import Data, read_data
from pipelines.inference.pictures import encoder_of, picture
from pipelines.inference.request import SampleRequest
from pipelines.presentation.charts import Point
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.images import Picture
from pipelines.presentation.progress import Notice, no_notice
from pipelines.report.facts import Facts, FilmStrip, Levels
from pipelines.report.subject import ReportSubject
from pipelines.shards.read import spread_positions

FILMED = 4
"""Pictures of the film."""
FILLED = 6
"""Test images of which a part is filled."""
MEASURED, MEASURED_LEVELS = 32, 24
"""Test images, and noise levels, at which the error is measured."""
MOST_STEPS = 50
"""Steps of a sampler; one that has more draws with these."""


def ask_model(facts: Facts, subject: ReportSubject, config: Config, notice: Notice = no_notice) -> Facts:
    """Return the facts with the parts that the model can compute; the notes name the others.

    Args:
        facts: recorded facts.
        notice: called with each part that cannot be computed, and the reason.
    """
    if facts.classifier or facts.images_seen is None:
        return facts  # it draws nothing, or the run has published no checkpoint yet
    notes = list(facts.notes)

    def attempt(what: str, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except (PipelineError, ValueError, RuntimeError) as error:  # of torch, where memory is short
            notes.append(f"{what}: {error}")
            notice(notes[-1])
            return None

    resolved = attempt("the model could not be loaded", lambda: _resolve(facts, subject, config))
    if resolved is None:
        return replace(facts, notes=tuple(notes))
    model, uri = resolved.model, resolved.model.spec.lineage.get("dataset_uri")
    prompts = None if facts.scores is None else (facts.scores.prompts or {}).get("examples")
    found = {"film": attempt("the film could not be drawn", lambda: film(resolved, prompts))}
    data = None
    if uri:
        data = attempt("the test images could not be read", lambda: read_data(uri, model, MEASURED, config))
    if data is not None:
        found["levels"] = attempt("the error by noise level could not be measured", lambda: levels(model, data))
        if can_inpaint(model.spec):
            found["inpainting"] = attempt("no image could be filled", lambda: inpainting(model, data))
    return replace(facts, **found, notes=tuple(notes))


def film(resolved: Resolved, prompts: list[str] | None) -> FilmStrip:
    """Return the film of some pictures, of different classes or prompts where the model has them.

    Args:
        prompts: for a model on text.
    """
    spec = resolved.model.spec
    sampling = _short(spec.sampling)
    some = spread_positions(len(spec.classes), FILMED).tolist()
    request = SampleRequest.of(
        labels=[spec.classes[i] for i in some] or None,
        prompts=prompts[: len(some) or FILMED] if prompts and spec.network.text_dim else None,
        count=1 if some or (prompts and spec.network.text_dim) else FILMED,
        sampling={} if sampling == spec.sampling else {"steps": sampling.sampler.steps},
        film=True,
    )
    drawn = picture(request, resolved.model, encode=encoder_of(resolved, request))
    assert drawn.film is not None
    return FilmStrip(Picture.of_pixels(film_strip(drawn.film)), _words(sampling))


def levels(model: Model, data: Data, seed: int = 0) -> Levels:
    """Return the mean squared error of the predicted noise by t, of test images without guidance (DDPM, eq. 14).

    Args:
        seed: of the noise.
    """
    device, schedule = next(model.network.parameters()).device, model.schedule
    x_0, cond = data.images.to(device), None if data.cond is None else data.cond.to(device)
    noise = step_noise(seed, torch.arange(len(x_0), device=device), tuple(x_0.shape[1:]))
    points = []
    with torch.no_grad():
        for t in (1 + spread_positions(schedule.num_steps, MEASURED_LEVELS)).tolist():
            eps = noise(t)
            pred = predict(model.denoiser, q_sample(x_0, t, eps, schedule).to(x_0.dtype), t, cond)
            each = (pred.eps.double() - eps.double()).square().flatten(1).mean(1).cpu()
            half = 1.96 * float(each.std()) / len(each) ** 0.5 if len(each) > 1 else 0.0
            points.append(Point(t, float(each.mean()), float(each.mean()) - half, float(each.mean()) + half))
    return Levels(len(x_0), tuple(points))


def inpainting(model: Model, data: Data, seed: int = 0) -> Picture:
    """Return test images with a part hidden, filled by the model, and as they are, in columns.

    Args:
        seed: of the masks and of the noise.
    """
    chosen = torch.from_numpy(spread_positions(len(data.images), FILLED))
    known, cond = data.images[chosen], None if data.cond is None else data.cond[chosen]
    mask = random_mask(seed, torch.arange(len(known)), (known.shape[2], known.shape[3]))
    method = inpainting_method(model, None, {})
    drawing = Drawing(
        Noise.numbered(seed, len(known)), _short(model.spec.sampling), cond, Inpainting(known, mask, method)
    )
    filled = to_uint8(drawing.draw(model).images).cpu().numpy()
    original = to_uint8(known).cpu().numpy()
    hidden = ~mask.permute(0, 2, 3, 1).numpy()
    rows = np.stack([np.where(hidden, np.uint8(128), original), filled, original])
    return Picture.of_pixels(label_grid(rows.reshape(-1, *original.shape[1:]), len(original)))


def _resolve(facts: Facts, subject: ReportSubject, config: Config) -> Resolved:
    """Return the model that is shown."""
    asked = subject.reference.startswith("models:/")
    reference = subject.reference if asked else f"runs:/{subject.tracker.run_id}/{facts.images_seen}"
    return references.open_model(reference, config, str(task_device()))


def _short(sampling: Sampling) -> Sampling:
    return sampling if sampling.sampler.steps <= MOST_STEPS else sampling.with_fields(steps=MOST_STEPS)


def _words(sampling: Sampling) -> str:
    plain = sampling.to_json()
    scale = f", guidance scale {plain['scale']:g}" if plain.get("scale") is not None else ""
    return f"{plain['kind']}, {sampling.sampler.steps} steps{scale}"
