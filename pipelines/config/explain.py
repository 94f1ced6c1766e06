"""Explanation of a composed configuration: the meaning of every value, and the file or override that set it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config.compose import check_key, compose, conf_dir, fields_and_others, groups, parse_overrides
from pipelines.config.fields import ConfigField, config_fields, left_out
from pipelines.config.schema import flatten

DEFAULT = "default"
OVERRIDE = "override"


@dataclass(frozen=True)
class Explained:
    """A field and its value in a composed configuration.

    Attributes:
        field: definition of the field.
        value: its value in JSON form; None where it is not used.
        origin: source of the value: "default" for the field's own default, a file such as
        "conf/experiment/digits.yaml", or "override" for the command line.
        unused: reason why the configuration does not have the field, such as "sampler.kind is heun"; else empty.
    """

    field: ConfigField
    value: Any
    origin: str
    unused: str = ""


def explain(overrides: Sequence[str] = (), key: str = "") -> list[Explained]:
    """Return the fields of a composed configuration, explained, in the order of the schema.

    Args:
        overrides: Hydra overrides.
        key: section or field to explain; empty for the whole configuration.

    Raises:
        ConfigError: there is no such key, or the configuration is not valid.
    """
    if key:
        check_key(key, key)
    values = compose(overrides).model_dump(mode="json")
    flat, origin = flatten(values), origins(overrides)
    found = []
    for field in config_fields():
        if key and key != field.key and not field.key.startswith(f"{key}."):
            continue
        section = field.key.rpartition(".")[0]
        chosen = values[section] if section else values
        if chosen is None:  # a section that is absent, such as `launch`
            if key:
                found.append(Explained(field, field.default, "", f"{section} is null"))
            elif section not in {each.field.key for each in found}:
                found.append(Explained(left_out(section), None, origin.get(section, DEFAULT)))
            continue
        kind = chosen.get("kind") if section else None
        if not field.kinds or kind in field.kinds:
            found.append(Explained(field, flat[field.key], origin.get(field.key, DEFAULT)))
        elif key == field.key:
            found.append(Explained(field, None, "", f"{section}.kind is {kind}"))
    used = [each for each in found if not each.unused]
    return used or found


def origins(overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return key -> what sets it, a file of `conf/` or "override"; keys at their defaults are left out.

    Raises:
        ConfigError: an override is not valid.
    """
    found: dict[str, str] = {}
    for path, package in _files(overrides):
        for key in flatten(_plain(path)):
            found[f"{package}.{key}" if package else key] = f"conf/{path}.yaml"
    for override in parse_overrides(overrides):
        key = str(override.key_or_group)
        if override.is_delete():
            found = {name: origin for name, origin in found.items() if name != key and not name.startswith(f"{key}.")}
        elif key not in groups() or not isinstance(override.value(), str):
            found |= dict.fromkeys(flatten({key: override.value()}), OVERRIDE)
    return found


def _files(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the composed files in order, as (path below `conf/`, key under which their content is placed)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode

    from pipelines.presentation.errors import ConfigError

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            loader = GlobalHydra.instance().config_loader()
            composed = loader.compute_defaults_list("config", fields_and_others(overrides)[1], RunMode.RUN)
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    for each in composed.defaults:
        if each.config_path is not None and (conf_dir() / f"{each.config_path}.yaml").is_file():
            yield each.config_path, each.package or ""


def _plain(path: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{path}.yaml"), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "defaults"}
