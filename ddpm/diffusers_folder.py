"""To and from the folder format of diffusers: same network, same numbers. Nothing of diffusers is imported.

    model_index.json                            which pipeline, of which parts
    unet/config.json                            shape of the `UNet2DModel`
    unet/diffusion_pytorch_model.safetensors    its weights, named as ours are
    scheduler/scheduler_config.json             schedule, parameterization and clipping
    model.json                                  ours, beside them: what diffusers has no place for

`UNet2DModel` and `DDIMScheduler` read what `export_diffusers` writes. Their DDIM gives our `ddim`'s images where the
number of steps divides T (elsewhere the scheduler's step sizes do not match its own list of timesteps) and, where it
clips, with `use_clipped_model_output=True` (without, its eps no longer belongs to the clipped x_0). `DDIMPipeline`
passes no class labels: a conditional network is sampled by calling the two parts, with label `num_class_embeds - 1` for
the null condition.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm.gaussian import ReverseVariance
from ddpm.generate import SamplingSettings
from ddpm.interop import Model, ModelSpec, build_network, read_weights
from ddpm.models.unet import UNetConfig
from ddpm.prediction import Parameterization
from ddpm.schedule import make_schedule

LastRow = Literal["null", "class"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT_OF = "0.35.0"
"""The release of diffusers whose fields are written; later ones read them too."""

PREDICTION_TYPES: dict[Parameterization, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES: dict[str, ReverseVariance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
}
NO_BOUND = 1e6
"""`sample_max_value` of dynamic thresholding without an upper bound, which JSON could not spell."""

# What an absent field means: the defaults of UNet2DModel and of DDIMScheduler and DDPMScheduler.
UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "predict_epsilon": None,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
}

# Fields of which our UNet computes the default only.
UNET_FIXED = (
    *("center_input_sample", "time_embedding_type", "freq_shift", "flip_sin_to_cos", "mid_block_type"),
    *("mid_block_scale_factor", "downsample_padding", "downsample_type", "upsample_type", "act_fn", "norm_eps"),
    *("add_attention", "class_embed_type"),
)

# How older releases named the parameters of attention.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")


def export_diffusers(model: Model, folder: Path) -> None:
    """Write a model as a folder that diffusers' `DDIMPipeline.from_pretrained` reads.

    Guidance, sampler and number of steps are arguments of diffusers' calls; they are kept in `model.json` only.

    Args:
        model: unconditional or class-conditional. The null condition is the last row of the class embedding.
        folder: created where missing; files of the same names are replaced.

    Raises:
        ValueError: a model that diffusers' `UNet2DModel` with `DDIMScheduler` cannot express.
    """
    unet, scheduler = unet_fields(model.spec), scheduler_fields(model.spec)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    # Away first and back last: a folder that has it is whole.
    (folder / "model_index.json").unlink(missing_ok=True)
    weights = {name: w.detach().float().cpu().contiguous() for name, w in model.network.state_dict().items()}
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    _write(folder / "unet" / "config.json", "UNet2DModel", unet)
    _write(folder / "scheduler" / "scheduler_config.json", "DDIMScheduler", scheduler)
    (folder / "model.json").write_text(model.spec.to_json())
    parts = {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    _write(folder / "model_index.json", "DDIMPipeline", parts)


def import_diffusers(
    folder: Path,
    *,
    last_row: LastRow | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Read a folder of diffusers that holds a `UNet2DModel` with a `DDPMScheduler` or `DDIMScheduler`.

    With our `model.json` in it the model is exactly the one that was exported, and the keywords say nothing new.
    Without, they say what diffusers' files leave open. How a scheduler spaces its steps is not taken over: our samplers
    go from T to 0.

    Args:
        folder: of `save_pretrained`, or of `export_diffusers`.
        last_row: what the last row of the class embedding is. "null": the null condition that the network was trained
            with. "class": a class like the others; a row of zeros is added as null condition, so that without a label
            the network sees the time only. It was never trained on that: guidance towards a class is then a guess.
        classes: names of the classes; default "0", "1", ...
        image_size: height and width in pixels, where `sample_size` is null.
        device: of the network.

    Raises:
        ValueError: files missing, damaged or in disagreement; a field that our UNet cannot express; a keyword that is
            needed and missing, or given and not needed.
    """
    index = _read(folder / "model_index.json")
    with _saying(folder / "model_index.json"):
        _check_parts(index)
    parts = Parts.read(folder)
    if (folder / "model.json").exists():
        spec = ModelSpec.from_json((folder / "model.json").read_text())
        _check_unneeded("model.json says it already", last_row=last_row, classes=classes, image_size=image_size)
        _check_same(folder, parts, spec)
        return Model(spec, build_network(spec.network, parts.weights, device))

    with _saying(parts.unet_path):
        network, weights = unet_config(parts.unet), parts.weights
        rows = {**UNET_DEFAULTS, **parts.unet}["num_class_embeds"]
        if rows is None:
            _check_unneeded("the network has no classes (num_class_embeds)", last_row=last_row, classes=classes)
        else:
            network, weights = _with_null_row(network, weights, _whole("num_class_embeds", rows), last_row)
        names = _class_names(classes, network.num_classes)
        size = _image_size(parts.unet, image_size, network.downsampling)
    with _saying(parts.scheduler_path):
        schedule, prediction, sampling = scheduler_settings(parts.scheduler)
    lineage = {"format": "diffusers", "pipeline": index.get("_class_name")}
    spec = ModelSpec(network, schedule, prediction, size, names, sampling, lineage)
    return Model(spec, build_network(network, weights, device))


@dataclass(frozen=True)
class Parts:
    """The files of a folder, read and not yet understood."""

    unet_path: Path
    unet: dict[str, Any]
    scheduler_path: Path
    scheduler: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Parts:
        """Read them.

        Raises:
            ValueError: one is missing or damaged.
        """
        # Like diffusers: a part without a folder of its own lies beside model_index.json.
        unet, scheduler = (folder / n if (folder / n).is_dir() else folder for n in ("unet", "scheduler"))
        unet_path, scheduler_path = unet / "config.json", scheduler / "scheduler_config.json"
        return cls(unet_path, _read(unet_path), scheduler_path, _read(scheduler_path), _read_weights(unet))


# The network.


def unet_fields(spec: ModelSpec) -> dict[str, Any]:
    """`unet/config.json` of a model.

    Raises:
        ValueError: a network that `UNet2DModel` cannot express.
    """
    config = spec.network
    for option, value in (("text_dim", config.text_dim), ("context_channels", config.context_channels)):
        if value:
            raise ValueError(f"{option} = {value}: UNet2DModel knows class labels only, export needs {option} = 0")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"out_channels = {config.out_channels}: DDIMPipeline knows no learned variance, export needs as many as "
            f"in_channels = {config.in_channels}"
        )
    return {
        **{name: UNET_DEFAULTS[name] for name in UNET_FIXED},
        "sample_size": spec.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "dropout": config.dropout,
        "attention_head_dim": config.head_dim,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }


def unet_config(given: Mapping[str, Any]) -> UNetConfig:
    """The network that a `UNet2DModel`'s fields describe, without its classes.

    Raises:
        ValueError: a field that our UNet cannot express.
    """
    _check_class(given, "UNet2DModel")
    unknown = sorted(name for name in given.keys() - UNET_DEFAULTS.keys() if not name.startswith("_"))
    if unknown:
        raise ValueError(f"fields that UNet2DModel does not have: {unknown}; remove them if they change nothing")
    fields = {**UNET_DEFAULTS, **given}
    differing = [_refusal(name, fields[name], UNET_DEFAULTS[name]) for name in UNET_FIXED]
    if any(differing):
        raise ValueError("; ".join(filter(None, differing)))
    channels = tuple(_whole("block_out_channels", width) for width in fields["block_out_channels"])
    groups = _whole("norm_num_groups", fields["norm_num_groups"])
    shift = _check_allowed("resnet_time_scale_shift", fields["resnet_time_scale_shift"], "default", "scale_shift")
    _check_allowed("time_embedding_dim", fields["time_embedding_dim"], None, 4 * channels[0])
    _check_allowed("attn_norm_num_groups", fields["attn_norm_num_groups"], None, *[groups] * (shift == "default"))
    if fields["out_channels"] == 2 * fields["in_channels"]:
        raise ValueError(f"out_channels = {fields['out_channels']}, twice in_channels: learned variance is not read")
    _check_allowed("out_channels", fields["out_channels"], fields["in_channels"])
    attention = _attention(fields["down_block_types"], fields["up_block_types"])
    return UNetConfig(
        in_channels=_whole("in_channels", fields["in_channels"]),
        out_channels=_whole("out_channels", fields["out_channels"]),
        channels=channels,
        layers_per_block=_whole("layers_per_block", fields["layers_per_block"]),
        attention=attention,
        head_dim=_head_dim(fields["attention_head_dim"], channels, attention),
        norm_groups=groups,
        scale_shift=shift == "scale_shift",
        dropout=_number("dropout", fields["dropout"]),
    )


def _attention(down: Sequence[str], up: Sequence[str]) -> tuple[bool, ...]:
    """For each level, finest first, whether it has attention: on the way up it must be as on the way down."""
    for block in down:
        _check_allowed("down_block_types", block, "DownBlock2D", "AttnDownBlock2D")
    attention = tuple(block == "AttnDownBlock2D" for block in down)
    mirrored = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    _check_allowed("up_block_types", list(up), mirrored)
    return attention


def _head_dim(given: int | None, channels: tuple[int, ...], attention: tuple[bool, ...]) -> int:
    """Channels per attention head; null is one head per block, as wide as the block."""
    if given is not None:
        return _whole("attention_head_dim", given)
    widths = {channels[-1], *(width for width, attends in zip(channels, attention, strict=False) if attends)}
    if len(widths) > 1:
        raise ValueError(
            f"attention_head_dim = null with attention at widths {sorted(widths)}: heads of several sizes; "
            "allowed: a number, or null where all blocks with attention and the last level have one width"
        )
    return widths.pop()


def _with_null_row(
    network: UNetConfig, weights: dict[str, Tensor], rows: int, last_row: LastRow | None
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The network with its classes, and a null row where it has none."""
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
    if name in weights:  # else build_network says what is missing
        weights = {**weights, name: torch.cat([weights[name], torch.zeros_like(weights[name][:1])])}
    return replace(network, num_classes=rows), weights


def _class_names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(map(str, range(count))) if classes is None else tuple(classes)
    if len(names) != count:
        raise ValueError(f"{len(names)} names in classes for {count} classes")
    return names


def _image_size(given: Mapping[str, Any], image_size: int | None, multiple: int) -> int:
    size = given.get("sample_size")
    if size is None:
        if image_size is None:
            raise ValueError("sample_size is null: say image_size, in pixels")
        size = image_size
    else:
        _check_unneeded(f"sample_size = {size} says it already", image_size=image_size)
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if height != width or _whole("sample_size", height) % multiple:
        raise ValueError(f"sample_size = {size}: height and width must be equal and a multiple of {multiple}")
    return height


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights as float32, by our names."""
    if not (folder / WEIGHTS).exists():
        others = sorted(p.name for p in folder.glob("diffusion_pytorch_model*"))
        raise ValueError(
            f"{folder}: {WEIGHTS} is missing"
            + (f"; {', '.join(others)} cannot be read: save it again with diffusers' save_pretrained" if others else "")
        )
    return {
        OLD_NAME.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.{m[3]}", name): w.float()
        for name, w in read_weights(folder / WEIGHTS).items()
    }


# The schedule.


def scheduler_fields(spec: ModelSpec) -> dict[str, Any]:
    """`scheduler/scheduler_config.json` of a model, with its betas written out: exact for every schedule.

    Raises:
        ValueError: a parameterization that diffusers does not have.
    """
    if spec.prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction = {spec.prediction!r} has no counterpart in diffusers; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    schedule = make_schedule(**spec.schedule)
    zero_snr = bool(schedule.alphas_cumprod[-1] == 0)
    _check_end(zero_snr, spec.prediction)
    settings = spec.sampling
    return {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": PREDICTION_TYPES[spec.prediction],
        "clip_sample": settings.clip is not None,
        "clip_sample_range": 1.0 if settings.clip is None else settings.clip,
        "thresholding": settings.threshold is not None,
        "dynamic_thresholding_ratio": 0.995 if settings.threshold is None else settings.threshold,
        "sample_max_value": NO_BOUND,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        # Betas that end at 1 are rescaled to themselves; schedulers that would divide by alpha_T learn of it by this.
        "rescale_betas_zero_snr": zero_snr,
    }


def scheduler_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], Parameterization, SamplingSettings]:
    """(keyword arguments of `make_schedule`, parameterization, settings of sampling) of a scheduler's fields.

    Raises:
        ValueError: a field that we cannot express.
    """
    _check_class(given, "DDIMScheduler", "DDPMScheduler")
    fields = {**SCHEDULER_DEFAULTS, **given}
    _check_allowed("variance_type", fields["variance_type"], *VARIANCE_TYPES)
    _check_allowed("prediction_type", fields["prediction_type"], *PREDICTION_TYPES.values())
    _check_allowed("predict_epsilon", fields["predict_epsilon"], None, fields["prediction_type"] == "epsilon")
    prediction = {name: kind for kind, name in PREDICTION_TYPES.items()}[fields["prediction_type"]]
    schedule = _schedule(fields)
    table = make_schedule(**schedule)
    _check_end(bool(table.alphas_cumprod[-1] == 0), prediction)
    clip, threshold = _clipping(fields)
    if given.get("_class_name") == "DDPMScheduler":
        variance = VARIANCE_TYPES[fields["variance_type"]]
        sampling = SamplingSettings(
            kind="ancestral", steps=table.num_steps, variance=variance, clip=clip, threshold=threshold
        )
    else:
        sampling = SamplingSettings(steps=min(50, table.num_steps), clip=clip, threshold=threshold)
    return schedule, prediction, sampling


def _schedule(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `make_schedule`; families that we do not have become their betas, in float64."""
    steps, betas = _whole("num_train_timesteps", fields["num_train_timesteps"]), fields["trained_betas"]
    zero_snr = {"zero_terminal_snr": True} if fields["rescale_betas_zero_snr"] else {}
    if betas is not None:
        if len(betas) != steps:
            raise ValueError(f"trained_betas has {len(betas)} values, num_train_timesteps is {steps}: must be as many")
        return {"kind": "betas", "betas": [_number("trained_betas", beta) for beta in betas], **zero_snr}
    start, end = _number("beta_start", fields["beta_start"]), _number("beta_end", fields["beta_end"])
    family = fields["beta_schedule"]
    if family == "linear":
        scale = steps / 1000  # ours are scaled by 1000 / T, diffusers' are not
        return {"kind": family, "num_steps": steps, "beta_start": start * scale, "beta_end": end * scale, **zero_snr}
    if family == "squaredcos_cap_v2":
        return {"kind": "cosine", "num_steps": steps, **zero_snr}
    if family == "scaled_linear":
        ramp = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
        return {"kind": "betas", "betas": ramp.tolist(), **zero_snr}
    allowed = "linear, scaled_linear, squaredcos_cap_v2; any other as trained_betas"
    raise ValueError(f"beta_schedule = {family!r} cannot be expressed, allowed: {allowed}")


def _clipping(fields: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(clip, threshold) of `SamplingSettings`."""
    clip = _number("clip_sample_range", fields["clip_sample_range"]) if fields["clip_sample"] else None
    if not fields["thresholding"]:
        return clip, None
    bound = _number("sample_max_value", fields["sample_max_value"])
    if bound == 1:  # thresholds between 1 and 1
        return 1.0, None
    if bound < NO_BOUND:
        raise ValueError(
            f"sample_max_value = {bound} bounds dynamic thresholding; allowed: 1 (clipping), {NO_BOUND:g} or more (no "
            "bound), or thresholding = false"
        )
    return clip, _number("dynamic_thresholding_ratio", fields["dynamic_thresholding_ratio"])


def _check_end(zero_snr: bool, prediction: Parameterization) -> None:
    if zero_snr and prediction == "eps":
        raise ValueError("prediction of eps with zero terminal SNR has no x_0 at t = T: allowed with it are v and x0")


# Files and fields.


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    """Errors inside name this file; a TypeError is a value of a kind that its field cannot have."""
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


def _write(path: Path, class_name: str, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"_class_name": class_name, "_diffusers_version": FORMAT_OF, **fields}, indent=2) + "\n")


def _check_parts(index: Mapping[str, Any]) -> None:
    """Refuse pipelines of other parts than unet and scheduler: latent and text-conditioned ones."""
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list) and len(part) == 2 and part[1]}
    surplus = {name: part for name, part in parts.items() if name not in ("unet", "scheduler")}
    if surplus or len(parts) != 2:
        raise ValueError(f"a pipeline of {parts}; allowed: unet (UNet2DModel) and scheduler, pixels without text")


def _check_same(folder: Path, parts: Parts, spec: ModelSpec) -> None:
    """Refuse a folder that was changed beside its model.json."""
    for path, written, given in (
        (parts.unet_path, unet_fields(spec), parts.unet),
        (parts.scheduler_path, scheduler_fields(spec), parts.scheduler),
    ):
        differing = sorted(name for name, value in written.items() if name not in given or given[name] != value)
        if differing:
            raise ValueError(
                f"{path} and {folder / 'model.json'} disagree about {differing}: restore one of them, or remove "
                "model.json to import what diffusers sees"
            )


def _check_class(given: Mapping[str, Any], *allowed: str) -> None:
    _check_allowed("_class_name", given.get("_class_name", allowed[0]), *allowed)


def _refusal(name: str, value: Any, *allowed: Any) -> str | None:
    # True == 1: a flag where a number belongs is a damaged file.
    if any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        return None
    return f"{name} = {json.dumps(value)} cannot be expressed, allowed: {', '.join(map(json.dumps, allowed))}"


def _check_allowed(name: str, value: Any, *allowed: Any) -> Any:
    refusal = _refusal(name, value, *allowed)
    if refusal:
        raise ValueError(refusal)
    return value


def _check_unneeded(reason: str, **keywords: Any) -> None:
    given = [name for name, value in keywords.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} given, but {reason}: leave it out")


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {json.dumps(value)} must be a whole number >= 1")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {json.dumps(value)} must be a number")
    return float(value)
