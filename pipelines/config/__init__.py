"""Configuration: Hydra composes `conf/`, pydantic checks it, and one frozen `Config` goes to every other part."""

from pipelines.config.build import noise_schedule, training_objective, unet_config
from pipelines.config.compose import compose, conf_dir, from_dict, groups, read_config, suggest
from pipelines.config.schema import ClusterConfig, Config, ConfigError, DataConfig, OptimConfig, flatten

__all__ = [
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "OptimConfig",
    "compose",
    "conf_dir",
    "flatten",
    "from_dict",
    "groups",
    "noise_schedule",
    "read_config",
    "suggest",
    "training_objective",
    "unet_config",
]
