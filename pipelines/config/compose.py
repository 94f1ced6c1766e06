"""Composition of `conf/` and Hydra overrides into a validated `Config`, with errors that say how to fix them."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import pydantic

from ddpm.generate import Sampling
from pipelines.config.build import network_config, noise_schedule, sampling, sampling_overrides, training_objective
from pipelines.config.schema import Config, flatten
from pipelines.presentation.errors import ConfigError


def conf_dir() -> Path:
    """Return the folder of the shipped configuration, in a checkout or an installed wheel."""
    for candidate in (Path(__file__).parents[2] / "conf", Path(__file__).parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError("the shipped conf/ folder is missing: reinstall ddpm-pipelines")


def groups() -> dict[str, list[str]]:
    """Return config group -> its choices, without `conf/search/`, whose studies are not part of a run."""
    return _groups(conf_dir())


@cache
def _groups(folder: Path) -> dict[str, list[str]]:
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "search")
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in folders if any(p.glob("*.yaml"))}


def compose(overrides: Sequence[str] = ()) -> Config:
    """Return the `Config` of `conf/` with Hydra overrides such as `+experiment=digits` or `optim.lr=1e-3`.

    Raises:
        ConfigError: an override or the resulting configuration is not valid.
    """
    return from_dict(copy.deepcopy(_composed(conf_dir(), tuple(overrides))))


@lru_cache(maxsize=256)
def _composed(folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration that Hydra composes from a folder and overrides.

    Overrides of fields are applied after those that choose files, as in Hydra, so that Hydra has to read and merge the
    files of a choice only once.

    Raises:
        ConfigError: an override is not valid, or a field has no value.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fields, others = fields_and_others(overrides)
    try:
        composed = copy.deepcopy(_chosen(folder, tuple(others)))
        for field in fields:
            OmegaConf.update(composed, field.key_or_group, field.value(), merge=True, force_add=True)
        unresolved = typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))
        missing = sorted(key for key, value in flatten(unresolved).items() if value == "???")
        if missing:
            raise ConfigError("\n".join(f"{key} has no value: set it with {key}=VALUE" for key in missing))
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(plain, dict)
    return typing.cast("dict[str, Any]", plain)


@lru_cache(maxsize=256)
def _chosen(folder: Path, lines: tuple[str, ...]) -> Any:
    """Return Hydra's configuration of a folder and the overrides that choose its files; takes tens of milliseconds."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return hydra_compose("config", list(lines))


def fields_and_others(overrides: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Return the parsed overrides that set a field, and the other overrides, which Hydra itself has to read.

    A field that the shipped YAML does not set is not in Hydra's struct, so an override may add it too.

    Raises:
        ConfigError: an override cannot be parsed, or names neither a field nor a group.
    """
    from hydra.core.override_parser.types import OverrideType

    fields, others = [], []
    for override in parse_overrides(overrides):
        line = override.input_line or ""
        _check_override(override.key_or_group, override.value(), line)
        sets = override.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD) and override.package is None
        if sets and override.key_or_group not in groups() and not override.is_sweep_override():
            fields.append(override)
        else:
            others.append(line)
    return fields, others


def quoted_override(key: str, value: str) -> str:
    """Return an override whose value may hold any character."""
    return f"{key}={_quoted(value)}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def override_value(value: Any) -> str:
    """Return a value in Hydra's override syntax."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{','.join(override_value(part) for part in value)}]"
        case dict():
            return f"{{{','.join(f'{key}:{override_value(part)}' for key, part in value.items())}}}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_]\w*", text) and text.lower() not in ("null", "true", "false", "none", "nan", "inf"):
        return text
    return _quoted(text)


def override_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return field or group -> the value that Hydra overrides set.

    Raises:
        ConfigError: an override cannot be parsed, or names no field.
    """
    found = {}
    for override in parse_overrides(overrides):
        key, value = str(override.key_or_group), override.value()
        _check_override(key, value, override.input_line or "")
        found[key] = value
    return found


def changed_sampling(own: Sampling, overrides: Sequence[str]) -> Sampling:
    """Return a model's own sampling settings with overrides applied.

    An override either sets a field, as in `sampler.steps=20`, and the model's other settings are kept; or it chooses
    another sampler or guidance with its defaults, as in `sampler=heun` or `guidance=none`.

    Raises:
        ConfigError: an override or the resulting configuration is not valid.
    """
    given = override_settings(overrides)
    of = {section: [key for key in given if key.partition(".")[0] == section] for section in ("sampler", "guidance")}
    if not any(of.values()):
        return own
    kept = [section for section, keys in of.items() if not {section, f"{section}.kind"} & set(keys)]
    lines = [line for line in sampling_overrides(own) if re.split(r"[.=]", line)[0] in kept]
    return sampling(compose([*lines, *overrides]))


def parse_overrides(overrides: Sequence[str]) -> Sequence[Any]:
    """Parse overrides with Hydra's grammar.

    Raises:
        ConfigError: an override cannot be parsed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides {' '.join(overrides)!r}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ConfigError(f"an override has a number with too many digits: {error}") from error
    except RecursionError as error:
        raise ConfigError("an override has too many nested brackets") from error


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a JSON or YAML file, such as the `config.json` of a run, with overrides by path.

    Addresses of a local stack are dropped, because the file may come from another machine.

    Raises:
        ConfigError: the file does not exist, or the configuration is not valid.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise ConfigError(
                f"{path}: a configuration is a mapping from names to values; this file holds something else"
            )
        if isinstance(given.get("tracking"), DictConfig):
            given.tracking.pop("grid_rows", None)  # of an earlier release: images per class in a grid
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        line = getattr(getattr(error, "problem_mark", None), "line", None)  # YAML's own message starts with the context
        said = str(error).splitlines()[0] if line is None else f"{getattr(error, 'problem', error)}, line {line + 1}"
        raise ConfigError(f"{path}: {said}") from error
    return from_dict(typing.cast("dict[str, Any]", plain)).portable()


def from_dict(plain: Mapping[str, Any]) -> Config:
    """Return a validated `Config` from nested plain values.

    Raises:
        ConfigError: the configuration is not valid; the message names every wrong field.
    """
    try:
        config = Config.model_validate(plain)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error
    noise_schedule(config)
    network_config(config)
    training_objective(config)
    return config


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return the text " Did you mean 'x'?" for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _check_override(key: str, value: Any, line: str) -> None:
    choices = groups()
    if key in choices:
        names = value if isinstance(value, list) else [value]
        if not line.startswith("~") and any(name is None or isinstance(name, bool | int | float) for name in names):
            raise ConfigError(f"{line}: {key} is chosen by name. Allowed: {', '.join(choices[key])}")
        if isinstance(value, str) and value not in choices[key]:
            raise ConfigError(
                f"{line}: no '{value}' in {key}. Allowed: {', '.join(choices[key])}.{suggest(value, choices[key])}"
            )
        return
    check_key(key, line)


def check_key(key: str, line: str) -> None:
    """Raise unless the configuration has a section or a field of this name, in some kind of its section.

    Args:
        key: path such as "optim.lr".
        line: what the user wrote, for the message.

    Raises:
        ConfigError: there is none; the message lists the allowed names and suggests the closest one.
    """
    choices = groups()
    allowed: set[str] = set(Config.model_fields) | set(choices)
    types_here: list[type[pydantic.BaseModel]] = [Config]
    path = ""
    for part in key.split("."):
        fields = {name: f.annotation for model in types_here for name, f in model.model_fields.items()}
        if not types_here:
            raise ConfigError(f"{line}: {path.rstrip('.')} is a field and has no fields of its own")
        if part not in fields:
            where = f"in {path.rstrip('.')}" if path else "at the top"
            allowed = set(fields) | (set() if path else set(choices))
            raise ConfigError(
                f"{line}: there is no '{part}' {where}. Allowed: {', '.join(sorted(allowed))}.{suggest(part, allowed)}"
            )
        types_here = models_in(fields[part])
        path += f"{part}."


def models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Return the pydantic models in a field's annotation."""
    if typing.get_origin(annotation) is Annotated:
        return models_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [model for arg in typing.get_args(annotation) for model in models_in(arg)]
    if typing.get_origin(annotation) is tuple:
        return models_in(typing.get_args(annotation)[0])
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) else []


def _explain(error: Any) -> str:
    # pydantic puts the discriminator's value ("cosine") into the location: it selects the model, not a field.
    models: list[type[pydantic.BaseModel]] = [Config]
    parts, allowed = [], list(Config.model_fields)
    for part in map(str, error["loc"]):
        variants = [
            m for m in models if "kind" in m.model_fields and part in typing.get_args(m.model_fields["kind"].annotation)
        ]
        if variants:
            models = variants
        elif part.isdigit():
            parts.append(part)  # of a list
        else:
            parts.append(part)
            allowed = sorted({field for model in models for field in model.model_fields})
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [m for f in fields for m in models_in(f.annotation)]
    path = ".".join(parts)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{path}: no such field here. Allowed: {', '.join(allowed)}.{suggest(parts[-1], allowed)}"
    if error["type"] == "union_tag_invalid":
        tag, kinds = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{path}.kind: there is no '{tag}'. Allowed: {', '.join(kinds)}.{suggest(tag, kinds)}"
    if error["type"] == "missing":
        remedy = "give it one" if any(part.isdigit() for part in parts) else f"set it with {path}=VALUE"
        return f"{path} has no value: {remedy}"
    got = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{path}: {message}{got}" if path else message
