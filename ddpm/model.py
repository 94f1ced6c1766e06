"""Models as folders: `model.json` describes the model, `model.safetensors` holds the weights. No pickle.

Those of a large model are in several files; see `ddpm.tensor_files`. Networks that guide a model may lie in folders
below its own, each a model folder itself; see `save_guides`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ddpm.conditioning import Conditioning
from ddpm.first_weights import NoFirstWeights
from ddpm.generate import Sampling, generate
from ddpm.guidance import Guides
from ddpm.image_size import ImageSize, height_width, parse_image_size
from ddpm.models import NETWORKS, UNNAMED_NETWORK, NetworkConfig, UNetConfig
from ddpm.models.classifier import NoisyClassifier
from ddpm.prediction import NetworkDenoiser, Parameterization
from ddpm.schedule import NoiseSchedule, make_schedule
from ddpm.tensor_files import LARGEST_FILE, read_weights, save_weights

N = TypeVar("N", bound=nn.Module)

FORMAT_VERSION = 1
WEIGHTS, CLASSIFIER, WEAK = "model.safetensors", "classifier", "weak"
TEXT_ENCODER = "text_encoder"
"""Folder, below a model's own, of the text encoder that embedded its training data, where the model carries it."""
ENCODER_MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
"""Classes of `sentence_transformers` that the encoders of sentences are made of."""


@dataclass(frozen=True)
class ModelSpec:
    """The description of a model: everything but the weights.

    Attributes:
        network: kind and shape of the network.
        schedule: keyword arguments of `make_schedule`.
        prediction: parameterization of the network's output.
        image_size: height and width in pixels; one number for square images.
        classes: class names; empty for an unconditional model.
        sampling: default settings for sampling.
        lineage: origin of the weights: run, images seen, dataset digest, ...
        task: "denoiser", or "classifier" for a `NoisyClassifier` with the shape `network` (of a UNet): of `classes`, or
            of texts where the network's `text_dim` is not 0.

    Examples:
        >>> spec = ModelSpec(UNetConfig(), {"kind": "cosine"}, "v", image_size=32, classes=("cat", "dog"))
        >>> spec.shape, ModelSpec.from_json(spec.to_json()) == spec
        ((3, 32, 32), True)
    """

    network: NetworkConfig
    schedule: dict[str, Any]
    prediction: Parameterization
    image_size: ImageSize
    classes: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    lineage: dict[str, Any] = field(default_factory=dict)
    task: Literal["denoiser", "classifier"] = "denoiser"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.network.in_channels, *height_width(self.image_size)

    def to_json(self) -> str:
        """Return the text of `model.json`; for networks other than a UNet the fields include the kind."""
        kind = NETWORKS.name_of(self.network)
        network = {**({} if kind == UNNAMED_NETWORK else {"kind": kind}), **asdict(self.network)}
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"network": network, "sampling": self.sampling.to_json()}
        return json.dumps({"format_version": FORMAT_VERSION, **plain}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Return the description in the text of a `model.json`.

        Raises:
            ValueError: the text is of another version, or damaged.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise ValueError(f"model.json has format version {version}, this release reads {FORMAT_VERSION}")
            network: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in plain.pop("network").items()
            }
            return cls(
                network=NETWORKS.find(network.pop("kind", UNNAMED_NETWORK))(**network),
                sampling=Sampling.from_json(plain.pop("sampling")),
                image_size=parse_image_size(plain.pop("image_size")),
                classes=tuple(plain.pop("classes")),
                **plain,
            )
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"model.json is damaged ({error!r}): export or save the model again") from error


@dataclass(frozen=True)
class Model:
    """A trained model, ready to sample.

    Attributes:
        spec: description of the model.
        network: the denoising network.
        classifier: classifier for classifier guidance, of the same classes or texts, with the same schedule.
        weak: weaker model for autoguidance, with the same schedule.
    """

    spec: ModelSpec
    network: nn.Module
    classifier: NoisyClassifier | None = None
    weak: Model | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the model was trained with."""
        return make_schedule(**self.spec.schedule)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as a `Denoiser`."""
        return NetworkDenoiser(self.network, self.schedule, self.spec.prediction)

    @property
    def guides(self) -> Guides:
        """The networks for guidance, as `ddpm.generate` takes them."""
        return Guides(
            None if self.classifier is None else self.classifier.log_prob,
            None if self.weak is None else self.weak.denoiser,
        )

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, those of the networks that guide it included."""
        networks = [network for network in (self.network, self.classifier) if network is not None]
        own = sum(weight.nbytes for network in networks for weight in network.state_dict().values())
        return own + (0 if self.weak is None else self.weak.nbytes)

    def to(self, device: torch.device | str) -> Model:
        """Return the model on a device; its networks are moved in place."""
        return replace(
            self,
            network=self.network.to(device),
            classifier=None if self.classifier is None else self.classifier.to(device),
            weak=None if self.weak is None else self.weak.to(device),
        )

    def generate(
        self,
        labels: Tensor | None,
        *,
        text: Conditioning | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        image_ids: Tensor | None = None,
        count: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Return generated images in [-1, 1], [N, C, H, W], on the model's device; see `ddpm.generate.generate`.

        Args:
            labels: classes, int64 [N]; None for none.
            text: embeddings of N texts, for a model on text.

        Raises:
            ValueError: a label is outside the model's classes, or labels are given to an unconditional model; or the
                guidance needs a network that the model does not have.
        """
        if labels is not None:
            if not self.spec.classes:
                raise ValueError("this model has no classes: sample it without labels")
            if bool((labels < 0).any()) or bool((labels >= len(self.spec.classes)).any()):
                raise ValueError(f"labels must be in 0..{len(self.spec.classes) - 1}, got {labels.unique().tolist()}")
        cond = text if labels is None else replace(text or Conditioning(), label=labels)
        device = next(self.network.parameters()).device
        return generate(
            self.denoiser,
            self.schedule,
            sampling or self.spec.sampling,
            cond=None if cond is None else cond.to(device),
            shape=self.spec.shape,
            seed=seed,
            image_ids=None if image_ids is None else image_ids.to(device),
            count=count,
            batch_size=batch_size,
            guides=self.guides,
            device=device,
        )


def save_model(folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor], largest: int = LARGEST_FILE) -> None:
    """Write a model folder, with the weights as float32.

    Args:
        largest: bytes of weights above which they are in several files.

    Examples:
        >>> import tempfile
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> spec = ModelSpec(config, {"kind": "linear"}, "eps", image_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(Path(folder), spec, config.build().state_dict())
        ...     sorted(path.name for path in Path(folder).iterdir()), load_model(Path(folder)).spec == spec
        (['model.json', 'model.safetensors'], True)
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, WEIGHTS, weights, largest)
    (folder / "model.json").write_text(spec.to_json())


def save_guides(folder: Path, model: Model) -> None:
    """Write the networks that guide a model, if it has any, as model folders below its own: `classifier`, `weak`.

    Examples:
        >>> import tempfile
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> alone = Model(ModelSpec(config, {"kind": "linear"}, "eps", image_size=8), config.build())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_guides(Path(folder), replace(alone, weak=alone))
        ...     [path.name for path in Path(folder).iterdir()]
        ['weak']
    """
    if model.classifier is not None:
        own = model.classifier
        shape = replace(own.config, text_dim=own.outputs) if own.text else own.config
        alone = replace(model.spec, network=shape, task="classifier", sampling=Sampling(), lineage={})
        save_model(folder / CLASSIFIER, alone, model.classifier.state_dict())
    if model.weak is not None:
        save_model(folder / WEAK, model.weak.spec, model.weak.network.state_dict())


def load_model(folder: Path, device: torch.device | str = "cpu") -> Model:
    """Return the model of a model folder, with the networks that guide it where they are below it.

    Raises:
        ValueError: the folder is not a model folder, its version or task differs, or the weights do not fit.
    """
    spec = _read_denoiser(folder)
    return Model(
        spec,
        build_network(spec.network, read_weights(folder, WEIGHTS), device),
        load_classifier(folder / CLASSIFIER, device)[1] if (folder / CLASSIFIER).is_dir() else None,
        load_model(folder / WEAK, device) if (folder / WEAK).is_dir() else None,
    )


def stored_weights(folder: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Return (description, weights in float32) of a model folder, for one tensor after another to be copied.

    The values are read from the mapped files when they are used, so that the network is never in memory.

    Raises:
        ValueError: as for `load_model`.

    Examples:
        >>> stored_weights(Path("no-such-folder"))
        Traceback (most recent call last):
            ...
        ValueError: no-such-folder is not a model folder: model.json is missing
    """
    spec = _read_denoiser(folder)
    weights = {name: tensor.float() for name, tensor in read_weights(folder, WEIGHTS).items()}
    with NoFirstWeights():
        network = spec.network.build()
    _load(network, weights, assign=True)
    return spec, weights


def _read_denoiser(folder: Path) -> ModelSpec:
    spec = read_spec(folder)
    if spec.task != "denoiser":
        raise ValueError(f"{folder} holds a {spec.task}, which cannot sample: name a model that was trained to denoise")
    return spec


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> tuple[ModelSpec, NoisyClassifier]:
    """Return the classifier of noisy images of a model folder; its `log_prob` guides a denoiser.

    Raises:
        ValueError: the folder is not a model folder, its version or task differs, or the weights do not fit.
    """
    spec = read_spec(folder)
    if spec.task != "classifier":
        raise ValueError(f"{folder} holds a {spec.task}: train a classifier with task=classifier")
    if not isinstance(spec.network, UNetConfig):
        raise ValueError(f"{folder} holds a classifier on another network than a UNet")
    network, classes = spec.network, len(spec.classes)
    return spec, _loaded(lambda: make_classifier(network, classes), read_weights(folder, WEIGHTS), device)


def make_classifier(network: UNetConfig, classes: int) -> NoisyClassifier:
    """Return a new classifier of noisy images: of texts where the network's `text_dim` is their width, else of classes.

    Args:
        network: a UNet's shape, of which it is the way down.
        classes: their number.

    Examples:
        >>> shape = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> make_classifier(shape, classes=10)(torch.zeros(2, 3, 8, 8), torch.zeros(2)).shape
        torch.Size([2, 10])
    """
    classifier = NoisyClassifier(network, network.text_dim or classes, text=network.text_dim > 0)
    classifier.log_temperature.requires_grad_(network.text_dim > 0)
    return classifier


def read_spec(folder: Path) -> ModelSpec:
    """Return the description in a folder's `model.json`.

    Raises:
        ValueError: the file is missing, damaged or of another version.

    Examples:
        >>> read_spec(Path("no-such-folder"))
        Traceback (most recent call last):
            ...
        ValueError: no-such-folder is not a model folder: model.json is missing
    """
    try:
        return ModelSpec.from_json((folder / "model.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a model folder: model.json is missing") from error


def check_text_encoder(folder: Path) -> None:
    """Check that the text encoder in a folder is made of known modules only, before anything of it is loaded.

    `modules.json` names the class of each module, and a folder may bring code of its own for them.

    Raises:
        ValueError: the folder is damaged, or names another class.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     _ = (Path(folder) / "modules.json").write_text('[{"type": "stranger.Module", "path": ""}]')
        ...     check_text_encoder(Path(folder))
        Traceback (most recent call last):
            ...
        ValueError: ... names stranger.Module: a text encoder is made of ...
    """
    listed = folder / "modules.json"
    if not listed.is_file():  # a model of `transformers` alone, which runs no code from its folder
        return
    package, activation = "sentence_transformers.", "activation_function"
    try:
        entries = [(str(entry["type"]), str(entry["path"])) for entry in json.loads(listed.read_text())]
        foreign = [
            name for name, _ in entries if not name.startswith(package) or name.split(".")[-1] not in ENCODER_MODULES
        ]
        for path in [path for name, path in entries if name.endswith(".Dense") and name not in foreign]:
            settings = json.loads((folder / path / "config.json").read_text())
            named = str(settings.get(activation, "torch.nn."))  # what is imported by its name
            foreign += [] if named.startswith("torch.nn.") else [named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{listed} is damaged ({error!r}): copy the text encoder again") from error
    if foreign:
        known = ", ".join(ENCODER_MODULES)
        raise ValueError(f"{listed} names {', '.join(foreign)}: a text encoder is made of {package}*: {known}")


def build_network(
    config: NetworkConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> nn.Module:
    """Return the network with these weights, in evaluation mode.

    Raises:
        ValueError: the weights are those of another network.

    Examples:
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=None, layers_per_block=1)
        >>> network = build_network(config, config.build().state_dict())
        >>> network.training, any(parameter.requires_grad for parameter in network.parameters())
        (False, False)
    """
    return _loaded(config.build, weights, device)


def _loaded(build: Callable[[], N], weights: Mapping[str, Tensor], device: torch.device | str) -> N:
    """Return a network with these weights, in evaluation mode, which are in memory once."""
    with torch.device(device), NoFirstWeights():
        network = build()
    _load(network, weights)
    return network.eval().requires_grad_(False).to(device)


def _load(network: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    try:
        network.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the network that is described beside them: {error}") from error
