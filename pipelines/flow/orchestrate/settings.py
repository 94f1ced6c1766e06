"""Settings of the assets: experiments, schedule and retries, from a YAML file or the defaults here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from pipelines.presentation.errors import ConfigError

VARIABLE = "DDPM_ORCHESTRATE"
"""Environment variable with the path of the file."""


class OrchestrateSettings(BaseModel):
    """The settings of `definitions`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    partitions: dict[str, tuple[str, ...]] = Field(
        {name: (f"+experiment={name}",) for name in ("digits", "digits_inpainting", "digits_score")},
        min_length=1,
        description="partition -> Hydra overrides of its runs",
    )
    launch: tuple[str, ...] = Field(
        (), description="overrides launch.FIELD=VALUE of the RayJobs in which stages run; none to run them here"
    )
    cron: str = Field(
        "0 3 * * 1", description="times at which the schedule `retrain` checks every partition, as a cron expression"
    )
    timezone: str = Field("UTC", description="time zone of the schedule")
    look_every_s: PositiveInt = Field(60, description="seconds between checks of the sensor `new_data`")
    retries: NonNegativeInt = Field(
        2, description="retries of a stage that failed for reasons other than its configuration"
    )
    retry_delay_s: NonNegativeFloat = Field(
        30, description="seconds before the first retry; doubled for each further one"
    )

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> OrchestrateSettings:
        """Return the settings from the file named by the environment, or the defaults.

        Raises:
            ConfigError: the file cannot be read, or is wrong; names the field.
        """
        path = environ.get(VARIABLE)
        return cls.model_validate({}) if path is None else cls.read(Path(path))

    @classmethod
    def read(cls, path: Path) -> OrchestrateSettings:
        """Return the settings in a file.

        Raises:
            ConfigError: as `of`.
        """
        try:
            plain: Any = yaml.safe_load(path.read_text()) or {}
            if not isinstance(plain, dict):
                raise ConfigError(f"{path}: settings are a mapping from names to values, this is none")
            return cls.model_validate(plain)
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            allowed = ", ".join(cls.model_fields)
            raise ConfigError(f"{path}: {'; '.join(found)}. Allowed: {allowed}") from error
