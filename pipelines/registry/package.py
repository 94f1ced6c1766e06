"""Make a model version: the model, its evidence and the code that it needs, signed, in the run that it came from."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import ddpm
from ddpm.generate import Sampling, to_uint8
from ddpm.inference import COLUMNS, parameters
from ddpm.model import Model, save_model
from pipelines import tracking
from pipelines.errors import PipelineError
from pipelines.evaluation.scores import Scores
from pipelines.evaluation.scoring import weights_digest
from pipelines.references import Resolved
from pipelines.registry.evidence import FILE, PROBE, SERVED, Evidence, code_digest, packages
from pipelines.registry.sign import Signer
from pipelines.scratch import scratch_folder
from pipelines.tracking import ModelVersion, Tracker

PROBES = 16
"""Pictures that a version draws when it is made."""
SIGNATURE = "model.sig"
"""Name of the signature, beside the signed folder."""


class RegistryError(PipelineError):
    """There is no such model version in the registry, or none can be made."""


def register(resolved: Resolved, name: str, scores: Scores, dataset_uri: str, signer: Signer) -> ModelVersion:
    """Make a version of a model with the settings that it was scored with.

    Args:
        resolved: the model, of a run or of another version.
        name: of the registered model.
        scores: of the model.
        dataset_uri: of the data that it was scored on.

    Raises:
        RegistryError: the model has no run that the version could belong to.
    """
    tracker = resolved.tracker
    if tracker is None:
        raise RegistryError(
            f"{resolved.reference} has no MLflow run, to which a version belongs: register a model of a run "
            "(runs:/ID) or another version (models:/NAME/VERSION)"
        )
    spec = replace(resolved.model.spec, sampling=Sampling.from_json(scores.sampling))
    model = replace(resolved.model, spec=spec)
    images, labels, seed = probe(model)
    evidence = Evidence(
        scores=scores,
        lineage=dict(spec.lineage),
        model_digest=digest_of(resolved),
        dataset_uri=dataset_uri,
        code_digest=code_digest(),
        packages=packages(),
        probe={"seed": seed, "count": len(images), "device": "cpu", "torch": torch.__version__.split("+")[0]},
    )
    with tempfile.TemporaryDirectory(prefix="package-", dir=scratch_folder()) as scratch:
        folder, signature = Path(scratch) / "model", Path(scratch) / SIGNATURE
        save_model(folder, spec, model.network.state_dict())
        drawn = {"images": torch.from_numpy(images)}
        save_file(drawn if labels is None else drawn | {"labels": labels}, folder / PROBE)
        (folder / FILE).write_text(evidence.to_json())
        signer.sign_folder(folder, signature)
        model_id = _log(tracker, model, folder, signature)
    return tracking.register(tracker, name, model_id, evidence.tags())


def digest_of(resolved: Resolved) -> str:
    """Return the SHA-256 under which the weights of a model are known: of the published checkpoint where it is one."""
    return resolved.published.digest if resolved.published else weights_digest(resolved.model)


def probe(model: Model, seed: int = 0) -> tuple[NDArray[np.uint8], torch.Tensor | None, int]:
    """Return pictures that a model draws, uint8 [N, H, W, C], their labels [N], if it has classes, and their seed."""
    labels = torch.arange(PROBES) % len(model.spec.classes) if model.spec.classes else None
    images = model.generate(labels, seed=seed, image_ids=torch.arange(PROBES), batch_size=PROBES)
    return to_uint8(images).numpy(), labels, seed


def _log(tracker: Tracker, model: Model, folder: Path, signature: Path) -> str:
    """Log a model folder with its signature as an MLflow pyfunc that carries its code; return the logged model's ID."""
    channels, height, width = model.spec.shape
    example = (
        COLUMNS,
        np.zeros((2, height, width, channels), dtype=np.uint8),
        {**parameters(), "guidance_scale": ("double", None)},
    )
    requirements = [f"{name}=={packages()[name]}" for name in ("mlflow", "torch", "numpy", "safetensors")]
    return tracking.log_pyfunc(
        tracker,
        {"model": folder, "signature": signature},
        Path(__file__).parents[1] / SERVED,
        [Path(ddpm.__path__[0])],
        requirements,
        example,
        int(model.spec.lineage.get("images_seen", 0)),
    )
