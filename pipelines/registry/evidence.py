"""What is known of a registered version, in a file inside its signed folder; its tags are copies that people read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import ddpm
from pipelines.errors import PipelineError
from pipelines.evaluation.scores import Scores

FILE = "evidence.json"
PROBE = "probe.safetensors"
"""Pictures that the version has drawn when it was made, which `ddpm verify` draws again."""
FORMAT = 1
PACKAGES = ("mlflow", "numpy", "ray", "safetensors", "torch")
"""Packages whose releases are recorded."""
SERVED = "served_model.py"


class EvidenceError(PipelineError):
    """A version carries no evidence, or none that this release reads."""


@dataclass(frozen=True)
class Evidence:
    """Where a version came from, how good it is, and with which settings and code that was found.

    Attributes:
        scores: of its samples, drawn with the settings that it serves.
        lineage: of the weights, as in `model.json`.
        model_digest: SHA-256 of the scored weights.
        dataset_uri: of the data that it was scored on.
        code_digest: SHA-256 over the code that travels with the version; see `code_digest`.
        packages: package -> release.
        probe: how the pictures of `PROBE` were drawn: `seed`, `device`, `count`.
    """

    scores: Scores
    lineage: dict[str, Any]
    model_digest: str
    dataset_uri: str
    code_digest: str
    packages: dict[str, str]
    probe: dict[str, Any]

    def tags(self) -> dict[str, str]:
        """Return the tags of the version, which have to be equal to these."""
        scores = self.scores
        return {
            **{key: str(value) for key, value in self.lineage.items()},
            "scores": json.dumps(scores.to_plain(), sort_keys=True),
            "frechet_distance": f"{scores['frechet_distance'].value:.4f}",
            "class_accuracy": "" if scores.class_accuracy is None else f"{scores.class_accuracy:.4f}",
            "model_digest": self.model_digest,
            "dataset_digest": scores.dataset_digest,
            "stream_digest": scores.stream_digest,
            "evaluator_digest": scores.evaluator_digest,
            "code_digest": self.code_digest,
            "sampling": json.dumps(scores.sampling, sort_keys=True),
        }

    def to_json(self) -> str:
        """Return the text of the file."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": self.scores.to_plain()}
        return json.dumps({"format": FORMAT, **plain}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """Read what `to_json` gave.

        Raises:
            EvidenceError: it is damaged or of another format.
        """
        try:
            plain = json.loads(text)
            if plain.pop("format") != FORMAT:
                raise EvidenceError(f"{FILE} is of another format than {FORMAT}: register the model anew")
            return cls(**{**plain, "scores": Scores.from_plain(plain["scores"])})
        except (ValueError, KeyError, TypeError) as error:
            raise EvidenceError(f"{FILE} is damaged ({error}): register the model anew") from error

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Return the evidence in the folder of a version.

        Raises:
            EvidenceError: there is none.
        """
        try:
            return cls.from_json((folder / FILE).read_text())
        except FileNotFoundError as error:
            raise EvidenceError(f"it carries no {FILE}: score and register it with `ddpm register`") from error

    def differing_tags(self, tags: Mapping[str, str]) -> list[str]:
        """Return the names of tags of a version that are not what the evidence says, or missing."""
        return [name for name, value in self.tags().items() if tags.get(name) != value]


def packages() -> dict[str, str]:
    """Return the release of each of `PACKAGES`, without its local part ("+cpu"), which package indexes do not have."""
    return {name: installed(name).split("+")[0] for name in PACKAGES}


def code_digest(package: Path = Path(ddpm.__path__[0]), served: Path | None = None) -> str:
    """Return the SHA-256 over the Python files of the package `ddpm` and of the served model, by name and content.

    Args:
        package: the folder of `ddpm`; by default, the installed one.
        served: the served model; by default, the installed one.
    """
    served = Path(__file__).parents[1] / SERVED if served is None else served
    found = hashlib.sha256()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")} | {f"../{SERVED}": served}
    for name in sorted(files):
        content = files[name].read_bytes()
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()
