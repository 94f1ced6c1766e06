"""Pydantic models of the choices of `ddpm`, which defines their fields, defaults, ranges and meanings.

A choice is a settings class in `ddpm` that is listed with its kind, or an entry point of another package; this module
names none of them. A section of the configuration has the name of a kind and the settings of that kind:
    sampler, schedule, model   one pydantic model per kind, which rejects the fields of other kinds;
    guidance                   one pydantic model with the fields of all kinds; only those of the kind may be changed;
    objective                  names a weight and a timestep sampler, with settings named KIND_FIELD (min_snr_gamma);
                               those of loss=consistency and of learned_weight=true are named likewise.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, Self, Union

import pydantic
from pydantic import BeforeValidator, Field, PositiveInt, create_model, model_validator

from ddpm.consistency import ConsistencyTuning
from ddpm.generate import OF_ALL_KINDS
from ddpm.guidance import GUIDANCE
from ddpm.learned_weight import LearnedWeighting
from ddpm.masks import MaskKind
from ddpm.models import NETWORKS, UNNAMED_NETWORK
from ddpm.objectives import Objective
from ddpm.samplers import SAMPLERS
from ddpm.schedule import SCHEDULES
from ddpm.settings import Setting, settings_of
from ddpm.timesteps import TIMESTEPS
from ddpm.weights import WEIGHTS

FROM_DATA = ("in_channels", "out_channels", "num_classes", "context_channels")
"""Settings of a network that are determined by the data and the task."""


class ConfigSection(pydantic.BaseModel):
    """A section of the configuration: frozen, and rejecting unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScheduleSection(ConfigSection):
    """The fields of every noise schedule."""

    num_steps: PositiveInt = Field(1000, description="number of noising steps, T")
    zero_terminal_snr: bool = Field(False, description="rescale the schedule so that x_T is pure noise")
    log_snr_shift: float = Field(0.0, description="constant added to the log-SNR at every step; negative: more noise")


class ModelSection(ConfigSection):
    """The fields of every network; its input and output channels and classes come from the data."""

    class_conditional: bool = Field(True, description="condition the network on the class of the image")
    inpainting: bool = Field(False, description="condition on the known pixels of a masked image")
    learned_variance: bool = Field(False, description="learn the reverse variance; needs objective.loss hybrid or vlb")


class GuidanceSection(ConfigSection):
    """Guidance in sampling: by the model's null condition, a classifier of noisy images, or a weaker model."""

    kind: str

    @model_validator(mode="after")
    def _of_the_kind(self) -> Self:
        own = {setting.name: setting for setting in settings_of(GUIDANCE[self.kind])}
        for name, setting in own.items():
            if setting.reference and getattr(self, name) is None:
                raise ValueError(f"guidance.kind = {self.kind} needs guidance.{name}=MODEL: {setting.meaning}")
        for name, setting in _GUIDANCE_SETTINGS.items():
            value = getattr(self, name)
            if name not in own and not setting.reference and value != setting.default:
                raise ValueError(
                    f"{name} = {value} has no effect with guidance.kind = {self.kind}: leave it at {setting.default}"
                )
        GUIDANCE[self.kind](**{name: getattr(self, name) for name in own})
        return self


class ObjectiveSection(ConfigSection):
    """The network's parameterization and training loss."""

    label_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="probability of the null condition (label and text), per sample"
    )
    learned_weight: bool = Field(
        False, description="divide the loss at each noise level by its mean, which is learned with the network (EDM2)"
    )
    noise_candidates: PositiveInt = Field(
        1,
        description="noise draws per image, of which the nearest is used (immiscible diffusion); 1: ordinary training",
    )
    mask: MaskKind = Field("any", description="shape of the hidden region in inpainting training")


def _field(setting: Setting) -> Any:
    """Return (type, field) of a setting, as `pydantic.create_model` expects."""
    bounds: Any = setting.bounds
    limits = Field(**bounds) if bounds else None
    kind = setting.type
    if limits is not None:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple:
            kind = tuple[tuple(p if p is Ellipsis else Annotated[p, limits] for p in parts)]  # type: ignore[misc]
        elif origin in (Union, types.UnionType):
            kind = Union[tuple(p if p is type(None) else Annotated[p, limits] for p in parts)]  # noqa: UP007
        else:
            kind = Annotated[kind, limits]
    return kind, Field(setting.default, description=setting.meaning)


def _fields(settings: Iterable[Setting], prefix: str = "") -> dict[str, Any]:
    return {prefix + setting.name: _field(setting) for setting in settings}


def _variants(
    choices: Mapping[str, Any],
    base: type[ConfigSection],
    suffix: str,
    *,
    beside: Any = (),
    without: Collection[str] = (),
) -> dict[str, type[ConfigSection]]:
    """Return one pydantic model per choice of a list, with the fields of `base` and the kind's settings.

    Args:
        suffix: suffix of the models' names.
        beside: additional settings for every kind.
        without: names of settings that are not part of the configuration.
    """
    found = {}
    for kind, cls in choices.items():
        own = [setting for setting in settings_of(cls) if setting.name not in without]

        def check(self: Any, cls: Any = cls, own: list[Setting] = own) -> Any:
            cls(**{setting.name: getattr(self, setting.name) for setting in own})  # checks what ranges cannot express
            return self

        validators: Any = {"_check": model_validator(mode="after")(check)}
        meaning = f"kind of {suffix.lower()}; its settings are the other fields of this section"
        fields: Any = {"kind": (Literal[kind], Field(kind, description=meaning))} | _fields([*own, *beside])
        name = f"{cls.__name__.removesuffix('Config')}{suffix}"
        found[kind] = create_model(
            name,
            __base__=base,
            __module__=__name__,
            __doc__=cls.__doc__,
            __validators__=validators,
            **fields,
        )
        globals()[name] = found[kind]  # pickle looks it up here
    return found


def _union(variants: Mapping[str, type[ConfigSection]], default: str | None = None) -> Any:
    kinds: Any = Union[tuple(variants.values())]  # noqa: UP007
    union: Any = Annotated[kinds, Field(discriminator="kind")]
    if default is None:
        return union
    return Annotated[
        union, BeforeValidator(lambda plain: {"kind": default, **plain} if isinstance(plain, Mapping) else plain)
    ]


def _one_of(choices: Mapping[str, Any]) -> Any:
    return Literal[tuple(choices)]


def _prefixed(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for kind, cls in choices.items() for k, v in _fields(settings_of(cls), f"{kind}_").items()}


_GUIDANCE_SETTINGS = {setting.name: setting for cls in GUIDANCE.values() for setting in settings_of(cls)}
_OF_ALL_SAMPLERS = [setting for cls in OF_ALL_KINDS for setting in settings_of(cls)]

VARIANTS: dict[str, dict[str, type[ConfigSection]]] = {
    "schedule": _variants(SCHEDULES, ScheduleSection, "Schedule"),
    "sampler": _variants(SAMPLERS, ConfigSection, "Sampler", beside=_OF_ALL_SAMPLERS),
    "model": _variants(NETWORKS, ModelSection, "Model", without=FROM_DATA),
}
"""Section -> kind -> pydantic model."""

ScheduleConfig = _union(VARIANTS["schedule"])
SamplerConfig = _union(VARIANTS["sampler"])
ModelConfig = _union(VARIANTS["model"], default=UNNAMED_NETWORK)
GuidanceConfig = create_model(
    "GuidanceConfig",
    __base__=GuidanceSection,
    __module__=__name__,
    __doc__=GuidanceSection.__doc__,
    **{"kind": (_one_of(GUIDANCE), Field("classifier_free", description="kind of guidance"))}
    | _fields(_GUIDANCE_SETTINGS.values()),
)
_OF_A_RUN: dict[str, dict[str, Any]] = {
    "prediction": {"type": Literal["eps", "x0", "v", "x0_skip", "flow"]},
    "loss": {
        "type": Literal["simple", "hybrid", "vlb", "consistency"],
        "meaning": "squared error; hybrid adds the bound, for a learned variance; vlb: bound only; consistency: tune "
        "the init_from model to draw in one or two evaluations",
    },
}
_LOSS = [dataclasses.replace(s, **_OF_A_RUN.get(s.name, {})) for s in settings_of(Objective)]
ObjectiveConfig = create_model(
    "ObjectiveConfig",
    __base__=ObjectiveSection,
    __module__=__name__,
    __doc__=ObjectiveSection.__doc__,
    **_fields(_LOSS)
    | {
        "weight": (_one_of(WEIGHTS), Field("uniform", description="weight of the squared error at each timestep")),
        "timesteps": (_one_of(TIMESTEPS), Field("uniform", description="sampler of the timesteps of a batch")),
    }
    | _prefixed(WEIGHTS)
    | _prefixed(TIMESTEPS)
    | _fields(settings_of(ConsistencyTuning), "consistency_")
    | _fields(settings_of(LearnedWeighting), "learned_weight_"),
)


def chosen(section: Any, cls: Any, prefix: str = "") -> Any:
    """Return an instance of a settings class with the values in a section, whose field names start with `prefix`."""
    return cls(**{setting.name: getattr(section, prefix + setting.name) for setting in settings_of(cls)})
