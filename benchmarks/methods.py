"""Training methods side by side: each alone and a few together, trained alike and judged by their samples.

Every row is a training of `--images` images from a seed, by the steps of `ddpm train` without Ray, S3 and MLflow around
them, with the settings of the experiment but for v as what is predicted and for those of its method. Its samples are
drawn unguided by the experiment's sampler, for the same labels from the same noise in all rows, and compared by the
dataset's own evaluator.

A row's result is a file in the work folder, whose name holds a digest of what decides it: a run that was cut off, or
has more seeds or methods, trains only what is missing. Several machines, or several calls, share the rows by --part I/N
and a common work folder.

    python -m benchmarks.methods                                                  # digits; methods.json
    python -m benchmarks.methods --methods base,linear,sigmoid --images 25600 --name schedules
    python -m benchmarks.methods --methods base,eps --experiment mnist --data s3://bucket/datasets/mnist --images 25600
    python -m benchmarks.methods --experiment cifar10 --data s3://bucket/datasets/cifar10 --images 4000000 --part 1/4

A method may also be given as the settings that it changes, joined by +: --methods base,optim.lr=0.002+batch_size=64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from benchmarks.images import SMALLEST, RealImages, denoiser_of, load_images, trained
from benchmarks.results import commit, make_parser, mean, publish, work_folder
from ddpm.conditioning import Conditioning
from ddpm.generate import generate
from pipelines.config import Config, compose, sampling
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.images import to_levels
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage

LEVELS, LEARNED = "objective.timesteps=log_normal", "objective.learned_weight=true"
NEAREST, MUON = "objective.noise_candidates=8", "optim.kind=muon"
SIGMOID = "schedule=sigmoid"
METHODS: dict[str, tuple[str, ...]] = {
    "base": (),
    "eps": ("objective.prediction=eps",),
    "linear": ("schedule=linear",),
    "sigmoid": (SIGMOID,),
    "log_normal": (LEVELS,),
    "log_normal+weight": (LEVELS, "objective.weight=edm"),
    "edm": (LEVELS, "objective.weight=edm", "objective.prediction=x0_skip"),
    "learned_weight": (LEARNED,),
    "nearest_of_8": (NEAREST,),
    "muon": (MUON,),
    "batch_x2": (),
    "batch_x2+sqrt": (),
    "batch_x2+linear": (),
    "log_normal+learned_weight": (LEVELS, LEARNED),
    "learned_weight+muon": (LEARNED, MUON),
    "sigmoid+learned_weight": (SIGMOID, LEARNED),
    "sigmoid+learned_weight+muon": (SIGMOID, LEARNED, MUON),
    "log_normal+learned_weight+muon": (LEVELS, LEARNED, MUON),
    "log_normal+learned_weight+muon+nearest_of_8": (LEVELS, LEARNED, MUON, NEAREST),
}
"""Name -> overrides; those of a larger batch follow from the experiment's."""
FIRST_SAMPLE_SEED = 1


@dataclass(frozen=True)
class Plan:
    """What all rows have in common.

    Attributes:
        base: overrides of every row.
        seeds: of trainings.
        samples: drawn for each row.
        real: images and evaluator.
        work: folder of the results.
        device: where a row is trained and drawn.
    """

    base: tuple[str, ...]
    seeds: Sequence[int]
    samples: int
    real: RealImages
    work: Path
    device: torch.device

    def config(self, method: str, seed: int) -> Config:
        """Return the configuration of a row."""
        overrides = METHODS.get(method, tuple(method.split("+")))
        if method.startswith("batch_x2"):
            size = compose(list(self.base)).batch_size
            overrides = (f"batch_size={2 * size}",)
            if "+" in method:
                overrides += (f"optim.lr_scaling=[{method.partition('+')[2]},{size}]",)
        return compose([*self.base, *overrides, f"seed={seed}"])

    def path(self, method: str, seed: int) -> Path:
        """Return the file of a row's result; another one for other settings, samples or evaluators."""
        config = self.config(method, seed)
        decides = {
            "identity": config.identity(),
            "images": config.images,
            "sampling": sampling(config).key(),
            "samples": self.samples,
            "evaluator": self.real.evaluator.digest,
            "device": self.device.type,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return self.work / "rows" / f"{method}-{seed}-{digest}.json"


def main(arguments: list[str] | None = None) -> None:
    """Train and judge the rows of this part that are missing, and publish the table of all that are there."""
    parser = make_parser("methods", __doc__, quick="one seed, four steps of every training", keeps="results")
    parser.add_argument("--experiment", default="digits", help="settings of every row (default: digits)")
    parser.add_argument("--data", help="address of the dataset; default: digits, ingested into the work folder")
    parser.add_argument("--images", type=int, help="images of every training; default: the experiment's")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every method")
    parser.add_argument("--samples", type=int, default=2_000, help="of every row")
    parser.add_argument("--methods", help="names, separated by commas; default: all")
    parser.add_argument("--name", help="of the result's file; default: methods, and the experiment if it is not digits")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th row from the I-th on")
    parser.add_argument("overrides", nargs="*", help="settings of every row, such as model.channels=[32,64,64]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = make_plan(options)
    few = ("base", "learned_weight+muon", "batch_x2+sqrt")
    default = ",".join(options.size.of(METHODS, METHODS, few))
    names = re.split(r",(?![^\[]*\])", options.methods or default)  # a list in brackets has commas of its own
    for unknown in (name for name in names if name not in METHODS and "=" not in name):
        parser.error(f"unknown method {unknown!r}; allowed: settings such as optim.lr=0.002, {', '.join(METHODS)}")
    part, parts = (int(number) for number in options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part is I/N with 1 <= I <= N, got {options.part}")

    # Seed by seed, so that a run that is cut off has compared all methods on the seeds that it finished.
    rows = [(method, seed) for seed in plan.seeds for method in names]
    for method, seed in rows[part - 1 :: parts]:
        if not plan.path(method, seed).exists():
            write(plan.path(method, seed), measure(plan, method, seed))
    name = options.name or ("methods" if options.experiment == "digits" else f"methods_{options.experiment}")
    publish(summary(plan, rows, options.experiment, options.overrides), name, options)


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what the rows have in common: the images are read, and an evaluator is trained where there is none."""
    size, work = options.size, work_folder(options, options.experiment)
    storage = Storage()
    places = ["storage=file", f"storage.root=file://{work}", f"data.cache_dir={work}/cache"]
    base = [f"+experiment={options.experiment}", "objective.prediction=v", *places, *options.overrides]
    config = compose(base)
    if options.data is None:
        data, source = config.data, config.data.source or "digits"
        uri = f"file://{work}/data"
        dataset = ingest(source, uri, storage, image_size=data.image_size, channels=data.channels).dataset
    else:
        dataset = read_dataset(options.data, storage)
    double = 2 * config.batch_size  # every row sees equally many images
    all_images = max(1, (options.images or config.images) // double) * double
    base += [f"images={size.of(all_images, 2 * double, double)}"]
    less = ["sampler.steps=3", "evaluation.evaluator_passes=1"]
    base += size.of([], less, [*less, *SMALLEST])
    real = load_images(compose(base), dataset, storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(size.of(options.seeds, 1, 1))
    return Plan(tuple(base), seeds, size.of(options.samples, 100, 20), real, work, device)


def measure(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """Return the result of one row: train, draw, compare."""
    config, began = plan.config(method, seed), time.perf_counter()
    say = lambda text: print(f"{method}, seed {seed}: {text}", flush=True)  # noqa: E731
    weights = trained(config, plan.real.train, device=plan.device, say=say)
    seconds = time.perf_counter() - began
    labels = torch.arange(plan.samples) % config.data.num_classes if config.model.class_conditional else None
    found = plan.real.evaluator.encoder(to_levels(draw(plan, config, weights, labels)))
    distance = measured_frechet(plan.real.reference, found.features)
    interval = distance.interval()
    row: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "commit": commit(),
        "images": config.images,
        "train_s": round(seconds, 1),
        "distance": distance.value,
        "interval": [interval.low, interval.high],
        "standard_error": distance.standard_error,
    }
    if labels is not None and found.probabilities is not None:
        right = found.probabilities.argmax(1).cpu() == labels
        row["class_accuracy"] = right.double().mean().item()
    say(f"distance {distance.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
    return row


def draw(plan: Plan, config: Config, weights: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    """Return the samples of a model [N, C, S, S] in [-1, 1], unguided, on the CPU."""
    denoiser = denoiser_of(config, weights, plan.device)
    images = generate(
        denoiser,
        denoiser.schedule,
        sampling(config).with_fields(guidance="classifier_free", scale=1.0),
        cond=None if labels is None else Conditioning(label=labels).to(plan.device),
        shape=config.data.shape,
        seed=FIRST_SAMPLE_SEED,
        image_ids=torch.arange(plan.samples, device=plan.device),
        batch_size=250,
    )
    return images.cpu()


def write(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row's result in one step, so that a file that is there is whole."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(row, indent=1) + "\n")
    new.replace(path)


def summary(plan: Plan, rows: Sequence[tuple[str, int]], experiment: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the table: by method the mean over seeds, its standard error, and that of the difference to `base`.

    The difference is paired by seed: both trainings saw the same images in the same order, and draw the same noise.
    """
    there = {row: json.loads(plan.path(*row).read_text()) for row in rows if plan.path(*row).exists()}
    base = {seed: found["distance"] for (method, seed), found in there.items() if method == "base"}
    methods = {}
    for method in dict.fromkeys(method for method, _ in there):
        found = {seed: result["distance"] for (name, seed), result in there.items() if name == method}
        paired = [distance - base[seed] for seed, distance in found.items() if seed in base]
        methods[method] = {
            "seeds": len(found),
            **mean("distance", list(found.values())),
            **(mean("difference_to_base", paired) if method != "base" and paired else {}),
        }
    config = plan.config("base", 0)
    return {
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}",
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU, one thread",
        "experiment": experiment,
        "images": config.images,
        "overrides": list(overrides),
        "samples": plan.samples,
        "sampling": sampling(config).with_fields(guidance="classifier_free", scale=1.0).to_json(),
        "evaluator": plan.real.evaluator.digest[:12],
        "missing": [f"{method}, seed {seed}" for method, seed in rows if (method, seed) not in there],
        "methods": methods,
        "rows": list(there.values()),
    }


if __name__ == "__main__":
    main()
