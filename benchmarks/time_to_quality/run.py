"""How good a model is after a time: `ddpm flow FOLDER budget=…` against diffusers' training loop, tuned.

    python -m benchmarks.time_to_quality [--quick] [--json] [--budget SECONDS] [--seeds N] [--data NAME,…]

Both sides get the same pictures of npm packages, the same cores, one right after the other, and the same budgets: a
third of `--budget`, and all of it. Ours is one command with nothing set, through Ray, S3 and MLflow of its own, and its
budget ends with a registered version; the peer's ends with the last step. The peer has the network, image size, batch,
mirroring and guidance scale that our plan chose for the budget, and besides TRIALS settings are tried with the smaller
budget, of which the best by 300 samples goes on, with the better of two samplers; of ours none is tried. A classifier
that neither side knows judges samples of both, as many of a class as there are in the data.

Every part that is done is kept in the work folder, so that a benchmark that was interrupted goes on where it was, on
another machine as well: each row says which one measured it. Data sets are compared each within itself: the published
file keeps those that are not named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.results import ROOT, Size, commit, make_parser, out_folder, publish, python_m
from benchmarks.time_to_quality.judge import Judge
from benchmarks.time_to_quality.ours import Side, draw
from benchmarks.time_to_quality.peer import Settings
from benchmarks.time_to_quality.pictures import DATA_SETS, Pictures, as_frequent
from benchmarks.train_step import machine
from ddpm.model import load_model, save_model

TRIALS = tuple(itertools.product(("eps", "v"), (3e-4, 1e-3)))
"""Prediction and learning rate of the peer's trials."""
SEED, TRIAL_SAMPLES = 0, 300
"""Of trials."""
PUBLISHED = ("budget_s", "seed", "seconds", "images", "prediction", "lr", "batch", "sampler", "distance",
             "standard_error", "accuracy", "precision", "recall", "machine", "commit")  # fmt: skip
"""What the published file has of each training."""
LESS = ("budget=4m", "data.image_size=8", "model.channels=[32]", "model.attention=[true]", "model.layers_per_block=1",
        "batch_size=64", "sampler.steps=4", "evaluation.n=48", "evaluation.seeds=1",
        "evaluation.evaluator_passes=1")  # fmt: skip
"""What a flow is given where less is measured. A plan refuses a budget of less than minutes, but not a training of
seconds in one that it does not need."""
QUICK, SMOKE = (*LESS, "training_s=8"), (*LESS, "training_s=1")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and publish the result and its picture."""
    options = parse(arguments, "time_to_quality", __doc__, "mnist,emoji,cifar10")
    budgets = options.size.of((options.budget / 3, options.budget), (options.budget,) * 2, (options.budget,) * 2)
    trials = options.size.of(TRIALS, TRIALS[-1:], TRIALS[-1:])
    work = work_of(options)
    path = out_folder(options, "benchmarks/results") / "time_to_quality.json"
    data = json.loads(path.read_text())["data"] if path.exists() else {}
    for name in options.data.split(","):
        measured = data_set(options, name, work).measure(budgets, options.seeds, trials)
        data[name] = conditions(options.samples) | {"budgets_s": budgets} | measured
    result = {"benchmark": "time_to_quality", "quick": options.size is not Size.FULL, "data": data}
    plot(data, out_folder(options, "docs/images") / "time-to-quality.png")
    publish(result, "time_to_quality", options)


def parse(arguments: list[str] | None, program: str, doc: str | None, data: str) -> argparse.Namespace:
    """Return the options of this benchmark, or of the one beside it; `data` is the default of theirs."""
    parser = make_parser(program, doc, "one data set, seed and trial, a tiny network, seconds of training", "all parts")
    parser.add_argument("--home", type=Path, help="folder of a stack that runs; default: one of each training's own")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of a training, the longer of two")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default=data, help="names of data sets")
    parser.add_argument("--samples", type=int, default=1_000, help="of every model")
    options = parser.parse_args(arguments)
    if options.size is not Size.FULL:
        options.seeds, options.data = 1, "mnist"
        options.samples, options.budget = options.size.of((0, 0.0), (100, 12.0), (20, 1.0))
    return options


def work_of(options: argparse.Namespace) -> Path:
    """Return the folder which keeps the parts of the trainings with a budget."""
    folder: Path = options.work.resolve() / (
        f"{options.budget:.0f}s" if options.size is Size.FULL else options.size.value
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_set(options: argparse.Namespace, name: str, work: Path) -> DataSet:
    """Return the measurements on the data set of this name, whose parts are kept in the work folder."""
    pictures, flow = DATA_SETS[name](options.work.resolve()), options.size.of((), QUICK, SMOKE)
    return DataSet(pictures, work, options.samples, flow, options.size.of(30, 1, 1), options.home)


def conditions(samples: int) -> dict[str, Any]:
    """Return what a data set was measured with."""
    where = {"commit": commit(), "machine": machine(torch.device("cpu")), "torch": torch.__version__}
    return where | {"samples": samples}


def plot(data: dict[str, Any], path: Path) -> None:
    """Plot distance against seconds for both sides: a point for each training, a line through medians."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    figure, panels = plt.subplots(1, len(data), figsize=(1 + 4.5 * len(data), 3.4), layout="constrained", squeeze=False)
    for axes, (name, found) in zip(panels[0], data.items(), strict=True):
        for side, label, colour in (("ours", "ddpm flow", "tab:blue"), ("peer", "diffusers, tuned", "tab:orange")):
            rows = found[side]
            axes.plot([row["seconds"] for row in rows], [row["distance"] for row in rows], "o", ms=4, color=colour)
            medians = [[_median(rows, budget, key) for budget in found["budgets_s"]] for key in ("seconds", "distance")]
            axes.plot(*medians, "-", color=colour, label=label)
        axes.axhline(found["judge"]["floor"], color="grey", lw=0.8, ls="--", label="held-out pictures")
        axes.set(title=name, xlabel="seconds", yscale="log", xlim=(0, None))
    panels[0][0].set_ylabel("Frechet distance")
    panels[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def published(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the published file has of a training; the work folder keeps all of it."""
    return {name: row[name] for name in PUBLISHED if name in row}


def _median(rows: list[dict[str, Any]], budget_s: float, key: str = "distance") -> float:
    """Return the median of a figure of a budget's trainings."""
    return statistics.median(float(row[key]) for row in rows if row["budget_s"] == budget_s)


class DataSet:
    """The measurements on one data set.

    Args:
        work: where every part is kept.
        samples: of every model.
        flow: what a flow of ours is given in place of a budget; nothing: the budget.
        passes: of the judge's training over the given pictures.
        home: folder of a stack that runs, on which ours trains; None for a new one for each training.
    """

    def __init__(
        self, pictures: Pictures, work: Path, samples: int, flow: Sequence[str], passes: int, home: Path | None
    ) -> None:
        self.pictures, self.work, self.samples = pictures, work / pictures.name, samples
        self.flow, self.home = flow, home
        self.work.mkdir(exist_ok=True)
        self.judge = Judge.of(pictures, work.parent, passes)

    def measure(self, budgets: tuple[float, float], seeds: int, trials: Sequence[tuple[str, float]]) -> dict[str, Any]:
        """Return the rows of both sides, and what they come to.

        Args:
            budgets: the smaller one, in which the peer is tuned, and the larger one, in seconds.
            trials: prediction and learning rate of each trial of the peer.
        """
        less, more = budgets
        planned = self._like_ours(self.ours(less, SEED))
        tuned = [self.peer(planned | {"prediction": p, "lr": lr}, less, SEED, trial=True) for p, lr in trials]
        best = min(tuned, key=lambda row: float(row["distance"]))
        tried = {"prediction": best["prediction"], "lr": best["lr"], "samplers": (best["sampler"],)}
        ours, peer = [], []
        for seed, budget in itertools.product(range(seeds), budgets):
            # One side right after the other: a machine that others use too is not always as fast.
            ours.append(self.ours(budget, seed))
            peer.append(self.peer(self._like_ours(ours[-1]) | tried, budget, seed))
        return {
            "pictures": {name: len(list(folder.glob("*/*.png"))) for name, folder in self._folders().items()},
            "judge": {"floor": self.judge.floor, "accuracy": self.judge.accuracy},
            "peer_over_ours": {f"{budget:.0f}": _median(peer, budget) / _median(ours, budget) for budget in budgets},
            "peer_over_ours_at_a_third": _median(peer, more) / _median(ours, less),
            "ours": [published(row) for row in ours],
            "peer": [published(row) for row in peer],
            "peer_trials": [published(row) for row in tuned],
        }

    def _folders(self) -> dict[str, Path]:
        return {"given": self.pictures.given, "held_out": self.pictures.held_out}

    def ours(self, budget_s: float, seed: int) -> dict[str, Any]:
        """Return the row of a training of ours."""

        def make(folder: Path) -> dict[str, Any]:
            with Side.started(folder / "home") if self.home is None else nullcontext(Side(self.home)) as side:
                length = self.flow or (f"budget={budget_s:.0f}s",)
                name = f"{self.pictures.name}-{budget_s:.0f}-{seed}"
                trained = side.flow(self.pictures, name, seed, length, folder / "flow.log")
                model = side.model(trained["model"])
                save_model(self._trained(budget_s, seed), model.spec, model.network.state_dict())
                trained |= side.trained(trained["run_id"])
            labels = self._labels()
            samples = draw(model, self.pictures.classes, labels, seed)
            network = asdict(model.spec.network)
            row = trained | {"network": network, "shape": model.spec.shape}
            return row | {"sampling": model.spec.sampling.to_json()} | self._scores(samples, labels)

        return {"budget_s": budget_s, "seed": seed} | self._kept(f"ours-{budget_s:.0f}-{seed}", make)

    def at_scale(self, scale: float, budget_s: float, seed: int) -> dict[str, Any]:
        """Return the row of a training of ours whose samples are drawn with this guidance scale."""
        own = self.ours(budget_s, seed)

        def make(folder: Path) -> dict[str, Any]:
            labels = self._labels()
            samples = draw(load_model(self._trained(budget_s, seed)), self.pictures.classes, labels, seed, scale)
            return self._scores(samples, labels)

        if own["sampling"]["scale"] == scale:
            found = own
        else:
            found = self._kept(f"scale-{scale:g}-{budget_s:.0f}-{seed}", make)
        scores = {name: found[name] for name in ("distance", "standard_error", "accuracy", "precision", "recall")}
        return {"seed": seed, "scale": scale} | scores | {"machine": own["machine"]}

    def _trained(self, budget_s: float, seed: int) -> Path:
        """Return the folder that keeps the model of a training of ours."""
        return self.work / f"model-{budget_s:.0f}-{seed}"

    def peer(self, settings: dict[str, Any], budget_s: float, seed: int, *, trial: bool = False) -> dict[str, Any]:
        """Return the row of a training of the peer: the better of its samplers."""
        samples = min(TRIAL_SAMPLES, self.samples) if trial else self.samples
        chosen = Settings(**settings, budget_s=budget_s, seed=seed, samples=samples)

        def make(folder: Path) -> dict[str, Any]:
            plain = asdict(self.pictures) | {n: str(path) for n, path in self._folders().items()}
            (folder / "pictures.json").write_text(json.dumps(plain))
            (folder / "settings.json").write_text(json.dumps(asdict(chosen)))
            command = [*python_m("benchmarks.time_to_quality.peer"), str(folder / "settings.json"), str(folder)]
            threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
            subprocess.run(command, env=os.environ | threads, cwd=ROOT, check=True)
            drawn = torch.load(folder / "samples.pt")
            (folder / "samples.pt").unlink()
            scored = {name: self._scores(drawn["samples"][name], drawn["labels"]) for name in chosen.samplers}
            sampler = min(scored, key=lambda name: scored[name]["distance"])
            distances = {f"distance_{name}": row["distance"] for name, row in scored.items()}
            return json.loads((folder / "facts.json").read_text()) | {"sampler": sampler} | distances | scored[sampler]

        name = f"{'trial' if trial else 'peer'}-{chosen.prediction}-{chosen.lr}-{budget_s:.0f}-{seed}"
        return {"budget_s": budget_s, "seed": seed} | self._kept(name, make)

    def _like_ours(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what the peer is given of a plan of ours."""
        fields = ("channels", "layers_per_block", "attention", "head_dim")
        return {
            "network": {name: row["network"][name] for name in fields},
            "size": row["shape"][1],
            "channels": row["shape"][0],
            "classes": len(self.pictures.classes),
            "batch": int(row["settings"]["batch_size"]),
            "flip": row["settings"]["data.flip"] == "True",
            "guidance": row["sampling"]["scale"],
        }

    def _labels(self) -> Tensor:
        """Return the classes of samples, as frequent as in the data."""
        _, labels = self.pictures.read(self.pictures.given)
        return as_frequent(labels, self.samples)

    def _scores(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the judge's scores of samples at any size, rounded to the levels of pictures."""
        size = self.pictures.size
        if samples.shape[-1] != size:
            samples = F.interpolate(samples, size=(size, size), mode="bicubic", antialias=True)
        return self.judge.scores(((samples.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1, labels)

    def _kept(self, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of this name, made where it is not there yet."""
        path = self.work / f"{name}.json"
        if not path.exists():
            folder = self.work / name
            folder.mkdir(exist_ok=True)
            where = {"machine": machine(torch.device("cpu")), "commit": commit()}
            path.write_text(json.dumps(make(folder) | where, indent=1))
        row: dict[str, Any] = json.loads(path.read_text())
        print(
            f"{self.pictures.name} {name}: distance {row['distance']:.2f}, accuracy {row['accuracy']:.3f}", flush=True
        )
        return row
