"""Any other network as an encoder: a TorchScript file, a `torch.export` archive, or a folder of `transformers`."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipelines.config import EvaluationConfig
from pipelines.environment.scratch import temporary_folder
from pipelines.evaluation.evaluators.base import Encoded, Evaluator, in_parts
from pipelines.presentation.errors import ConfigError
from pipelines.shards.index import Dataset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """How images come to the size and the scale that a network was trained on.

    Attributes:
        size: height and width, in pixels.
        mean: subtracted from pixels in [0, 1], per channel; one value for a network that takes grey images.
        std: by which they are divided then.
    """

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Return images uint8 [N, C, H, W] as float32 [N, len(mean), size, size]."""
        x = rgb(images) if len(self.mean) == 3 else images
        x = x.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    @property
    def words(self) -> str:
        """A description of the preparation, for a person."""
        channels = "grey repeated to three channels; " if len(self.mean) == 3 else ""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{channels}resized to {self.size} pixels (bicubic, antialiased); scaled to [0, 1], less {mean}, by {std}"
        )


def rgb(images: Tensor) -> Tensor:
    """Return images [N, 1 or 3, H, W] with three channels."""
    return images.expand(-1, 3, -1, -1)


PART = 32
Format = Literal["script", "export", "folder"]
SUFFIXES: dict[str, Format] = {".pt": "script", ".ts": "script", ".pt2": "export"}
FORMS = (
    "a TorchScript file (.pt or .ts), an archive of torch.export (.pt2), or a folder with config.json and safetensors, "
    "as `save_pretrained` of transformers writes it"
)


class FileEncoder:
    """A network from files, which travels as their bytes: scripted and exported networks cannot be pickled otherwise.

    Args:
        files: content by name.
        form: in which form the network is stored.
        preparation: of the images.

    Attributes:
        width: number of features; 0 until images were encoded.
    """

    def __init__(self, files: Mapping[str, bytes], form: Format, preparation: Preparation) -> None:
        self.files, self.form, self.preparation = dict(files), form, preparation
        self.device, self.width = torch.device("cpu"), 0
        self.network = _load(self.files, form)

    def __call__(self, images: Tensor) -> Encoded:
        """Return the features of images uint8 [N, C, H, W], without probabilities."""
        found = in_parts(
            images, self.device, lambda pixels: (features_of(self.network(self.preparation(pixels))), None), PART
        )
        self.width = found.features.shape[1]
        return found

    def to(self, device: torch.device) -> FileEncoder:
        """Return the encoder with its weights on a device."""
        self.network, self.device = self.network.to(device), torch.device(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the files without the network that was made from them."""
        return {name: value for name, value in self.__dict__.items() if name not in ("network", "device")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the network again, on the CPU."""
        self.__dict__.update(state)
        self.device, self.network = torch.device("cpu"), _load(self.files, self.form)


def features_of(output: Any) -> Tensor:
    """Return the features [N, D] in what a network returned.

    Known are a tensor [N, D]; one of tokens [N, T, D], of which the first is the class token; and the outputs of
    transformers and DINOv2 by name: the pooled output where there is one, else the class token.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(output, Mapping):
        for name in ("pooler_output", "x_norm_clstoken", "last_hidden_state"):
            if output.get(name) is not None:
                return features_of(output[name])
    elif isinstance(output, Tensor) and output.dim() in (2, 3):
        return output if output.dim() == 2 else output[:, 0]
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"it returns {shape}, and features are [N, D], tokens [N, T, D] with the class token first, or the output of a "
        "network of transformers: export it with a last layer that returns one of these"
    )


def check_encoder(config: EvaluationConfig, dataset: Dataset) -> None:
    """Check, before anything starts, that a network may be there and takes the images of a dataset.

    Raises:
        ConfigError: it cannot be.
    """
    if config.weights is None:
        raise ConfigError(f"evaluation.evaluator=encoder needs evaluation.weights=PATH, the address of {FORMS}")
    suffix = Path(config.weights).suffix
    if suffix == ".safetensors":
        raise ConfigError(
            f"evaluation.weights = {config.weights} holds weights alone: name the folder that it is in, "
            "which has the network's config.json as well"
        )
    if suffix not in SUFFIXES and Path(config.weights).expanduser().is_file():
        raise ConfigError(f"evaluation.weights = {config.weights} must be {FORMS}")
    if suffix not in SUFFIXES and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"evaluation.weights = {config.weights} is read by transformers: install it with "
            "`pip install 'ddpm-pipelines[evaluate]'`"
        )
    if config.encoder_mean is not None and len(config.encoder_mean) == 1 and dataset.channels == 3:
        raise ConfigError("evaluation.encoder_mean has one value, for a network of grey images; these have colours")


def open_encoder(path: Path, config: EvaluationConfig, dataset: Dataset) -> Evaluator:
    """Load a network from a file or folder, and try it on black images of a dataset's shape.

    Raises:
        ConfigError: it cannot be loaded, or does not return features of these images.
    """
    form: Format = "folder" if path.is_dir() else SUFFIXES[path.suffix]
    files = _read(path, form)
    preparation = _preparation(config, files)
    try:
        encoder = FileEncoder(files, form, preparation)
        for count in (1, 3):
            encoder(torch.zeros(count, *dataset.shape, dtype=torch.uint8))
    except Exception as error:  # whatever a foreign file or network raises
        raise ConfigError(
            f"evaluation.weights = {path} cannot encode images of {' x '.join(map(str, dataset.shape))} "
            f"pixels, {preparation.words}: {_reason(error)}. It must be {FORMS}, for any number of images"
        ) from error
    content = hashlib.sha256(preparation.words.encode())
    for name in sorted(files):
        content.update(hashlib.sha256(files[name]).digest())
    return Evaluator(encoder, "encoder", content.hexdigest(), path.name, preparation.words, labels=False, accuracy=None)


def _read(path: Path, form: Format) -> dict[str, bytes]:
    """Return the files of a network by name."""
    if form != "folder":
        return {path.name: path.read_bytes()}
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".json", ".safetensors")}
    if "config.json" not in found or not any(name.endswith(".safetensors") for name in found):
        raise ConfigError(f"evaluation.weights = {path} has no config.json and safetensors in it: name {FORMS}")
    return found


def _preparation(config: EvaluationConfig, files: Mapping[str, bytes]) -> Preparation:
    """Return the configured preparation; what is left open is what the folder says, else as for ImageNet."""
    said = json.loads(files.get("preprocessor_config.json", b"{}"))
    sides = said.get("crop_size") or said.get("size") or {}
    size = sides.get("height", sides.get("shortest_edge")) if isinstance(sides, Mapping) else sides
    default = Preparation()
    return Preparation(
        config.encoder_size or size or default.size,
        config.encoder_mean or tuple(said.get("image_mean") or default.mean),
        config.encoder_std or tuple(said.get("image_std") or default.std),
    )


def _load(files: Mapping[str, bytes], form: Format) -> Any:
    """Return the network, in evaluation mode, on the CPU."""
    if form == "export":
        return torch.export.load(io.BytesIO(next(iter(files.values())))).module()
    if form == "script":
        return torch.jit.load(io.BytesIO(next(iter(files.values()))), map_location="cpu").eval()
    from transformers import AutoModel

    with temporary_folder("encoder") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        return AutoModel.from_pretrained(scratch, local_files_only=True, use_safetensors=True).eval()


def _reason(error: Exception) -> str:
    """Return the last line of an error, which says more than the stack of a scripted network."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
