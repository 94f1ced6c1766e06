"""Conversion between our settings and the fields of diffusers' `UNet2DModel` and schedulers.

`unet_fields` and `scheduler_fields` convert ours to theirs, `unet_config` and `scheduler_settings` theirs to ours. A
setting that the other side does not have raises an error with the field's name, its value and the allowed values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ddpm.gaussian import ReverseVariance
from ddpm.generate import Sampling
from ddpm.model import ModelSpec
from ddpm.models.unet import UNetConfig
from ddpm.prediction import FLOW_TIME, Parameterization
from ddpm.samplers import Ancestral
from ddpm.schedule import make_schedule

PREDICTION_TYPES: dict[Parameterization, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES: dict[str, ReverseVariance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
}
NO_BOUND = 1e6
"""`sample_max_value` for dynamic thresholding without an upper bound; JSON has no infinity."""

UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
"""Fields of `UNet2DModel` for which our UNet supports only the default value."""

# Values of absent fields: the defaults of UNet2DModel, and of DDIMScheduler and DDPMScheduler.
UNET_DEFAULTS: dict[str, Any] = {
    **UNET_FIXED,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
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
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FLOW_FIXED: dict[str, Any] = {
    "num_train_timesteps": int(FLOW_TIME),
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""Fields of the flow-matching scheduler for which we support one value: with others times or levels would be others."""


# The network.


def unet_fields(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a model's `unet/config.json`.

    Raises:
        ValueError: `UNet2DModel` cannot express the network.

    Examples:
        >>> fields = unet_fields(ModelSpec(UNetConfig(num_classes=10), {"kind": "linear"}, "eps", image_size=32))
        >>> fields["sample_size"], fields["down_block_types"][:2], fields["num_class_embeds"]  # with the null class
        (32, ['DownBlock2D', 'AttnDownBlock2D'], 11)
    """
    config = spec.network
    if not isinstance(config, UNetConfig):
        raise ValueError(f"a {type(config).__name__} is no UNet2DModel, which is what diffusers' folder holds")
    for option, value in (("text_dim", config.text_dim), ("context_channels", config.context_channels)):
        if value:
            raise ValueError(f"{option} = {value}: UNet2DModel knows class labels only, export needs {option} = 0")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"out_channels = {config.out_channels}: DDIMPipeline knows no learned variance, export needs as many as "
            f"in_channels = {config.in_channels}"
        )
    return {
        **UNET_FIXED,
        "sample_size": spec.image_size if isinstance(spec.image_size, int) else list(spec.image_size),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention],
        "up_block_types": _up_block_types(config.attention),
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "downsample_padding": config.downsample_padding,
        "dropout": config.dropout,
        "attention_head_dim": config.head_dim,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }


def unet_config(given: Mapping[str, Any]) -> UNetConfig:
    """Return the network described by the fields of a `UNet2DModel`, without its classes.

    Raises:
        ValueError: our UNet does not support the value of a field.

    Examples:
        >>> network = UNetConfig(channels=(64, 128), attention=(False, True))
        >>> unet_config(unet_fields(ModelSpec(network, {"kind": "linear"}, "eps", image_size=32))) == network
        True
    """
    check_allowed("_class_name", given.get("_class_name", "UNet2DModel"), "UNet2DModel")
    unknown = sorted(name for name in given.keys() - UNET_DEFAULTS.keys() if not name.startswith("_"))
    if unknown:
        raise ValueError(f"fields that UNet2DModel does not have: {unknown}; remove them if they change nothing")
    fields = {**UNET_DEFAULTS, **given}
    refusals = [_refusal(name, fields[name], default) for name, default in UNET_FIXED.items()]
    if any(refusals):
        raise ValueError("; ".join(filter(None, refusals)))
    channels = tuple(whole("block_out_channels", width) for width in fields["block_out_channels"])
    groups, head_dim = whole("norm_num_groups", fields["norm_num_groups"]), fields["attention_head_dim"]
    shift = check_allowed("resnet_time_scale_shift", fields["resnet_time_scale_shift"], "default", "scale_shift")
    check_allowed("time_embedding_dim", fields["time_embedding_dim"], None, 4 * channels[0])
    check_allowed("attn_norm_num_groups", fields["attn_norm_num_groups"], None, *[groups] * (shift == "default"))
    if fields["out_channels"] == 2 * fields["in_channels"]:
        raise ValueError(f"out_channels = {fields['out_channels']}, twice in_channels: learned variance is not read")
    check_allowed("out_channels", fields["out_channels"], fields["in_channels"])
    return UNetConfig(
        in_channels=whole("in_channels", fields["in_channels"]),
        out_channels=whole("out_channels", fields["out_channels"]),
        channels=channels,
        layers_per_block=whole("layers_per_block", fields["layers_per_block"]),
        attention=_attention(fields["down_block_types"], fields["up_block_types"]),
        head_dim=None if head_dim is None else whole("attention_head_dim", head_dim),
        norm_groups=groups,
        scale_shift=shift == "scale_shift",
        dropout=number("dropout", fields["dropout"]),
        flip_sin_to_cos=check_allowed("flip_sin_to_cos", fields["flip_sin_to_cos"], True, False),
        freq_shift=check_allowed("freq_shift", fields["freq_shift"], 0, 1),
        norm_eps=number("norm_eps", fields["norm_eps"]),
        downsample_padding=check_allowed("downsample_padding", fields["downsample_padding"], 0, 1),
    )


def _attention(down: Sequence[str], up: Sequence[str]) -> tuple[bool, ...]:
    """Return whether each level, finest first, has attention; down and up blocks must agree."""
    for block in down:
        check_allowed("down_block_types", block, "DownBlock2D", "AttnDownBlock2D")
    attention = tuple(block == "AttnDownBlock2D" for block in down)
    check_allowed("up_block_types", list(up), _up_block_types(attention))
    return attention


def _up_block_types(attention: Sequence[bool]) -> list[str]:
    return ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]


# The schedule.


def scheduler_fields(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a model's `scheduler/scheduler_config.json`, with the class as `_class_name`.

    They have all betas, so that any schedule is exact; those of flow matching have its shift.

    Raises:
        ValueError: diffusers does not have the parameterization, or not with this schedule.

    Examples:
        >>> fields = scheduler_fields(ModelSpec(UNetConfig(), {"kind": "linear"}, "v", image_size=32))
        >>> fields["prediction_type"], round(fields["trained_betas"][-1], 6)
        ('v_prediction', 0.02)
        >>> scheduler_fields(ModelSpec(UNetConfig(), {"kind": "flow", "shift": 3.0}, "flow", image_size=32))["shift"]
        3.0
    """
    if spec.prediction == "flow":
        return {"_class_name": FLOW_SCHEDULER, **FLOW_FIXED, "shift": _shift(spec.schedule)}
    if spec.prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction = {spec.prediction!r} has no counterpart in diffusers; allowed: "
            f"{', '.join(PREDICTION_TYPES)}, flow"
        )
    schedule = make_schedule(**spec.schedule)
    zero_snr = bool(schedule.alphas_cumprod[-1] == 0)
    _check_end(zero_snr, spec.prediction)
    clipping = spec.sampling.clipping
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": PREDICTION_TYPES[spec.prediction],
        "clip_sample": clipping.clip is not None,
        "clip_sample_range": 1.0 if clipping.clip is None else clipping.clip,
        "thresholding": clipping.threshold is not None,
        "dynamic_thresholding_ratio": 0.995 if clipping.threshold is None else clipping.threshold,
        "sample_max_value": NO_BOUND,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        # Rescaling does not change betas that end at 1, but it tells the scheduler not to divide by alpha_T = 0.
        "rescale_betas_zero_snr": zero_snr,
    }


def scheduler_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], Parameterization, Sampling]:
    """Return (arguments of `make_schedule`, parameterization, sampling settings) from a scheduler's fields.

    Raises:
        ValueError: we do not support the value of a field.

    Examples:
        >>> schedule, prediction, sampling = scheduler_settings({"beta_schedule": "squaredcos_cap_v2"})
        >>> schedule, prediction, sampling.sampler.steps
        ({'kind': 'cosine', 'num_steps': 1000}, 'eps', 50)
    """
    named = given.get("_class_name", "DDIMScheduler")
    name = check_allowed("_class_name", named, "DDIMScheduler", "DDPMScheduler", FLOW_SCHEDULER)
    if name == FLOW_SCHEDULER:
        for field, value in FLOW_FIXED.items():
            check_allowed(field, given.get(field, value), value)
        shift = number("shift", given.get("shift", 1.0))
        return {"kind": "flow", "num_steps": int(FLOW_TIME), "shift": shift}, "flow", Sampling.of(steps=50, clip=None)
    fields = {**SCHEDULER_DEFAULTS, **given}
    check_allowed("variance_type", fields["variance_type"], *VARIANCE_TYPES)
    check_allowed("prediction_type", fields["prediction_type"], *PREDICTION_TYPES.values())
    check_allowed("predict_epsilon", fields["predict_epsilon"], None, fields["prediction_type"] == "epsilon")
    prediction = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}[fields["prediction_type"]]
    schedule = _schedule(fields)
    table = make_schedule(**schedule)
    _check_end(bool(table.alphas_cumprod[-1] == 0), prediction)
    clip, threshold = _clipping(fields)
    sampling = Sampling.of(steps=min(50, table.num_steps), clip=clip, threshold=threshold)
    if name == "DDPMScheduler":
        variance = VARIANCE_TYPES[fields["variance_type"]]
        sampling = replace(sampling, sampler=Ancestral(steps=table.num_steps, variance=variance))
    return schedule, prediction, sampling


def _shift(schedule: Mapping[str, Any]) -> float:
    """Return the shift of a flow schedule, that of its log-SNR included."""
    steps = schedule.get("num_steps", 1000)
    if schedule["kind"] != "flow" or steps != FLOW_TIME:
        raise ValueError(
            f"prediction = 'flow' on the schedule {schedule['kind']!r} of {steps} steps has no counterpart in "
            f"diffusers: {FLOW_SCHEDULER} has the schedule 'flow' of {FLOW_TIME:g} steps"
        )
    return float(schedule.get("shift", 1.0) * math.exp(-schedule.get("log_snr_shift", 0.0) / 2))


def _schedule(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_schedule`; a family that we do not have is given by its betas, in float64."""
    steps, betas = whole("num_train_timesteps", fields["num_train_timesteps"]), fields["trained_betas"]
    zero_snr = {"zero_terminal_snr": True} if fields["rescale_betas_zero_snr"] else {}
    if betas is not None:
        if len(betas) != steps:
            raise ValueError(f"trained_betas has {len(betas)} values, num_train_timesteps is {steps}: must be as many")
        return {"kind": "betas", "betas": [number("trained_betas", beta) for beta in betas], **zero_snr}
    start, end = number("beta_start", fields["beta_start"]), number("beta_end", fields["beta_end"])
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
    clip = number("clip_sample_range", fields["clip_sample_range"]) if fields["clip_sample"] else None
    if not fields["thresholding"]:
        return clip, None
    bound = number("sample_max_value", fields["sample_max_value"])
    if bound == 1:  # the threshold lies between 1 and 1: plain clipping
        return 1.0, None
    if bound < NO_BOUND:
        raise ValueError(
            f"sample_max_value = {bound} bounds dynamic thresholding; allowed: 1 (clipping), {NO_BOUND:g} or more (no "
            "bound), or thresholding = false"
        )
    return clip, number("dynamic_thresholding_ratio", fields["dynamic_thresholding_ratio"])


def _check_end(zero_snr: bool, prediction: Parameterization) -> None:
    if zero_snr and prediction == "eps":
        raise ValueError("prediction of eps with zero terminal SNR has no x_0 at t = T: allowed with it are v and x0")


# Checks of single fields.


def _refusal(name: str, value: Any, *allowed: Any) -> str | None:
    # In Python True == 1, but a bool in place of a number means that the file is damaged.
    if any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        return None
    return f"{name} = {json.dumps(value)} cannot be expressed, allowed: {', '.join(map(json.dumps, allowed))}"


def check_allowed(name: str, value: Any, *allowed: Any) -> Any:
    """Return the element of `allowed` that equals the value, for example 1 for 1.0 in JSON.

    Examples:
        >>> check_allowed("freq_shift", 1.0, 0, 1)
        1
        >>> check_allowed("freq_shift", 2, 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: freq_shift = 2 cannot be expressed, allowed: 0, 1
    """
    refusal = _refusal(name, value, *allowed)
    if refusal:
        raise ValueError(refusal)
    return allowed[allowed.index(value)]


def whole(name: str, value: Any) -> int:
    """Return the value if it is an integer >= 1; otherwise raise.

    Examples:
        >>> whole("in_channels", 3)
        3
        >>> whole("in_channels", 2.5)
        Traceback (most recent call last):
            ...
        ValueError: in_channels = 2.5 must be a whole number >= 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {json.dumps(value)} must be a whole number >= 1")
    return value


def number(name: str, value: Any) -> float:
    """Return the value if it is a finite number; otherwise raise.

    Examples:
        >>> number("dropout", 0)
        0.0
        >>> number("dropout", "a lot")
        Traceback (most recent call last):
            ...
        ValueError: dropout = "a lot" must be a number
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {json.dumps(value)} must be a number")
    return float(value)
