"""How often the registry's gate errs, and which difference it tells, on features of digits that a model draws.

    python -m benchmarks.gate [--work FOLDER] [--quick] [--json]

Features of many samples are recorded once, on the same labels and noise: of a trained model without and with guidance,
and of the same model after an eighth of its training. From them the gate is asked again and again, with the function
that `ddpm promote` calls:

- **Type I.** Two versions that are equally good and not the same: each pair of samples of one label and noise is
  exchanged at random between the two. Paired as the gate draws them, and unpaired (another noise for each).
- **Attempts.** Series of 20 equally good candidates against one champion.
- **Power.** The champion is the model after an eighth of its training; a share of the candidate's samples is of the
  trained one, so that the true difference is known from all recorded samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.digits.data import load_digits
from benchmarks.digits.training import Zoo
from benchmarks.images import Labelled
from benchmarks.results import Size, commit, make_parser, out_folder, publish, work_folder
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.quality import FeatureMoments, FrechetInfluence, Measured, frechet_distance
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.measure import Measures
from pipelines.evaluation.samples import balanced_labels
from pipelines.registry.decision import decide

SCALES = {"unguided": 1.0, "guided": 1.5, "early": 1.0}
SAMPLES = {"type_i": 359, "attempts": 359}
POWER_N = (359, 2_000, 5_000)
SHARES = (0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
POWER = 0.9


def main(arguments: list[str] | None = None) -> None:
    """Record features, ask the gate, and publish how often it said what."""
    parser = make_parser("gate", __doc__, quick="fewer samples and comparisons", keeps="the model and its features")
    options = parser.parse_args(arguments)
    result = run(work_folder(options), options.size)
    plot(result, out_folder(options, "docs/images") / "gate-power.png")
    publish(result, "gate", options)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot how often a better version passes, by how much better it is."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for n in dict.fromkeys(row["n"] for row in result["power"]):
        rows = [row for row in result["power"] if row["n"] == n]
        axes.plot([row["difference"] for row in rows], [row["power"] for row in rows], "o-", ms=3, label=f"n = {n:,}")
    axes.axhline(POWER, color="grey", lw=0.8)
    axes.axvline(result["floor"] / 5, color="grey", lw=0.8, ls="--", label="a fifth of the floor")
    axes.set(xlabel="true difference in Frechet distance", ylabel="share of comparisons that pass", xscale="log")
    axes.set_xticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(work: Path, size: Size) -> dict[str, Any]:
    """Return how often the gate passed what it should not, and the differences that it tells."""
    digits = load_digits(work, size)
    pool = Pool.of(digits, work, *size.of((12_000, 0.5), (2_000, 0.1), (40, 0.0)))
    times, series = size.of((1_000, 1_000), (100, 20), (2, 1))
    counts, asked = size.of((POWER_N, 200), (POWER_N, 50), (POWER_N[:1], 1))
    floor = frechet_distance(pool.reference, FeatureMoments.of(_features(digits, digits.test)))
    return {
        "benchmark": "gate",
        "commit": commit(),
        "quick": size is not Size.FULL,
        "samples": len(pool.guided),
        "floor": floor,
        "type_i": {
            "comparisons": times,
            "n": SAMPLES["type_i"],
            "paired": pool.wrong(times, SAMPLES["type_i"], paired=True),
            "unpaired": pool.wrong(times, SAMPLES["type_i"], paired=False),
        },
        "attempts": {"series": series, "length": 20, "with_a_pass": pool.series(series, 20, SAMPLES["attempts"])},
        "power": [row for n in counts for row in pool.power(n, asked)],
    }


@dataclass(frozen=True)
class Pool:
    """Features of samples from the same labels and noise, [N, D] each.

    Attributes:
        unguided, guided: of a trained model.
        early: of the same model after an eighth of its training.
        reference: moments of the real images' features.
    """

    unguided: Tensor
    guided: Tensor
    early: Tensor
    reference: FeatureMoments

    @classmethod
    def of(cls, digits: Labelled, work: Path, count: int, scale: float) -> Pool:
        """Return the recorded features; they are drawn the first time."""
        path = work / f"features-{count}.safetensors"
        if not path.exists():
            zoo = Zoo(digits, work, scale, print)
            trained, early = zoo.classes(), zoo.weak()
            labels = torch.from_numpy(balanced_labels(count, digits.train_labels.bincount().tolist(), 0))
            drawn = {}
            for name, guidance in SCALES.items():
                denoiser = early if name == "early" else trained
                images = generate(
                    denoiser,
                    denoiser.schedule,
                    Sampling.of(kind="dpm_solver", steps=10, scale=guidance),
                    cond=Conditioning(label=labels),
                    shape=(1, 8, 8),
                    seed=0,
                    batch_size=500,
                )
                drawn[name] = _features(digits, images)
            save_file(drawn, path)
        return cls(**load_file(path), reference=digits.reference)

    def measured(self, features: Tensor) -> Measured:
        """Return the distance of some samples, as the gate measures it."""
        influence = FrechetInfluence.of(self.reference, FeatureMoments.of(features))
        return Measured(influence.distance, influence(features))

    def passes(self, candidate: Tensor, champion: Measured, attempt: int = 1) -> bool:
        """Return whether the gate lets a candidate with these features pass."""
        ours, theirs = (Measures("frechet_distance", distance) for distance in (self.measured(candidate), champion))
        return decide(ours, theirs, attempt, "champion").passed

    def draws(self, times: int, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (numbers of n samples, n random numbers in [0, 1)), so many times."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(times):
            yield (
                torch.randint(len(self.guided), (n,), generator=generator),
                torch.rand(n, 1, generator=generator),
            )

    def wrong(self, times: int, n: int, *, paired: bool) -> int:
        """Return how often one of two versions passes that are equally good."""
        passed = 0
        for index, chance in self.draws(times, 2 * n, seed=1 if paired else 2):
            first, other = index[:n], index[:n] if paired else index[n:]
            swap = chance[:n] < 0.5
            back = ~swap if paired else chance[n:] < 0.5
            candidate = torch.where(swap, self.guided[first], self.unguided[first])
            champion = torch.where(back, self.guided[other], self.unguided[other])
            passed += self.passes(candidate, self.measured(champion))
        return passed

    def series(self, times: int, length: int, n: int) -> int:
        """Return in how many series of candidates, all as good as the champion, one of them passes."""
        with_a_pass = 0
        for index, chance in self.draws(times, (length + 1) * n, seed=3):
            mixed = torch.where(chance < 0.5, self.guided[index], self.unguided[index]).split(n)
            champion = self.measured(mixed[0])
            with_a_pass += any(self.passes(mixed[k], champion, k) for k in range(1, length + 1))
        return with_a_pass

    def power(self, n: int, times: int) -> list[dict[str, float]]:
        """Return how often a candidate passes that is better by a known difference, for growing differences."""
        rows = []
        for share in SHARES:
            difference = self.difference(share)
            passed = 0
            for index, chance in self.draws(times, n, seed=4):
                candidate = torch.where(chance < share, self.unguided[index], self.early[index])
                passed += self.passes(candidate, self.measured(self.early[index]))
            rows.append({"n": n, "share": share, "difference": difference, "power": passed / times})
            if passed >= 0.99 * times:
                break
        return rows

    def difference(self, share: float) -> float:
        """Return by how much the distance of all samples falls, where this share of them is of the trained model."""
        chance = torch.rand(len(self.early), 1, generator=torch.Generator().manual_seed(5))
        mixed = torch.where(chance < share, self.unguided, self.early)
        before, after = (frechet_distance(self.reference, FeatureMoments.of(f)) for f in (self.early, mixed))
        return before - after


def _features(digits: Labelled, images: Tensor) -> Tensor:
    """Return the evaluator's features of images in [-1, 1]."""
    return digits.evaluator.encoder(to_levels(images)).features.contiguous()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
