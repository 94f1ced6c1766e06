"""Train five small models, measure every method of `ddpm` on them, write `docs/digits.md`.

With --quick the models are trained on a hundredth of the images and nothing is written to docs/: a test of all parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.digits import figures, page, tables
from benchmarks.digits.data import load_captions, load_digits
from benchmarks.digits.tables import Row
from benchmarks.digits.training import Zoo
from benchmarks.results import ROOT, commit

COMMAND = "python -m benchmarks.digits"


def main(arguments: list[str] | None = None) -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".ddpm" / "digits", help="keeps trained models")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the training, nothing written to docs/")
    parser.add_argument("--processes", type=int, default=2, help="models trained and tables made at a time")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    work = options.work / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    load_digits(work)  # once, before several processes read it
    found = measure(work, options.quick, options.processes)
    found["about"] = about(work, options.quick) | {"minutes": (time.perf_counter() - began) / 60}
    result = as_json(found, options.quick)
    out = work if options.quick else ROOT / "docs"
    (out / "images").mkdir(exist_ok=True)
    draw(found, out / "images")
    command = f"{COMMAND} --quick" if options.quick else COMMAND
    (out / "digits.md").write_text(page.write(found, command))
    folder = work if options.quick else ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "digits.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"page": str(out / "digits.md"), "minutes": found["about"]["minutes"]}))


def measure(work: Path, quick: bool, processes: int) -> dict[str, Any]:
    """Train missing models and return all tables; tasks use one thread each and run in parallel."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        trained = [pool.submit(train, work, quick, names) for names in (("classes", "inpainting"), TRAINED_BESIDE)]
        for future in trained:
            future.result()
        # The longest first, so that no long task runs alone at the end.
        jobs = {name: pool.submit(make, work, quick, name) for name in TABLES}
        return {name: job.result() for name, job in jobs.items()}


TRAINED_BESIDE = ("text", "classifier", "reader")
TABLES = ("likelihood", "samplers", "guidance", "inpainting", "text", "prompted")


def zoo(work: Path, quick: bool) -> Zoo:
    """Return the models of this run."""
    torch.set_num_threads(1)
    return Zoo(load_digits(work), load_captions(), work, 0.01 if quick else 1.0, say)


def train(work: Path, quick: bool, names: tuple[str, ...]) -> None:
    """Train the named models one after the other."""
    models = zoo(work, quick)
    for name in names:
        getattr(models, name)()


def make(work: Path, quick: bool, name: str) -> Any:
    """Return the rows of one table."""
    began = time.perf_counter()
    models = zoo(work, quick)
    if name == "likelihood":
        result: Any = tables.likelihood(models, steps=20 if quick else None)
    elif name == "samplers":
        result = list(tables.samplers(models, (5, 10) if quick else (5, 10, 20, 50), 20 if quick else 1000))
    elif name == "prompted":
        result = tables.prompted(models)
    else:
        result = list({"guidance": tables.guidance, "inpainting": tables.inpainting, "text": tables.text}[name](models))
    say(f"table {name}: {time.perf_counter() - began:.0f} s")
    return result


def about(work: Path, quick: bool) -> dict[str, Any]:
    """Return the conditions of the run."""
    models = zoo(work, quick)
    digits = models.digits
    return {
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}",
        "train": len(digits.train),
        "test": len(digits.test),
        "parameters": sum(p.numel() for p in models.classes().network.parameters()),
        "evaluator": digits.evaluator.digest[:12],
        "encoder": models.captions.encoder,
        "images": models.images,
        "first": [int((digits.test_labels == digit).nonzero()[0]) for digit in range(10)],
    }


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write all figures to a folder."""
    first = found["about"]["first"]
    guided = [row for row in found["guidance"] if row.name != "real test images"]
    figures.strips(folder / "digits-guidance.png", [(row.name, row.images[first]) for row in guided])
    rows = [(f"{row.name}, {row.scores['evaluations']} evaluations", row.images[first]) for row in found["samplers"]]
    figures.strips(folder / "digits-samplers.png", rows)
    truth = next(row for row in found["guidance"] if row.name == "real test images")
    filled = [(row.name, row.images[first]) for row in found["inpainting"]]
    figures.strips(folder / "digits-inpainting.png", [("the image", truth.images[first]), *filled])
    figures.strips(folder / "digits-text.png", found["prompted"])
    figures.bound_terms(folder / "digits-bound.png", found["likelihood"].terms)
    figures.weights(folder / "digits-weights.png")
    found["distances"] = figures.reverse_steps(folder / "digits-reverse-step.png")


def as_json(found: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Return the numbers of the page as JSON values."""
    rows: dict[str, list[Row]] = {name: found[name] for name in ("guidance", "samplers", "inpainting", "text")}
    likelihood = found["likelihood"]
    return {
        "benchmark": "digits",
        "quick": quick,
        **found["about"],
        **{
            name: [{"name": r.name, **{k: tables.plain(v) for k, v in r.scores.items()}} for r in of]
            for name, of in rows.items()
        },
        "likelihood": {name: tables.plain(value) for name, value in likelihood.bits.items()},
        "ode": {"t_min": likelihood.t_min, "truncation_cost": likelihood.truncation_cost},
        "bound_terms": likelihood.terms,
    }


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)
