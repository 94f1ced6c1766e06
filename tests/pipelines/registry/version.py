"""A version as it comes from the registry, made without a server: a tiny model in a pyfunc that MLflow has written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from ddpm.models.unet import UNet
from pipelines.config import RegistryConfig
from pipelines.evaluation.scores import Estimate, Scores
from pipelines.registry.contents import model_folder, signature_file
from pipelines.registry.evidence import Evidence, file_digests
from pipelines.registry.package import pyfunc_of, write_version
from pipelines.signing import Signer
from pipelines.storage import layout
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.evaluation import made_up

CONFIG = RegistryConfig(model="digits")
UNET = replace(SMALL, num_classes=2)
SAMPLING = Sampling.of(steps=3, scale=2.0)
SPEC = ModelSpec(UNET, {"kind": "cosine", "num_steps": 50}, "v", 8, ("a", "b"), SAMPLING, {"images_seen": 7})


def a_model(seed: int = 0, **parts: Any) -> Model:
    torch.manual_seed(seed)
    network = UNet(UNET).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # the last layer starts at 0
            parameter += 0.1 * torch.randn_like(parameter)  # type: ignore[misc]
    return Model(SPEC, network, **parts)


def scores(sampling: Sampling = SAMPLING, **fields: Any) -> Scores:
    estimates = {"frechet_distance": Estimate.of([10.0], [0.1], floor=5.0), "class_accuracy": Estimate(0.97)}
    return made_up.scores(**{"estimates": estimates, "sampling": sampling.to_json(), **fields})


@dataclass(frozen=True)
class Version:
    """The folder of a pyfunc, and the tags of its version."""

    folder: Path
    tags: dict[str, str]

    @property
    def inside(self) -> Path:
        """The signed folder."""
        return model_folder(self.folder)

    def sign(self, change: Callable[[Evidence], Evidence] = lambda evidence: evidence) -> Version:
        """Sign the folder again, as whoever has the key could, with changed evidence and its tags."""
        evidence = change(Evidence.read(self.inside))
        evidence = replace(evidence, files=file_digests(self.inside))
        (self.inside / layout.EVIDENCE).write_text(evidence.to_json())
        Signer.of(CONFIG).sign_folder(self.inside, signature_file(self.folder))
        return replace(self, tags=evidence.tags())


def a_version(
    folder: Path, model: Model, found: Scores, dataset_uri: str = "file:///nowhere", signer: Signer | None = None
) -> Version:
    import mlflow

    folder.mkdir()
    evidence = write_version(folder / "made", model, found, "m" * 64, dataset_uri, signer or Signer.of(CONFIG))
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.pyfunc.save_model(
        folder / "pyfunc", **pyfunc_of(folder / "made", model.spec.shape, evidence.packages).arguments()
    )
    return Version(folder / "pyfunc", json.loads(json.dumps(evidence.tags())))
