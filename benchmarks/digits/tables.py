"""The tables of the page `docs/digits.md`, computed from the trained models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.digits.data import SEEN, UNSEEN, WORDS
from benchmarks.digits.training import SCHEDULE, Zoo
from ddpm.bound import Bound, mean_bits_per_dim, variational_bound
from ddpm.conditioning import Conditioning
from ddpm.gaussian import ReverseVariance
from ddpm.generate import Sampling, generate
from ddpm.guidance import Autoguided, ClassifierGuided, Guides
from ddpm.likelihood import OdeBitsPerDim, ode_bits_per_dim
from ddpm.masks import inpainting_condition, masked_error, paste, random_mask, seam_error
from ddpm.prediction import Clipped, Denoiser, Prediction
from ddpm.quality import FeatureMoments, Interval, bootstrap, frechet_distance, precision_recall
from ddpm.samplers import Sample, initial_noise, last, step_noise
from ddpm.samplers.repaint import RePaint, Replacement
from pipelines.evaluation.images import to_levels

SEED = 1
SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Row:
    """A row of a table: the method, its measurements and its images, [N, 1, 8, 8]."""

    name: str
    scores: dict[str, Any]
    images: Tensor


def quality(images: Tensor, labels: Tensor, zoo: Zoo) -> dict[str, Any]:
    """Return class accuracy, Frechet distance to the reference, and precision and recall against the test split."""
    digits = zoo.digits
    found = digits.evaluator.encoder(to_levels(images))
    real = digits.evaluator.encoder(to_levels(digits.test)).features
    assert found.probabilities is not None
    manifold = precision_recall(real, found.features)

    def distance(part: Tensor) -> float:
        return frechet_distance(digits.reference, FeatureMoments.of(part))

    return {
        "class accuracy": (found.probabilities.argmax(1) == labels).double().mean().item(),
        "Frechet distance": bootstrap(distance, found.features, draws=zoo.draws, seed=0),
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def draw(denoiser: Denoiser, cond: Conditioning | None, count: int, **settings: Any) -> Tensor:
    """Return the images with ids 0 .. count - 1 for the page's seed."""
    return generate(
        denoiser, SCHEDULE, Sampling.of(**settings), cond=cond, count=count, shape=SHAPE, seed=SEED, batch_size=128
    )


# --- guidance ------------------------------------------------------------------------------------------------


def guidance(zoo: Zoo) -> Iterator[Row]:
    """Yield a row for every kind of guidance of one model, for DDIM and the test split's labels."""
    digits, model = zoo.digits, zoo.classes()
    labels, n = digits.test_labels, len(digits.test_labels)
    cond = Conditioning(label=labels)
    yield Row("real test images", quality(digits.test, labels, zoo), digits.test)
    free = [("no label (scale 0)", 0.0), ("label, no guidance (scale 1)", 1.0)]
    free += [(f"classifier-free {s:g}", s) for s in (1.5, 2.0, 3.0)]
    for name, scale in free:
        images = draw(model, cond, n, steps=zoo.steps, scale=scale)
        yield Row(name, quality(images, labels, zoo), images)
    options = {"scale": 3.0, "rescale": 0.7}
    images = draw(model, cond, n, steps=zoo.steps, **options)
    yield Row("classifier-free 3, rescale 0.7", quality(images, labels, zoo), images)
    images = draw(model, cond, n, steps=zoo.steps, scale=3.0, interval=(0.2, 0.8))
    yield Row("classifier-free 3 in 0.2..0.8 T", quality(images, labels, zoo), images)
    for scale in (1.0, 2.0, 4.0):
        guided = ClassifierGuided(scale).wrap(model, SCHEDULE, Guides(log_prob=zoo.classifier().class_log_prob))
        images = draw(guided, cond, n, steps=zoo.steps)
        yield Row(f"classifier {scale:g}", quality(images, labels, zoo), images)
    for scale in (1.5, 2.0):
        images = draw(Autoguided(scale).wrap(model, SCHEDULE, Guides(weak=zoo.weak())), cond, n, steps=zoo.steps)
        yield Row(f"autoguidance {scale:g}", quality(images, labels, zoo), images)


# --- samplers ------------------------------------------------------------------------------------------------


def samplers(zoo: Zoo, budgets: tuple[int, ...], longest: int) -> Iterator[Row]:
    """Yield a row for every sampler and budget of network evaluations, for the test split's labels, unguided."""
    digits, model = zoo.digits, zoo.classes()
    cond, n = Conditioning(label=digits.test_labels), len(digits.test_labels)
    for kind in ("ddim", "dpm_solver", "heun", "ancestral", "predictor_corrector"):
        slow = kind in ("ancestral", "predictor_corrector")
        for budget in budgets + ((longest,) if slow else ()):
            # Heun needs 2 steps - 1 evaluations, and so does a corrector step at every level but the last.
            steps = budget if kind in ("ddim", "dpm_solver", "ancestral") else (budget + 1) // 2
            nfe = steps if kind in ("ddim", "dpm_solver", "ancestral") else 2 * steps - 1
            images = draw(model, cond, n, kind=kind, steps=steps)
            scores = {"budget": budget, "evaluations": nfe, **quality(images, digits.test_labels, zoo)}
            yield Row(kind, scores, images)


# --- inpainting ----------------------------------------------------------------------------------------------


def inpainting(zoo: Zoo) -> Iterator[Row]:
    """Yield a row for each of three ways to fill hidden pixels of the test split, all with the class given."""
    digits, steps = zoo.digits, zoo.steps
    truth, labels, n = digits.test, digits.test_labels, len(digits.test)
    numbers = torch.arange(n)
    mask = random_mask(SEED, numbers, SHAPE[1:])
    cond = Conditioning(label=labels)
    x_T, noise = initial_noise(SEED, numbers, SHAPE), step_noise(SEED, numbers, SHAPE)
    model = Clipped(zoo.classes(), SCHEDULE)
    tuned = Clipped(zoo.inpainting(), SCHEDULE)

    hidden = torch.where(mask, truth, 0.0)
    yield Row("what is known", _inpainting_scores(hidden, truth, mask, labels, zoo), hidden)
    ways: list[tuple[str, int, Iterator[Sample]]] = [
        *(
            ("replacement", n, Replacement(steps=n)(model, SCHEDULE, x_T, cond, known=truth, mask=mask, noise=noise))
            for n in (steps, 5 * steps)
        ),
        (
            f"RePaint ({steps} steps, jump 1, 5 resamplings)",
            steps + 4 * (steps - 1),
            RePaint(steps=steps, jump_length=1, resamplings=5)(
                model, SCHEDULE, x_T, cond, known=truth, mask=mask, noise=noise
            ),
        ),
    ]
    for name, nfe, samples in ways:
        with torch.no_grad():
            images = last(samples).clamp(-1, 1)
        yield Row(name, {"evaluations": nfe, **_inpainting_scores(images, truth, mask, labels, zoo)}, images)
    asked = inpainting_condition(truth, mask, cond)
    for kind in ("ancestral", "ddim"):
        drawn = draw(tuned, asked, n, kind=kind, steps=steps, clip=None)
        images = paste(truth, drawn, mask)
        scores = {"evaluations": steps, **_inpainting_scores(images, truth, mask, labels, zoo)}
        yield Row(f"fine-tuned model, {kind}", scores, images)


def _inpainting_scores(images: Tensor, truth: Tensor, mask: Tensor, labels: Tensor, zoo: Zoo) -> dict[str, Any]:
    errors = {
        "error in the hidden region": bootstrap(_mean, masked_error(images, truth, mask), draws=zoo.draws, seed=0),
        "error across the seam": bootstrap(_mean, seam_error(images, truth, mask), draws=zoo.draws, seed=0),
    }
    scores = quality(images, labels, zoo)
    return {**errors, "class accuracy": scores["class accuracy"], "Frechet distance": scores["Frechet distance"]}


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


# --- text ----------------------------------------------------------------------------------------------------


def text(zoo: Zoo) -> Iterator[Row]:
    """Yield rows on whether the evaluator recognises the prompted digit, for as many images as the test split."""
    digits, captions, model = zoo.digits, zoo.captions, zoo.text()
    labels, n = digits.test_labels, len(digits.test_labels)
    reader = Guides(log_prob=zoo.reader().text_log_prob)
    for name, first, count in (("templates seen in training", 0, len(SEEN)), ("unseen", len(SEEN), len(UNSEEN))):
        cond = captions.of(labels, first + torch.arange(n) % count)
        for how, denoiser, scale in (
            ("no guidance", model, 1.0),
            ("classifier-free 2", model, 2.0),
            ("classifier of text 3", ClassifierGuided(3.0).wrap(model, SCHEDULE, reader), 1.0),
        ):
            images = draw(denoiser, cond, n, steps=zoo.steps, scale=scale)
            scores = quality(images, labels, zoo)
            named = {"guidance": how, "prompt accuracy": scores.pop("class accuracy"), **scores}
            yield Row(name, named, images)


def prompted(zoo: Zoo) -> list[tuple[str, Tensor]]:
    """Return eight images for one prompt of every digit, with templates in turn, including unseen ones."""
    captions = zoo.captions
    templates = [*SEEN, *UNSEEN]
    pictures = []
    for label, _ in enumerate(WORDS):
        template = label % len(templates)
        cond = captions.of(torch.full((8,), label), torch.full((8,), template))
        pictures.append(
            (templates[template].format(WORDS[label]), draw(zoo.text(), cond, 8, steps=zoo.steps, scale=2.0))
        )
    return pictures


# --- likelihood ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembering:
    """A denoiser that caches its prediction for every timestep, because the bounds of a batch share their x_t."""

    denoiser: Denoiser
    answers: dict[float, Prediction] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        key = float(t[0])
        if key not in self.answers:
            self.answers[key] = self.denoiser(x_t, t, cond)
        return self.answers[key]


@dataclass(frozen=True)
class FixedVariance:
    """A denoiser whose learned variance is ignored."""

    denoiser: Denoiser

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        return replace(self.denoiser(x_t, t, cond), variance_fraction=None)


@dataclass(frozen=True)
class Likelihoods:
    """Bits per dimension of the test split by method, and mean terms of the bound by timestep and variance."""

    bits: dict[str, Interval]
    terms: dict[str, list[float]]
    prior: float
    nfe: dict[str, int]
    t_min: float
    truncation_cost: float


def likelihood(zoo: Zoo, batch_size: int = 128, steps: int | None = None, tolerance: float = 1e-5) -> Likelihoods:
    """Return the bound for three variances, all with the same noise, and the ODE with Hutchinson's trace estimate."""
    digits = zoo.digits
    # Clipped, as in sampling: near T the x_0 computed from the predicted eps is otherwise unbounded.
    model = Clipped(zoo.classes(), SCHEDULE)
    parts: dict[str, list[Bound]] = {f"bound, variance {v}": [] for v in ("learned", "small", "large")}
    flows: list[OdeBitsPerDim] = []
    for start in range(0, len(digits.test), batch_size):
        span = slice(start, start + batch_size)
        x_0, cond = digits.test[span], Conditioning(label=digits.test_labels[span])
        numbers = torch.arange(start, start + len(x_0))
        learned = Remembering(model)
        fixed = FixedVariance(learned)
        options: dict[str, Any] = {"seed": SEED, "image_ids": numbers, "steps": steps}
        parts["bound, variance learned"].append(variational_bound(learned, SCHEDULE, x_0, cond, **options))
        for variance in get_args(ReverseVariance):
            bound = variational_bound(fixed, SCHEDULE, x_0, cond, variance=variance, **options)
            parts[f"bound, variance {variance}"].append(bound)
        close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
        flows.append(ode_bits_per_dim(model, SCHEDULE, x_0, cond, seed=SEED, image_ids=numbers, **close))
    bits = {name: mean_bits_per_dim(torch.cat([b.total for b in bounds])) for name, bounds in parts.items()}
    bits["probability-flow ODE"] = mean_bits_per_dim(torch.cat([f.bits_per_dim for f in flows]))
    evaluations = dict.fromkeys(parts, steps or SCHEDULE.num_steps) | {
        "probability-flow ODE": max(f.nfe for f in flows)
    }
    return Likelihoods(
        bits=bits,
        terms={name: torch.cat([b.terms for b in bounds]).mean(0).tolist() for name, bounds in parts.items()},
        prior=torch.cat([b.prior for b in parts["bound, variance learned"]]).mean().item(),
        nfe=evaluations,
        t_min=flows[0].t_min,
        truncation_cost=flows[0].truncation_cost,
    )


def plain(value: Any) -> Any:
    """Return a value as JSON types, with intervals as objects."""
    if isinstance(value, Interval):
        return asdict(value)
    return value
