"""The services that a command names, before its plan exists."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config import Config, compose, override_settings, override_value

SERVICES = ("storage", "tracking", "cluster")
"""Groups of the configuration that name services, not the training."""


def services_config(overrides: Sequence[str]) -> Config:
    """Return a configuration with the services of some overrides; its other values are placeholders."""
    settings = {key: value for key, value in override_settings(overrides).items() if key.partition(".")[0] in SERVICES}
    some = ["data=folder", "data.num_classes=1", "model.channels=[32]", "model.attention=[false]"]
    given = [f"{key}={override_value(settings[key])}" for key in sorted(settings, key=lambda key: "." in key)]
    return compose([*some, *given])
