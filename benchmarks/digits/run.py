"""Train five small models, measure every method of `ddpm` on them, write `docs/digits.md`.

Models are trained, and tables made, in processes of their own, or one after the other in this one (--processes 1).
"""

from __future__ import annotations

import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.digits import figures, page, tables
from benchmarks.digits.data import load_digits
from benchmarks.digits.tables import Row
from benchmarks.digits.training import Zoo
from benchmarks.results import Size, commit, make_parser, out_folder, publish, work_folder

COMMAND = "python -m benchmarks.digits"


def main(arguments: list[str] | None = None) -> None:
    """Measure everything and write the page."""
    parser = make_parser("digits", __doc__, quick="a hundredth of the training", keeps="trained models")
    parser.add_argument("--processes", type=int, help="models trained and tables made at a time; default: 2")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    size, work = options.size, work_folder(options)
    load_digits(work, size)  # once, before several processes read it
    found = measure(work, size, options.processes or size.of(2, 2, 1))
    found["about"] = about(work, size) | {"minutes": (time.perf_counter() - began) / 60}
    draw(found, out_folder(options, "docs/images"))
    command = COMMAND if size is Size.FULL else f"{COMMAND} --{size.value}"
    (out_folder(options, "docs") / "digits.md").write_text(page.write(found, command))
    publish(as_json(found, size), "digits", options)


def measure(work: Path, size: Size, processes: int) -> dict[str, Any]:
    """Train missing models and return all tables; tasks use one thread each and run in parallel."""
    with ThreadPoolExecutor(1) if processes == 1 else ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        trained = [pool.submit(train, work, size, names) for names in (("classes", "inpainting"), TRAINED_BESIDE)]
        for future in trained:
            future.result()
        # The longest first, so that no long task runs alone at the end.
        jobs = {name: pool.submit(make, work, size, name) for name in TABLES}
        return {name: job.result() for name, job in jobs.items()}


TRAINED_BESIDE = ("text", "classifier", "reader")
TABLES = ("likelihood", "samplers", "guidance", "inpainting", "text", "prompted")


@cache
def zoo(work: Path, size: Size) -> Zoo:
    """Return the models of this run, of which a process has one."""
    torch.set_num_threads(1)
    digits, some = load_digits(work, size), slice(size.of(None, 100, 30))
    digits = replace(digits, test=digits.test[some], test_labels=digits.test_labels[some])
    return Zoo(digits, work, size.of(1.0, 0.01, 0.0), say, *size.of((50, 200), (10, 50), (2, 40)))


def train(work: Path, size: Size, names: tuple[str, ...]) -> None:
    """Train the named models one after the other."""
    models = zoo(work, size)
    for name in names:
        getattr(models, name)()


def make(work: Path, size: Size, name: str) -> Any:
    """Return the rows of one table."""
    began = time.perf_counter()
    models = zoo(work, size)
    if name == "likelihood":
        result: Any = tables.likelihood(models, steps=size.of(None, 20, 2), tolerance=size.of(1e-5, 1e-3, 1.0))
    elif name == "samplers":
        result = list(tables.samplers(models, *size.of(((5, 10, 20, 50), 1000), ((5,), 20), ((1,), 2))))
    elif name == "prompted":
        result = tables.prompted(models)
    else:
        result = list({"guidance": tables.guidance, "inpainting": tables.inpainting, "text": tables.text}[name](models))
    say(f"table {name}: {time.perf_counter() - began:.0f} s")
    return result


def about(work: Path, size: Size) -> dict[str, Any]:
    """Return the conditions of the run."""
    models = zoo(work, size)
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


def as_json(found: dict[str, Any], size: Size) -> dict[str, Any]:
    """Return the numbers of the page as JSON values."""
    rows: dict[str, list[Row]] = {name: found[name] for name in ("guidance", "samplers", "inpainting", "text")}
    likelihood = found["likelihood"]
    return {
        "benchmark": "digits",
        "quick": size is not Size.FULL,
        **found["about"],
        **{
            name: [{"name": r.name, **{k: tables.plain(v) for k, v in r.scores.items()}} for r in of]
            for name, of in rows.items()
        },
        "likelihood": {name: tables.plain(value) for name, value in likelihood.bits.items()},
        "ode": {"t_min": likelihood.t_min, "truncation_cost": likelihood.truncation_cost},
    }


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)
