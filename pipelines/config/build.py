"""Conversion of a validated configuration to objects of `ddpm`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ddpm.consistency import ConsistencyTuning, refusal
from ddpm.generate import Sampling
from ddpm.guidance import GUIDANCE
from ddpm.image_size import as_setting, height_width
from ddpm.learned_weight import LearnedWeight, LearnedWeighting
from ddpm.models import NETWORKS, NetworkConfig
from ddpm.objectives import Objective
from ddpm.prediction import Arithmetic, Clipping
from ddpm.samplers import SAMPLERS
from ddpm.schedule import NoiseSchedule, make_schedule
from ddpm.settings import settings_of
from ddpm.timesteps import TIMESTEPS, TimestepSampler
from ddpm.weights import WEIGHTS
from pipelines.config.choices import FROM_DATA, chosen
from pipelines.config.schema import Config, ObjectiveConfig, ScheduleConfig
from pipelines.presentation.errors import ConfigError


def network_config(config: Config) -> NetworkConfig:
    """Return the network's configuration.

    Raises:
        ConfigError: widths, groups, heads and image size do not fit together, or the task needs another network.
    """
    model, data = config.model, config.data
    cls = NETWORKS[model.kind]
    own = {s.name: getattr(model, s.name) for s in settings_of(cls) if s.name not in FROM_DATA}
    try:
        network = cls(
            in_channels=data.channels,
            out_channels=data.channels * (2 if model.learned_variance else 1),
            num_classes=data.num_classes if model.class_conditional else 0,
            context_channels=data.channels if model.inpainting else 0,
            **own,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if any(side % network.downsampling for side in height_width(data.image_size)):
        each = "must be a multiple" if isinstance(data.image_size, int) else "must be multiples"
        raise ConfigError(
            f"data.image_size = {as_setting(data.image_size)} {each} of {network.downsampling}: "
            f"{network.downsampling_reason}; or use another size"
        )
    return network


def training_objective(config: Config) -> Objective | ConsistencyTuning:
    """Return the training objective: parameterization, loss and weights, or the settings of consistency tuning.

    Raises:
        ConfigError: a model of that parameterization and schedule cannot be tuned to a consistency model.
    """
    objective = config.objective
    if objective.loss == "consistency":
        if reason := refusal(objective.prediction, noise_schedule(config)):
            raise ConfigError(
                f"objective.loss = consistency with objective.prediction = {objective.prediction}: {reason}"
            )
        return chosen(objective, ConsistencyTuning, "consistency_")
    weight = chosen(objective, WEIGHTS[objective.weight], f"{objective.weight}_")
    return chosen(objective, Objective).replaced(weight=weight)


def timestep_sampler(config: Config) -> TimestepSampler:
    """Return the timestep sampler of a run, with an empty history."""
    return _timesteps(config.objective, config.schedule, config.batch_size, config.seed)


def timesteps_of(identity: Mapping[str, Any]) -> TimestepSampler | None:
    """Return the timestep sampler that a run began with, by its identity; None where it trained on no timesteps.

    Args:
        identity: `Config.identity()` of the run, which leaves out later fields that had their defaults.

    Raises:
        ConfigError: this release has no such settings.
    """
    sections: dict[str, dict[str, Any]] = {"objective": {}, "schedule": {}}
    for key, value in identity.items():
        section, _, field = key.partition(".")
        if section in sections:
            sections[section][field] = value
    try:
        objective = ObjectiveConfig.model_validate(sections["objective"])
        schedule = TypeAdapter(ScheduleConfig).validate_python(sections["schedule"])
    except ValidationError as error:
        raise ConfigError(f"the settings of an earlier release cannot be read: {error}") from error
    if objective.loss == "consistency":
        return None
    return _timesteps(objective, schedule, int(identity["batch_size"]), int(identity["seed"]))


def _timesteps(objective: ObjectiveConfig, schedule: ScheduleConfig, batch_size: int, seed: int) -> TimestepSampler:
    timesteps = chosen(objective, TIMESTEPS[objective.timesteps], f"{objective.timesteps}_")
    return timesteps.make(_noise_schedule(schedule), batch_size, seed)


def learned_weight(config: Config) -> LearnedWeight | None:
    """Return the initial learned weight of the loss; None where a run learns none."""
    if not config.objective.learned_weight:
        return None
    return chosen(config.objective, LearnedWeighting, "learned_weight_").make(noise_schedule(config), config.seed)


def sampling(config: Config) -> Sampling:
    """Return the sampling settings."""
    return Sampling(
        chosen(config.sampler, SAMPLERS[config.sampler.kind]),
        chosen(config.guidance, GUIDANCE[config.guidance.kind]),
        chosen(config.sampler, Clipping),
        chosen(config.sampler, Arithmetic),
    )


def sampling_overrides(settings: Sampling) -> list[str]:
    """Return sampler, guidance and clipping as command-line overrides, from which `sampling` restores the settings."""
    plain = settings.to_json()
    guidance = {setting.name for setting in settings_of(GUIDANCE[plain["guidance"]])}
    fields = [f"sampler={plain['kind']}", f"guidance.kind={plain['guidance']}"]
    for name, value in plain.items():
        if name not in ("kind", "guidance"):
            group = "guidance" if name in guidance else "sampler"
            fields.append(f"{group}.{name}={json.dumps(value)}".replace(" ", ""))
    return fields


def noise_schedule(config: Config) -> NoiseSchedule:
    """Return the noise schedule.

    Raises:
        ConfigError: a parameter is not valid for the kind of schedule.
    """
    return _noise_schedule(config.schedule)


def _noise_schedule(schedule: ScheduleConfig) -> NoiseSchedule:
    try:
        return make_schedule(**schedule.model_dump())
    except ValueError as error:
        raise ConfigError(f"schedule: {error}") from error
