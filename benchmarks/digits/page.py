"""Rendering of the measurements as the page `docs/digits.md`."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.digits.tables import Row


def cell(value: Any) -> str:
    """Return the text of a table cell; an interval, or what it is in JSON, is written as value [low, high]."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(first: str, rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of rows, as digits.json has them, which may lack some columns."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "name"]
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [cell(row[c]) if c in row else "" for c in columns]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def by_budget(rows: list[dict[str, Any]], score: str) -> str:
    """Return a Markdown table of one score, with a row per sampler and a column per budget."""
    budgets = sorted({row["budget"] for row in rows})
    found = {(row["name"], row["budget"]): cell(row[score]) for row in rows}
    lines = [f"| {score} | {' | '.join(map(str, budgets))} |", "|---" * (len(budgets) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = (found.get((name, budget), "") for budget in budgets)
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _as_stored(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"name": row.name, **row.scores} for row in rows]


def write(found: dict[str, Any], command: str) -> str:
    """Return the text of the page.

    Args:
        found: the measurements: rows by table, likelihoods, distances, and the conditions of the run.
        command: command that makes the page.
    """
    about, likelihood = found["about"], found["likelihood"]
    bits = "\n".join(f"| {name} | {cell(value)} | {likelihood.nfe[name]} |" for name, value in likelihood.bits.items())
    distances = ", ".join(f"{d:.3f} at beta = {beta:g}" for beta, d in found["distances"].items())
    rows = {name: _as_stored(found[name]) for name in ("guidance", "samplers", "inpainting", "text")}
    return f"""# What the methods do, on digits

Made by `{command}` ([digits.json](../benchmarks/results/digits.json)) from commit `{about["commit"]}` on
{about["machine"]}, in {about["minutes"]:.0f} minutes. The data is scikit-learn's 8x8
handwritten digits ({about["train"]:,} for training, {about["test"]} for testing), the network the
UNet of the experiment `digits` ({about["parameters"]:,} parameters) on a cosine schedule of 1,000
steps. It predicts eps and was trained on {about["images"]["classes"]:,} images, longer than the experiment, with the
hybrid loss, which also learns the reverse variance. Autoguidance takes its weights after an eighth of that training for
the weak model.

All numbers are of {about["test"]} images with the labels of the test split. Class accuracy and Frechet distance are by
an evaluator, a classifier that is trained on half of the training images and is not the one that guides (digest
`{about["evaluator"]}`). Frechet distances are to the other half; smaller is better. Square brackets are 95 % bootstrap
intervals. Those of Frechet distances are for the value at infinitely many samples, and so reach far below the
value of these few, whose bias makes it larger. Precision and recall (Kynkäänniemi et al. 2019) take the test split for
the real images. This is one run with one seed: Frechet distances whose intervals overlap cannot be told
apart. Class accuracy, precision and recall have no intervals; one image is 0.003. Precision and recall of the real test
images are 1 because these are compared with themselves.

## Guidance

DDIM, 50 steps; the number after a method is its guidance scale. At scale 0 the model gets no label, so its accuracy is
that of guessing. The rows `classifier` guide the model without its label by a classifier of noisy images.

<!-- table: guidance -->

{table("model", rows["guidance"])}

![One row per kind of guidance, one column per digit](images/digits-guidance.png)

## Samplers

The model is given the label and not guided; columns are numbers of network evaluations. Heun and predictor-corrector
need 2N - 1 evaluations for N steps, so they meet these numbers to within one; ancestral sampling and
predictor-corrector use the learned variance.

<!-- table: samplers, Frechet distance -->

{by_budget(rows["samplers"], "Frechet distance")}

<!-- table: samplers, class accuracy -->

{by_budget(rows["samplers"], "class accuracy")}

![One row per sampler and budget](images/digits-samplers.png)

## Inpainting

Random masks (boxes, strokes, halves) over the test split; the label is given to all. The error in the hidden region is
the root mean square difference from the true image, that across the seam the mean absolute difference of the step
from a known pixel to its hidden neighbour. Known pixels are exact in all rows.

<!-- table: inpainting -->

{table("method", rows["inpainting"])}

![The image, what is known of it, and what the methods make of it](images/digits-inpainting.png)

## Text

A model without classes, conditioned on captions by `{about["encoder"]}` through cross-attention and the
pooled vector, trained on five templates ("a handwritten three", "the digit three", ...) and asked with these
and with two that it has never seen. Prompt accuracy: the evaluator sees the digit that the prompt names.

<!-- table: text -->

{table("prompts", rows["text"])}

![Prompts and samples at guidance 2](images/digits-text.png)

## Likelihood

Bits per dimension of the test split counted as 8-bit images, of which digits use 17 grey levels. The model is the one
that samples, its x_0 clipped to the range of images. The bound's decoder is a discretized Gaussian; the ODE is
integrated from t = {likelihood.t_min:.3f}, where sigma = 0.001, to tolerance 1e-5 on uniformly dequantized images, with
the trace by Hutchinson. Starting there and not at 0 costs an exact model at most {likelihood.truncation_cost:.2f} bits;
that is so for a pixel with the same value in all images.
Bound and ODE measure different models, so either may be smaller.

| method | bits per dimension | network evaluations |
|---|---|---|
{bits}

The prior's share of the bound is {likelihood.prior:.2g}. The bound by timestep:

![Terms of the bound by timestep](images/digits-bound.png)

## Two pictures about the objective

How much the error at each timestep counts in L_simple (the mean squared error of the noise), relative to the
variational bound: it counts least near the data, so the network learns larger structure first of all (DDPM, section
3.4); on the cosine schedule also at its capped end, where hardly any signal is left.

![Weight in L_simple over weight in L_vlb by timestep](images/digits-weights.png)

Why a reverse step may be Gaussian: for data with two modes (at -0.8 and 0.8, each with a spread of 0.2)
q(x_{{t-1}} | x_t), here at x_t = 0.1, approaches a Gaussian as beta falls. Its total variation distance from the
Gaussian of the same mean and variance is
{distances}.

![q(x_(t-1) | x_t) beside a Gaussian for falling beta](images/digits-reverse-step.png)
"""
