"""Configuration: Hydra composes `conf/`, pydantic validates it, and all other parts use one frozen `Config`."""

from pipelines.config.build import (
    learned_weight,
    network_config,
    noise_schedule,
    sampling,
    sampling_overrides,
    timestep_sampler,
    timesteps_of,
    training_objective,
)
from pipelines.config.compose import (
    changed_sampling,
    compose,
    conf_dir,
    from_dict,
    groups,
    override_settings,
    override_value,
    parse_overrides,
    quoted_override,
    read_config,
    suggest,
)
from pipelines.config.launch import AwsLaunch, KubeRayLaunch, RayLaunch
from pipelines.config.model_sections import (
    CANDIDATE,
    MODEL_NAME,
    MODEL_NAME_RULE,
    PREVIOUS,
    EvaluationConfig,
    RegistryConfig,
    ServingConfig,
)
from pipelines.config.schema import FORMER_DEFAULTS, Config, flatten
from pipelines.config.sections import NAME, ClusterConfig, DataConfig, OptimConfig, Seed
from pipelines.presentation.errors import ConfigError

__all__ = [
    "CANDIDATE",
    "FORMER_DEFAULTS",
    "MODEL_NAME",
    "MODEL_NAME_RULE",
    "NAME",
    "PREVIOUS",
    "AwsLaunch",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "KubeRayLaunch",
    "OptimConfig",
    "RayLaunch",
    "RegistryConfig",
    "Seed",
    "ServingConfig",
    "changed_sampling",
    "compose",
    "conf_dir",
    "flatten",
    "from_dict",
    "groups",
    "learned_weight",
    "network_config",
    "noise_schedule",
    "override_settings",
    "override_value",
    "parse_overrides",
    "quoted_override",
    "read_config",
    "sampling",
    "sampling_overrides",
    "suggest",
    "timestep_sampler",
    "timesteps_of",
    "training_objective",
]
