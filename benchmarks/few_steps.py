"""Digits in few network evaluations: a model that predicts v, a consistency model tuned from it, and chosen steps.

Both trainings are the steps of `ddpm train` with the shipped experiments, without Ray and MLflow around them:
    teacher   +experiment=digits objective.prediction=v
    student   +experiment=digits_consistency init_from=TEACHER
Trained models are kept in the work folder. Every row draws the same labels from the same noise.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.digits.data import Digits, load_digits
from benchmarks.images import trained
from benchmarks.results import ROOT, commit, publish
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.prediction import NetworkDenoiser
from ddpm.samplers import initial_noise
from ddpm.step_search import StepSearch
from pipelines.config import Config, compose
from pipelines.evaluation.images import to_levels
from pipelines.search.judge import measured_frechet
from pipelines.shards.read import Batch
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up_job
from pipelines.training.loop.state import make_network

SHAPE = (1, 8, 8)
SEED, SEARCH_SEED = 1, 1_000
TEACHER = ("+experiment=digits", "objective.prediction=v")
STUDENT = ("+experiment=digits_consistency", "init_from=teacher")


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, draw every row, and publish the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".ddpm" / "few_steps", help="keeps trained models")
    parser.add_argument("--teacher-images", type=int, default=102_400)
    parser.add_argument("--student-images", type=int, default=51_200)
    parser.add_argument("--samples", type=int, default=2_000, help="of every row")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the training: a test of all parts")
    parser.add_argument("--json", action="store_true", help="print the result as the last line, as it does anyway")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale = 0.01 if options.quick else 1.0
    samples = 200 if options.quick else options.samples
    work = options.work / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    digits = load_digits(work)
    configs = {
        "teacher": compose([*TEACHER, f"images={_batches(options.teacher_images * scale)}"]),
        "student": compose([*STUDENT, f"images={_batches(options.student_images * scale)}"]),
    }
    teacher, teacher_s = kept(work, "teacher", configs["teacher"], digits, None)
    student, student_s = kept(work, "student", configs["student"], digits, teacher)
    rows = measure(configs["teacher"], teacher, student, digits, samples)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread, torch {torch.__version__.split('+')[0]}"
    result = {
        "commit": commit(),
        "machine": machine,
        "samples": samples,
        "teacher": {"images": configs["teacher"].images, "seconds": teacher_s},
        "student": {"images": configs["student"].images, "seconds": student_s},
        "evaluator": digits.evaluator.digest[:12],
        "rows": rows,
    }
    publish(result, "few_steps", options.quick)


def _batches(images: float) -> int:
    return max(1, round(images / 128)) * 128


def kept(
    work: Path, name: str, config: Config, digits: Digits, start: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], float | None]:
    """Return the averaged weights of a training, and its seconds where it is run now.

    Args:
        start: weights to start from; None for new ones.
    """
    path = work / f"{name}-{config.images}.safetensors"
    if path.exists():
        return load_file(path), None
    began = time.perf_counter()
    images = Batch(torch.arange(len(digits.train)), digits.train, digits.train_labels)
    weights = trained(config, images, start, say=lambda text: print(f"{name}: {text}", flush=True))
    save_file(weights, path)
    return weights, time.perf_counter() - began


def measure(
    config: Config, teacher: dict[str, Tensor], student: dict[str, Tensor], digits: Digits, samples: int
) -> list[dict[str, Any]]:
    """Return the rows of the table: the teacher's samplers, with and without chosen steps, and the student's."""
    models = {}
    for name, weights in (("teacher", teacher), ("student", student)):
        network = make_network(config)
        network.load_state_dict(weights)
        schedule = RunContext.of(made_up_job(config), rank=0, world_size=1, device=torch.device("cpu")).schedule
        models[name] = NetworkDenoiser(network.eval().requires_grad_(False), schedule, "v")
    labels = torch.arange(samples) % 10
    rows = []

    def add(model: str, how: str, sampling: Sampling) -> None:
        images = generate(
            models[model],
            models[model].schedule,
            sampling,
            cond=Conditioning(label=labels),
            shape=SHAPE,
            seed=SEED,
            batch_size=250,
        )
        found = digits.evaluator.encoder(to_levels(images))
        assert found.probabilities is not None
        distance = measured_frechet(digits.reference, found.features)
        right = (found.probabilities.argmax(1) == labels).double().mean().item()
        row = {"model": model, "sampler": how, "evaluations": sampling.sampler.steps, "distance": distance.value}
        rows.append(row | {"standard_error": distance.standard_error, "class_accuracy": right})
        print(f"{model} {how} {sampling.sampler.steps}: {distance.value:.2f}, accuracy {right:.3f}", flush=True)

    for steps in (1, 2, 4):
        add("student", "consistency", Sampling.of(kind="consistency", steps=steps))
    for steps in (1, 2, 4, 50):
        add("teacher", "ddim", Sampling.of(kind="ddim", steps=steps))
    chosen = _chosen(models["teacher"])
    for kind in ("ddim", "dpm_solver"):
        for steps in (4, 6, 8):
            for spacing in ("trailing", "karras"):
                if (kind, steps, spacing) != ("ddim", 4, "trailing"):  # there already
                    add("teacher", f"{kind} {spacing}", Sampling.of(kind=kind, steps=steps, spacing=spacing))
            levels = chosen[kind, steps]
            add("teacher", f"{kind} chosen", Sampling.of(kind=kind, steps=steps, timesteps=levels))
    return rows


def _chosen(denoiser: NetworkDenoiser) -> dict[tuple[str, int], list[float]]:
    """Return the chosen levels of a model by sampler and steps."""
    search, ids = StepSearch(), torch.arange(100)
    wrapped = Sampling().wrap(denoiser, denoiser.schedule)
    noise, cond = initial_noise(SEARCH_SEED, ids, SHAPE), Conditioning(label=ids % 10)
    found = search.trajectories(wrapped, denoiser.schedule, noise, cond)
    return {
        (kind, steps): search.find(found, denoiser.schedule, kind, steps)[0]
        for kind in ("ddim", "dpm_solver")
        for steps in (4, 6, 8)
    }


if __name__ == "__main__":
    main()
