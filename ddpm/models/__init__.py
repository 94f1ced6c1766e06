"""Networks: one a file, as a configuration that builds it."""

from ddpm.models.base import NetworkConfig
from ddpm.models.unet import UNetConfig
from ddpm.registry import Registry

NETWORKS: Registry[type[NetworkConfig]] = Registry("network", "ddpm.networks", {"unet": UNetConfig})

__all__ = ["NETWORKS", "NetworkConfig", "UNetConfig"]
