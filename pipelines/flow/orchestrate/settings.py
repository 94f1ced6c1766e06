"""For which experiments there are assets, and when they run by themselves: a YAML file, or the defaults here."""

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
    cron: str = Field("0 3 * * 1", description="when the schedule `retrain` looks at every partition")
    timezone: str = Field("UTC", description="of the schedule")
    look_every_s: PositiveInt = Field(60, description="seconds between two looks of the sensor `new_data`")
    retries: NonNegativeInt = Field(2, description="of a stage that failed for no fault of its configuration")
    retry_delay_s: NonNegativeFloat = Field(30, description="before the first one; each waits twice as long")

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> OrchestrateSettings:
        """Return the settings in the file that the environment names; the defaults where it names none.

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
