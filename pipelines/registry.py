"""Register a scored checkpoint as a model version, and move an alias to it if the gate allows it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

import ddpm
from ddpm.model import Model, save_model
from pipelines import tracking
from pipelines.errors import PipelineError
from pipelines.evaluation.scores import Scores
from pipelines.scratch import scratch_folder
from pipelines.tracking import ModelVersion, Tracker

ACCURACY_TOLERANCE = 0.01
"""Loss of class accuracy that the gate accepts, as a fraction of samples."""

BETTER_Z = 1.959964
"""Standard errors of the difference by which a version has to be nearer: equal ones pass in 2.5 % of cases."""


class RegistryError(PipelineError):
    """There is no such model version in the registry."""


@dataclass(frozen=True)
class Verdict:
    """The gate's decision whether an alias may move, and the reason in words."""

    passed: bool
    reason: str

    def __str__(self) -> str:
        """Return the verdict in words."""
        return f"{self.outcome}: {self.reason}"

    @property
    def outcome(self) -> str:
        """Return "passed" or "refused"."""
        return "passed" if self.passed else "refused"


def gate(candidate: Scores, champion: Scores | None) -> Verdict:
    """Decide whether a version may take an alias from its present version, the champion.

    It may not if its samples are copies of training images, or give no finite distance. Else it may if their Frechet
    distance to real images is smaller by `BETTER_Z` standard errors of the difference or more, and its class accuracy
    is at most `ACCURACY_TOLERANCE` lower. Scores of another evaluator, stream of data, number of samples or other seeds
    are not comparable, nor are those of an earlier release, which have no intervals: the alias stays.

    Args:
        champion: scores of the present version; None where the alias has none.
    """
    if not math.isfinite(candidate["frechet_distance"].value):
        return Verdict(False, "its Frechet distance is not a number: its samples or their features overflowed")
    if candidate.memorisation is not None and candidate.memorisation["copies"]:
        return Verdict(False, candidate.memorisation["verdict"])
    if champion is None:
        return Verdict(True, "the alias has no version yet")
    for name in ("evaluator_digest", "dataset_digest", "stream_digest", "n", "seeds"):
        mine, theirs = getattr(candidate, name), getattr(champion, name)
        if mine != theirs:
            return Verdict(False, f"scores do not compare: {name} is {mine} here and {theirs} at the alias")
    here, there = candidate["frechet_distance"], champion["frechet_distance"]
    if here.standard_error is None or there.standard_error is None:
        return Verdict(
            False, "scores without intervals do not compare: evaluate the version and that at the alias anew"
        )
    distances = f"Frechet distance {here.value:.3f} against {there.value:.3f}"
    gain, error = there.value - here.value, math.hypot(here.standard_error, there.standard_error)
    if not gain > 0:
        return Verdict(False, f"not better: {distances}")
    if gain < BETTER_Z * error:
        needed = math.ceil(candidate.n * (BETTER_Z * error / gain) ** 2)
        return Verdict(
            False,
            f"not distinguishable: {distances}, a difference of {gain / error:.1f} standard errors where "
            f"{BETTER_Z:.2f} are asked for; about {needed:,} samples of each seed would tell (evaluation.n)",
        )
    if (candidate.class_accuracy or 0) < (champion.class_accuracy or 0) - ACCURACY_TOLERANCE:
        return Verdict(
            False, f"class accuracy falls from {champion.class_accuracy:.4f} to {candidate.class_accuracy:.4f}"
        )
    return Verdict(True, f"better: {distances}, by {gain / error:.1f} standard errors")


def package(tracker: Tracker, model: Model) -> str:
    """Log a model to its run as an MLflow pyfunc that carries the code it needs, and return the logged model's ID."""
    labels = np.arange(2, dtype=np.int64)
    channels, height, width = model.spec.shape
    shape = (2, height, width, channels)
    example = (
        _table(labels),
        np.zeros(shape, dtype=np.uint8),
        {"scale": -1.0, "guidance_scale": -1.0, "steps": 0, "seed": 0},
    )
    requirements = [f"{name}=={_release(name)}" for name in ("mlflow", "torch", "numpy", "safetensors")]
    with tempfile.TemporaryDirectory(prefix="package-", dir=scratch_folder()) as scratch:
        folder = Path(scratch) / "model"
        save_model(folder, model.spec, model.network.state_dict())
        code = Path(__file__).with_name("served_model.py")
        seen = int(model.spec.lineage.get("images_seen", 0))
        return tracking.log_pyfunc(tracker, folder, code, [Path(ddpm.__path__[0])], requirements, example, seen)


def register(
    tracker: Tracker, name: str, model_id: str, scores: Scores, lineage: Mapping[str, Any], model_digest: str
) -> ModelVersion:
    """Create a model version whose tags carry its scores, digests and lineage.

    Args:
        name: of the registered model.
        model_id: of the logged model, from `package`.
        model_digest: SHA-256 of the checkpoint.
    """
    tags = {
        "scores": json.dumps(scores.to_plain()),
        "frechet_distance": f"{scores['frechet_distance'].value:.4f}",
        "class_accuracy": "" if scores.class_accuracy is None else f"{scores.class_accuracy:.4f}",
        "model_digest": model_digest,
        "dataset_digest": scores.dataset_digest,
        "sampling": json.dumps(scores.sampling),
        **{key: str(value) for key, value in lineage.items()},
    }
    return tracking.register(tracker, name, model_id, tags)


def find_version(uri: str, reference: str) -> ModelVersion:
    """Return the registered version that `models:/NAME/VERSION` names.

    Args:
        uri: address of the MLflow server.

    Raises:
        RegistryError: the reference is of another form, or there is no such version.
    """
    name, _, number = reference.removeprefix("models:/").partition("/")
    found = tracking.version(uri, name, number=number) if number.isdigit() else None
    if found is None:
        raise RegistryError(f"{reference} is not a registered version; write models:/NAME/VERSION")
    return found


def promote(uri: str, candidate: ModelVersion, alias: str) -> Verdict:
    """Move an alias to a version if the gate allows it, and record the verdict in the version's tags.

    Args:
        uri: address of the MLflow server.
    """
    current = tracking.version(uri, candidate.name, alias=alias)
    if current is not None and current.version == candidate.version:
        return Verdict(True, f"the alias {alias} is there already")
    scores = scores_of(candidate)
    if scores is None:
        verdict = Verdict(False, "the version carries no scores: evaluate and register it first")
    elif current is not None and scores_of(current) is None:
        verdict = Verdict(False, f"{current.uri} at the alias has no scores to compare with: move the alias by hand")
    else:
        verdict = gate(scores, None if current is None else scores_of(current))
    if verdict.passed:
        tracking.set_alias(uri, candidate.name, alias, candidate.version)
    tags = {f"gate.{alias}": str(verdict)}
    tracking.set_version_tags(uri, candidate.name, candidate.version, tags)
    return verdict


def scores_of(version: ModelVersion) -> Scores | None:
    """Return the scores in a version's tags, or None where it has none."""
    text = version.tags.get("scores")
    if text is None:
        return None
    plain = json.loads(text)
    return Scores.from_plain(plain)


def _table(labels: Any) -> Any:
    """Return the input table of the pyfunc for these labels."""
    import pandas

    return pandas.DataFrame({"label": labels})


def _release(name: str) -> str:
    """Return a package's installed version without its local part ("+cpu"), which package indexes do not have."""
    return installed(name).split("+")[0]
