"""Import and export of diffusers folders: same network, same outputs. diffusers itself is not imported.

    model_index.json                            the pipeline's class and parts
    unet/config.json                            shape of the `UNet2DModel`
    unet/diffusion_pytorch_model.safetensors    its weights, named as ours are; large ones in several files
    scheduler/scheduler_config.json             schedule, parameterization and clipping
    model.json                                  our own file, for what diffusers has no fields for

`UNet2DModel` and `DDIMScheduler` read what `export_diffusers` writes. Their DDIM gives the same images as our `ddim` if
the number of steps divides T (otherwise the scheduler's step sizes do not match its own timesteps) and, with clipping,
if `use_clipped_model_output=True` (otherwise its eps does not belong to the clipped x_0). A model of flow matching goes
with `FlowMatchEulerDiscreteScheduler`, which gives the same images as `ddim` without clipping where it is given the
levels, `set_timesteps(sigmas=[1 - i / n for i in range(n)])`; its own n levels end at 1 / 1000. `DDIMPipeline` passes
no class labels: to sample a conditional network, call UNet and scheduler yourself; the null condition is label
`num_class_embeds - 1`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddpm.diffusers.fields import scheduler_fields, scheduler_settings, unet_config, unet_fields, whole
from ddpm.image_size import ImageSize, height_width, parse_image_size
from ddpm.model import Model, ModelSpec, build_network
from ddpm.models.unet import UNetConfig
from ddpm.tensor_files import LARGEST_FILE, files_of, read_weights, save_weights

LastRow = Literal["null", "class"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT_OF = "0.35.0"
"""The diffusers release whose format is written; later releases read it too."""

# Names of the attention parameters in older diffusers releases.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")


def export_diffusers(model: Model, folder: Path, largest: int = LARGEST_FILE) -> None:
    """Write a model as a folder that diffusers' `DDIMPipeline.from_pretrained` reads, or `DDPMPipeline`'s with flow.

    Guidance, sampler and number of steps are call arguments in diffusers, so only `model.json` holds them.

    Args:
        model: unconditional or class-conditional. The null condition is the last row of the class embedding.
        folder: created if missing; files of the same names are replaced.
        largest: bytes of weights above which they are in several files with an index.

    Raises:
        ValueError: diffusers' `UNet2DModel` with its scheduler cannot express the model.

    Examples:
        >>> import tempfile
        >>> from ddpm.models import UNetConfig
        >>> config = UNetConfig(channels=(8,), attention=(False,), norm_groups=4, head_dim=8, layers_per_block=1)
        >>> model = Model(ModelSpec(config, {"kind": "linear"}, "v", image_size=8), config.build())  # untrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_diffusers(model, Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ...     import_diffusers(Path(folder)).spec.network == config
        ['model.json', 'model_index.json', 'scheduler', 'unet']
        True
    """
    unet, scheduler = unet_fields(model.spec), scheduler_fields(model.spec)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    # Removed first and written last: a folder that has this file is complete.
    (folder / "model_index.json").unlink(missing_ok=True)
    save_weights(folder / "unet", WEIGHTS, model.network.state_dict(), largest, {"format": "pt"})
    _write(folder / "unet" / "config.json", "UNet2DModel", unet)
    of_scheduler = scheduler["_class_name"]
    _write(folder / "scheduler" / "scheduler_config.json", of_scheduler, scheduler)
    (folder / "model.json").write_text(model.spec.to_json())
    parts = {"scheduler": ["diffusers", of_scheduler], "unet": ["diffusers", "UNet2DModel"]}
    # DDIMPipeline steps with arguments that only its own scheduler has.
    _write(folder / "model_index.json", "DDIMPipeline" if of_scheduler == "DDIMScheduler" else "DDPMPipeline", parts)


def import_diffusers(
    folder: Path,
    *,
    last_row: LastRow | None = None,
    classes: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Return the model in a diffusers folder: `UNet2DModel` with DDIM's, DDPM's or the flow-matching scheduler.

    If the folder has our `model.json`, the model is exactly the exported one and the keyword arguments are not needed.
    Otherwise they give what diffusers' files leave open. The scheduler's step spacing is ignored: our samplers go from
    T to 0.

    Args:
        folder: written by `save_pretrained` or `export_diffusers`.
        last_row: meaning of the last row of the class embedding. "null": the null condition that the network was
            trained with. "class": an ordinary class; a row of zeros is added as null condition, so that without a label
            the network sees only the time. The network was not trained on that, so class guidance is unreliable.
        classes: names of the classes; default "0", "1", ...
        image_size: height and width in pixels, one number for square images; needed if `sample_size` is null.
        device: device of the network.

    Raises:
        ValueError: files are missing, damaged or contradict each other; our UNet does not support the value of a field;
            a keyword argument is needed but missing, or given but not needed.
    """
    index = _read(folder / "model_index.json")
    with _saying(folder / "model_index.json"):
        _check_parts(index)
    # As in diffusers, the files of a part without its own folder are beside model_index.json.
    of_unet, of_scheduler = (folder / n if (folder / n).is_dir() else folder for n in ("unet", "scheduler"))
    unet_path, scheduler_path = of_unet / "config.json", of_scheduler / "scheduler_config.json"
    unet, scheduler, weights = _read(unet_path), _read(scheduler_path), _read_weights(of_unet)
    if (folder / "model.json").exists():
        spec = ModelSpec.from_json((folder / "model.json").read_text())
        _check_unneeded("model.json says it already", last_row=last_row, classes=classes, image_size=image_size)
        _check_same(unet_path, unet, unet_fields(spec))
        _check_same(scheduler_path, scheduler, scheduler_fields(spec))
        return Model(spec, build_network(spec.network, weights, device))

    with _saying(unet_path):
        network, rows = unet_config(unet), unet.get("num_class_embeds")
        if rows is None:
            _check_unneeded("the network has no classes (num_class_embeds)", last_row=last_row, classes=classes)
        else:
            network, weights = _with_null_row(network, weights, whole("num_class_embeds", rows), last_row)
        names = _class_names(classes, network.num_classes)
        size = _image_size(unet, image_size, network.downsampling)
    with _saying(scheduler_path):
        schedule, prediction, sampling = scheduler_settings(scheduler)
    lineage = {"format": "diffusers", "pipeline": index.get("_class_name")}
    spec = ModelSpec(network, schedule, prediction, size, names, sampling, lineage)
    return Model(spec, build_network(network, weights, device))


# Classes and size.


def _with_null_row(
    network: UNetConfig, weights: dict[str, Tensor], rows: int, last_row: LastRow | None
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Return the network with its classes, with a null row added if it has none."""
    if last_row not in get_args(LastRow):
        raise ValueError(
            f"num_class_embeds = {rows}, and last_row = {last_row!r}: say last_row='null' if the network was trained "
            "with the last row as its null condition, or 'class' if that row is a class like the others"
        )
    if last_row == "null":
        if rows < 2:
            raise ValueError(f"num_class_embeds = {rows} with last_row='null' leaves no class: use last_row='class'")
        return replace(network, num_classes=rows - 1), weights
    name = "class_embedding.weight"
    if name in weights:  # otherwise build_network reports what is missing
        weights = {**weights, name: torch.cat([weights[name], torch.zeros_like(weights[name][:1])])}
    return replace(network, num_classes=rows), weights


def _class_names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(map(str, range(count))) if classes is None else tuple(classes)
    if len(names) != count:
        raise ValueError(f"{len(names)} names in classes for {count} classes")
    return names


def _image_size(given: Mapping[str, Any], image_size: ImageSize | None, multiple: int) -> ImageSize:
    size = given.get("sample_size")
    if size is None:
        if image_size is None:
            raise ValueError("sample_size is null: say image_size, in pixels")
        size = image_size
    else:
        _check_unneeded(f"sample_size = {size} says it already", image_size=image_size)
    found = parse_image_size(size)
    if any(side % multiple for side in height_width(found)):
        raise ValueError(f"sample_size = {size}: height and width must be multiples of {multiple}")
    return found


# Files.


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    """Add the file's name to errors raised inside; a TypeError means that a field has a value of the wrong type."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: not a folder of diffusers' save_pretrained") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return plain


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights as float32, with our parameter names."""
    if not files_of(WEIGHTS, [path.name for path in folder.iterdir()]):
        others = sorted(p.name for p in folder.glob("diffusion_pytorch_model*"))
        raise ValueError(
            f"{folder}: {WEIGHTS} is missing"
            + (f"; {', '.join(others)} cannot be read: save it again with diffusers' save_pretrained" if others else "")
        )
    return {
        OLD_NAME.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.{m[3]}", name): w.float()
        for name, w in read_weights(folder, WEIGHTS).items()
    }


def _write(path: Path, class_name: str, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"_class_name": class_name, "_diffusers_version": FORMAT_OF, **fields}, indent=2) + "\n")


def _check_parts(index: Mapping[str, Any]) -> None:
    """Raise for pipelines with parts other than unet and scheduler, such as latent and text-conditioned ones."""
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list) and len(part) == 2 and part[1]}
    surplus = {name: part for name, part in parts.items() if name not in ("unet", "scheduler")}
    if surplus or len(parts) != 2:
        raise ValueError(f"a pipeline of {parts}; allowed: unet (UNet2DModel) and scheduler, pixels without text")


def _check_same(path: Path, given: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise if a file was changed after it was exported together with model.json."""
    differing = sorted(name for name, value in written.items() if name not in given or given[name] != value)
    if differing:
        raise ValueError(
            f"{path} and model.json disagree about {differing}: restore one of them, or remove model.json to import "
            "what diffusers sees"
        )


def _check_unneeded(reason: str, **keywords: Any) -> None:
    given = [name for name, value in keywords.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} given, but {reason}: leave it out")
