"""Networks: one a file, as a configuration that builds it."""

from ddpm.choices import Choices
from ddpm.models.base import NetworkConfig
from ddpm.models.dit import DiTConfig
from ddpm.models.jit import JiTConfig
from ddpm.models.unet import UNetConfig

NETWORKS: Choices[type[NetworkConfig]] = Choices(
    "network", "ddpm.networks", {"unet": UNetConfig, "dit": DiTConfig, "jit": JiTConfig}
)
UNNAMED_NETWORK = "unet"
"""The kind of network in configurations and model folders that name none, as those of the first releases."""

__all__ = ["NETWORKS", "UNNAMED_NETWORK", "NetworkConfig", "UNetConfig"]
