"""The Inception network of the published FID, as torch-fidelity builds it, with weights that the user has got."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.evaluators.base import Encoded, Evaluator, in_parts
from pipelines.evaluation.evaluators.encoder import rgb
from pipelines.presentation.errors import ConfigError

ADDRESS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PREPARATION = (
    "grey repeated to three channels; resized to 299 pixels as TensorFlow 1 does (bilinear); scaled to [-1, 1)"
)
PART = 32


class Inception:
    """InceptionV3 of 2015, whose 2,048 features of the last pooling give the FID; probabilities are of its own classes.

    Attributes:
        width: number of features.
    """

    width = 2048

    def __init__(self, extractor: torch.nn.Module) -> None:
        self.extractor = extractor
        self.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Encoded:
        """Return features and class probabilities of images uint8 [N, C, H, W]."""

        def part(pixels: Tensor) -> tuple[Tensor, Tensor]:
            features, logits = self.extractor(rgb(pixels))
            return features, logits.softmax(1)

        return in_parts(images, self.device, part, PART)

    def to(self, device: torch.device) -> Inception:
        """Return the encoder with its weights on a device."""
        self.extractor, self.device = self.extractor.to(device), torch.device(device)
        return self


def check_inception(weights: str | None) -> None:
    """Check, before anything starts, that the network can be built.

    Raises:
        ConfigError: torch-fidelity is not installed, or no weights are named.
    """
    if weights is None:
        raise ConfigError(
            "evaluation.evaluator=inception needs the weights of the Inception network, which are never downloaded: "
            f"get {ADDRESS} and set evaluation.weights=PATH"
        )
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ConfigError(
            "evaluation.evaluator=inception needs torch-fidelity: "
            "install it with `pip install 'ddpm-pipelines[evaluate]'`"
        )


def open_inception(path: Path) -> Evaluator:
    """Build the network with the weights of a file in PyTorch's format or safetensors.

    Raises:
        ConfigError: the file holds anything but the weights of this network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with temporary_folder("inception") as scratch:
        # torch-fidelity unpickles whatever a file holds, so it is given a copy that holds tensors only.
        copy = scratch / "weights.pth"
        try:
            torch.save(_tensors(path), copy)
            with contextlib.redirect_stdout(None):
                extractor: Any = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(copy))
        except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"evaluation.weights = {path} are not the weights of the Inception network ({reason}): get {ADDRESS}"
            ) from error
    digest = hashlib.sha256(PREPARATION.encode() + path.read_bytes()).hexdigest()
    return Evaluator(Inception(extractor), "inception", digest, path.name, PREPARATION, labels=False, accuracy=None)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors, without running code from it."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
