"""The evidence of a registered version, a file inside its signed folder; its tags are copies for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import ddpm
from ddpm.model import TEXT_ENCODER
from ddpm.tensor_files import files_of
from pipelines.evaluation.scores import Scores
from pipelines.presentation.errors import PipelineError
from pipelines.signing.sign import files_below, sha256
from pipelines.storage import layout

MODEL = "model"
"""Name of the signed folder, among the artifacts of a version."""
SIGNATURE = "model.sig"
"""Name of its signature, beside it."""
FORMAT = 1
PACKAGES = ("mlflow", "numpy", "ray", "safetensors", "torch")
"""Packages whose releases are recorded."""
TEXT_PACKAGE = "sentence-transformers"
"""The package that embeds prompts, which a version of a model on text needs beside them."""
SERVED = "served_model.py"
CODE = "code/ddpm"
COMPILED = "__pycache__"
PACKAGE = Path(ddpm.__path__[0])
"""The folder of the installed package `ddpm`."""
SERVED_HERE = Path(__file__).parents[1] / SERVED


class EvidenceError(PipelineError):
    """A version carries no evidence, or none that this release reads."""


@dataclass(frozen=True)
class Evidence:
    """Where a version came from, how good it is, and with which settings and code that was found.

    Attributes:
        scores: of its samples, drawn with the settings that it serves.
        lineage: of the weights, as in `model.json`.
        model_digest: under which the scored weights are known: of the published checkpoint, or of the weights.
        files: SHA-256 of every other file of the signed folder, by its path there.
        dataset_uri: of the data that it was scored on.
        code: SHA-256 of every file of the code that travels with the version, by its path there; see `code_files`.
        packages: package -> release.
        probe: how the pictures were drawn: `seed`, `count`, and on what; see `pipelines.registry.probe`.
        training_data: what the data hold that the model was trained on, each source as `plain_contents` gives it;
            empty where that is not known. It is of the time of the registration, so that it is no part of the model.
    """

    scores: Scores
    lineage: dict[str, Any]
    model_digest: str
    files: dict[str, str]
    dataset_uri: str
    code: dict[str, str]
    packages: dict[str, str]
    probe: dict[str, Any]
    training_data: list[dict[str, Any]] = field(default_factory=list)

    @property
    def code_digest(self) -> str:
        """SHA-256 over the code that travels with the version, by name and content."""
        return hashlib.sha256(json.dumps(self.code, sort_keys=True).encode()).hexdigest()

    @property
    def served_digest(self) -> str:
        """SHA-256 over the weights, those that guide included, and the settings: the same serve the same pictures."""
        weights = {name: digest for name, digest in self.files.items() if _holds_weights(name)}
        content = [weights, self.scores.sampling]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def content_digest(self) -> str:
        """SHA-256 over all files but the pictures of the probe: the model with its description and what it carries."""
        content = {name: digest for name, digest in self.files.items() if name != layout.PROBE}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tags(self) -> dict[str, str]:
        """Return the tags of the version, which have to be equal to these."""
        scores = self.scores
        return {
            **{key: str(value) for key, value in self.lineage.items() if not isinstance(value, list)},
            "scores": json.dumps(scores.to_plain(), sort_keys=True),
            "frechet_distance": f"{scores['frechet_distance'].value:.4f}",
            "class_accuracy": "" if scores.class_accuracy is None else f"{scores.class_accuracy:.4f}",
            **({"prompt_accuracy": f"{scores['prompt_accuracy'].value:.4f}"} if "prompt_accuracy" in scores else {}),
            "model_digest": self.model_digest,
            "served_digest": self.served_digest,
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
    def from_json(cls, text: str | bytes) -> Evidence:
        """Read what `to_json` gave.

        Raises:
            EvidenceError: it is damaged or of another format.
        """
        try:
            plain = json.loads(text)
            if plain.pop("format") != FORMAT:
                raise EvidenceError(f"{layout.EVIDENCE} is of another format than {FORMAT}: register the model again")
            found = cls(**{**plain, "scores": Scores.from_plain(plain["scores"])})
            for digests in (found.files, found.code, found.packages):
                if not all(isinstance(value, str) for value in digests.values()):
                    raise TypeError("a digest or release is no text")
            found.tags()  # asks for all the rest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvidenceError(f"{layout.EVIDENCE} is damaged ({error!r}): register the model again") from error
        return found

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Return the evidence in the folder of a version.

        Raises:
            EvidenceError: there is none.
        """
        try:
            return cls.from_json((folder / layout.EVIDENCE).read_bytes())
        except FileNotFoundError as error:
            raise EvidenceError(
                f"it carries no {layout.EVIDENCE}, as those of earlier releases: register the model again"
            ) from error


def _holds_weights(name: str) -> bool:
    """Return whether a file of a version has weights that decide its pictures."""
    folder, _, file = name.rpartition("/")
    # Digests of earlier versions have of a text encoder only what is in one file.
    return name.endswith(layout.WEIGHTS) or (folder != TEXT_ENCODER and bool(files_of(layout.WEIGHTS, [file])))


def packages(*, text: bool = False) -> dict[str, str]:
    """Return the release of each of `PACKAGES`, without its local part ("+cpu"), which package indexes do not have.

    Args:
        text: whether the one that embeds prompts is among them.

    Raises:
        EvidenceError: that one is not installed.
    """
    try:
        return {name: installed(name).split("+")[0] for name in (*PACKAGES, *([TEXT_PACKAGE] if text else []))}
    except PackageNotFoundError as error:
        raise EvidenceError(
            f"a version of a model on text needs {error.name}, whose release is not known here: pip install "
            "'ddpm-pipelines[text]'"
        ) from error


def requirements(releases: Mapping[str, str]) -> tuple[str, ...]:
    """Return what pip has to install for a version, from the release of each package."""
    asked = ["mlflow", "torch", "numpy", "safetensors", *([TEXT_PACKAGE] if TEXT_PACKAGE in releases else [])]
    return tuple(f"{name}=={releases[name]}" for name in asked)


def code_files(
    package: Path = Path(ddpm.__path__[0]), served: Path = Path(__file__).parents[1] / SERVED
) -> dict[str, str]:
    """Return the SHA-256 of the files of the package `ddpm` and of the served model, by their paths in a version.

    Compiled files are left out, as MLflow leaves them out where it copies the package.

    Args:
        package: the folder of `ddpm`; by default, of the installed one.
        served: the served model; by default, the installed one.
    """
    names = [name for name in files_below(package) if COMPILED not in name.split("/")]
    return {SERVED: sha256(served), **{f"{CODE}/{name}": sha256(package / name) for name in names}}


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder but the evidence itself, by its path there."""
    return {name: sha256(folder / name) for name in files_below(folder) if name != layout.EVIDENCE}
