"""The scores of a model: each an estimate with its interval, floor and ceiling, and with what makes it comparable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ddpm.generate import Sampling
from pipelines.storage import layout

Z_95 = 1.959964
IMAGES_PER_FEATURE = 20
"""Images per feature below which a Frechet distance is mostly its own bias and noise."""

LABELS = {
    "frechet_distance": "Frechet distance to the train split",
    "frechet_distance_test": "Frechet distance to the test split",
    "kid": "kernel distance (KID)",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "diversity": "diversity within a class",
    "class_accuracy": "class accuracy",
    "prompt_accuracy": "prompt accuracy",
    "bits_per_dim": "bits per dimension, variational bound",
    "bits_per_dim_ode": "bits per dimension, probability-flow ODE",
    "copied": "share of samples unusually near to a training image, by pixels",
    "copied_features": "share of samples unusually near to a training image, by features",
    "authenticity": "authenticity",
    "finite": "share of samples that are finite numbers",
}
"""Score -> its name in words, in the order in which scores are shown."""


@dataclass(frozen=True)
class Estimate:
    """One score.

    Attributes:
        value: mean over the noise seeds.
        low, high: 95 % interval of that mean at this number of samples; None where it is not known.
        spread: standard deviation over the noise seeds; None for a single one.
        floor: the same score of real test images, or the best that is possible; None where it has no such thing.
        ceiling: the same score of images of noise, or of who guesses; None where it has no such thing.
    """

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    floor: float | None = None
    ceiling: float | None = None

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        errors: Sequence[float],
        *,
        error: float | None = None,
        floor: float | None = None,
        ceiling: float | None = None,
    ) -> Estimate:
        """Return the estimate from the value and the standard error of each noise seed.

        Args:
            error: of the mean; None where the seeds are independent of each other, and it follows from theirs.
        """
        mean = math.fsum(values) / len(values)
        if error is None:
            error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors)
        spread = None
        if len(values) > 1:
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return cls(mean, mean - Z_95 * error, mean + Z_95 * error, spread, floor, ceiling)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the value; None where the interval is not known."""
        return None if self.low is None or self.high is None else (self.high - self.low) / (2 * Z_95)

    def __str__(self) -> str:
        """Return the value with its interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} (95 %: {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Scores:
    """The quality of a model's samples; comparable only where evaluator, data, n and seeds are alike.

    Attributes:
        estimates: score -> estimate; `LABELS` has the names.
        n: number of samples of each noise seed.
        seeds: seeds of the samples' noise.
        evaluator: kind of the network that judges.
        evaluator_digest: SHA-256 of its weights and of what prepares the images for it.
        features: width of its features.
        real_accuracy: its accuracy on the real test split, 0..1; None without labels.
        dataset_digest: digest of the dataset.
        stream_digest: digest of the dataset with its quarantine; empty in scores of an earlier release.
        real: number of real images by what they are for: "train", "test".
        sampling: the settings with which the samples were drawn, in the fields of the release that drew them.
        memorisation: what `ddpm.memorisation` found, as JSON; None where it was not looked for.
        samples: folder of the sample shards; empty where they are not kept.
        prompts: what samples were drawn from, and among how many captions each one's own had to match best, as
            `pipelines.evaluation.prompts` records it; None for samples without prompts.
        bound_variance: variance of the chain's steps whose bound `bits_per_dim` is, the tighter of "small" and "large",
            or "learned"; None without likelihoods, and in scores of an earlier release, whose bound was of "small".
    """

    estimates: dict[str, Estimate]
    n: int
    seeds: tuple[int, ...]
    evaluator: str
    evaluator_digest: str
    features: int
    real_accuracy: float | None
    dataset_digest: str
    stream_digest: str
    real: dict[str, int]
    sampling: dict[str, Any]
    memorisation: dict[str, Any] | None = None
    samples: str = ""
    prompts: dict[str, Any] | None = None
    bound_variance: str | None = None

    def __getitem__(self, name: str) -> Estimate:
        """Return the estimate of a score."""
        return self.estimates[name]

    def __contains__(self, name: str) -> bool:
        """Return whether there is such a score."""
        return name in self.estimates

    @property
    def class_accuracy(self) -> float | None:
        """Share of samples, 0..1, that the evaluator assigns to the requested class; None without classes."""
        return self.estimates["class_accuracy"].value if "class_accuracy" in self else None

    def lines(self) -> list[tuple[str, str]]:
        """Return the scores in words, as lines of (name, text)."""
        found = []
        drawn = f"{self.n:,} samples" if len(self.seeds) == 1 else f"{len(self.seeds)} x {self.n:,} samples"
        if "class_accuracy" in self:
            real = "" if self.real_accuracy is None else f" (real test: {self.real_accuracy:.4f})"
            found.append(("accuracy", f"{self['class_accuracy'].value:.4f} of {drawn}{real}"))
        if self.prompts is not None and "prompt_accuracy" in self:
            found.append(("prompts", f"{_short(self['prompt_accuracy'])} of {drawn} {self._asked(self.prompts)}"))
        distance = self["frechet_distance"]
        text = f"Frechet {_short(distance)}"
        if distance.floor:
            text += f" = {distance.value / distance.floor:.2f} times the floor {distance.floor:.2f} of real test images"
        if distance.ceiling is not None:
            text += f" (noise: {distance.ceiling:.0f})"
        found.append(("distance", text))
        groups = {
            "variety": ("precision", "recall", "density", "coverage"),
            "bits/dim": ("bits_per_dim", "bits_per_dim_ode"),
        }
        short = {"bits_per_dim": "bound", "bits_per_dim_ode": "ODE"}
        more = {"bits_per_dim": f" (variance {self.bound_variance})" if self.bound_variance else ""}
        for name, members in groups.items():
            there = [
                f"{short.get(member, member)} {_short(self[member])}{more.get(member, '')}"
                for member in members
                if member in self
            ]
            if there:
                found.append((name, ", ".join(there)))
        if self.memorisation is not None:
            found.append(("copies", self.memorisation["verdict"]))
        if "finite" in self and self["finite"].value < 1:
            found.append(("finite", f"only {self['finite'].value:.2%} of the samples: the others hold NaN or infinity"))
        return [*found, *(("note", note) for note in self.notes())]

    @staticmethod
    def _asked(prompts: Mapping[str, Any]) -> str:
        """Return in words what a prompt accuracy is of."""
        real = f", real test: {prompts['real_accuracy']:.2f}" if prompts["real_accuracy"] is not None else ""
        return f"match their own caption best of {prompts['choices']} (chance: {prompts['chance']:.2f}{real})"

    def notes(self) -> list[str]:
        """Return what a reader of the scores has to know about their size."""
        if self.features and self.n < IMAGES_PER_FEATURE * self.features:
            least = IMAGES_PER_FEATURE * self.features
            return [
                f"{self.n:,} samples are few for {self.features:,} features: compare this Frechet distance only with "
                f"others of {self.n:,} samples, or set evaluation.n to {least:,} or more"
            ]
        return []

    def metrics(self) -> dict[str, float]:
        """Return the scores as MLflow metrics by name."""
        values: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            values[f"eval/{name}"] = estimate.value
        distance = self["frechet_distance"]
        extra = {
            "eval/frechet_floor": distance.floor,
            "eval/frechet_low": distance.low,
            "eval/frechet_high": distance.high,
        }
        values |= {name: value for name, value in extra.items() if value is not None}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def to_plain(self) -> dict[str, Any]:
        """Return the scores as JSON types."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Scores:
        """Read what `to_plain` gave, by this or an earlier release."""
        Sampling.from_json(plain["sampling"])  # raises for what is none
        # As they were recorded: a field that settings have gained since must not make other tags or another digest.
        sampling = dict(plain["sampling"])
        if "estimates" in plain:
            estimates = {name: Estimate(**estimate) for name, estimate in plain["estimates"].items()}
            rest = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
            return cls(**{**rest, "estimates": estimates, "seeds": tuple(plain["seeds"]), "sampling": sampling})
        distance = Estimate(plain["frechet_distance"], floor=plain["floor"], ceiling=plain["ceiling"])
        estimates = {"frechet_distance": distance}
        if plain["class_accuracy"] is not None:
            estimates["class_accuracy"] = Estimate(plain["class_accuracy"])
        return cls(
            estimates=estimates,
            n=plain["n"],
            seeds=(plain["seed"],),
            evaluator="classifier",
            evaluator_digest=plain["evaluator_digest"],
            features=0,
            real_accuracy=plain["real_accuracy"],
            dataset_digest=plain["dataset_digest"],
            stream_digest="",
            real={},
            sampling=sampling,
        )


def rests_on(plain: Mapping[str, Any]) -> set[str]:
    """Return the names of what scores were computed from: the samples, the evaluators, and the features of real images.

    Args:
        plain: scores as they are recorded, by any release.
    """
    evaluators = [plain.get("evaluator_digest"), (plain.get("prompts") or {}).get("evaluator_digest")]
    names = {f"{layout.EVALUATORS}/{digest[:16]}" for digest in evaluators if digest}
    if plain.get("samples"):  # an address, which is spelt with the root; its last part is a digest
        names.add(f"samples/{str(plain['samples']).rsplit('/', 1)[-1]}")
    return names | {f"{layout.FEATURES}/{features_name(str(plain.get('stream_digest')), str(evaluators[0]))}"}


def features_name(stream_digest: str, evaluator_digest: str) -> str:
    """Return the name of the folder of what an evaluator says of the real images."""
    return f"{stream_digest[:16]}-{evaluator_digest[:16]}"


def _short(estimate: Estimate) -> str:
    """Return a value with half the width of its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ± {(estimate.high - estimate.low) / 2:.2f}"
