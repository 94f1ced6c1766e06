"""From a checked configuration to the core's objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.config.schema import Config, ConfigError

if TYPE_CHECKING:
    from ddpm.models.unet import UNetConfig
    from ddpm.objectives import Objective
    from ddpm.schedule import NoiseSchedule


def unet_config(config: Config) -> UNetConfig:
    """The network's shape.

    Raises:
        ConfigError: widths, groups, heads or the image size do not fit together.
    """
    from ddpm.models.unet import UNetConfig

    shape = config.model.model_dump(exclude={"class_conditional", "inpainting", "learned_variance"})
    try:
        unet = UNetConfig(
            in_channels=config.data.channels,
            out_channels=config.data.channels * (2 if config.model.learned_variance else 1),
            num_classes=config.data.num_classes if config.model.class_conditional else 0,
            context_channels=config.data.channels if config.model.inpainting else 0,
            **shape,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if config.data.image_size % unet.downsampling:
        raise ConfigError(
            f"data.image_size = {config.data.image_size} must be a multiple of {unet.downsampling}: "
            f"model.channels has {len(unet.channels)} levels; use fewer levels or another size"
        )
    return unet


def training_objective(config: Config) -> Objective:
    """What the network predicts and how it is judged."""
    from ddpm.objectives import Objective

    return Objective(**config.objective.model_dump(exclude={"timesteps", "label_drop", "mask"}))


def noise_schedule(config: Config) -> NoiseSchedule:
    """The noise schedule.

    Raises:
        ConfigError: parameters that the family refuses.
    """
    from ddpm.schedule import make_schedule

    try:
        return make_schedule(**config.schedule.model_dump())
    except ValueError as error:
        raise ConfigError(f"schedule: {error}") from error
