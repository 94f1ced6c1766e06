"""The configuration explained, as `ddpm config` shows it: what each field is and means, and what set its value.

Definitions are read from the pydantic models, which take a choice's fields from its settings class in `ddpm`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pydantic
import yaml

from pipelines.config.choices import VARIANTS
from pipelines.config.compose import check_key, compose, conf_dir, fields_and_others, groups, models_in, parse_overrides
from pipelines.config.schema import Config, flatten

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "boolean",
    "null": "null",
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class ConfigField:
    """One field of the configuration.

    Attributes:
        key: path of the field, such as "optim.lr".
        type: type of the values in words.
        allowed: allowed values in words; empty where the type says everything.
        default: default value in JSON form; None where `required`.
        required: whether a file or an override has to set the field, because it has no default.
        meaning: one or more sentences for users.
        kinds: kinds of the section that have the field; empty where all have it.
    """

    key: str
    type: str
    allowed: str
    default: Any
    required: bool
    meaning: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigChoice:
    """One file of a group of `conf/`.

    Attributes:
        override: override that chooses it, such as "schedule=cosine".
        meaning: comment at the top of the file, or the docstring of its kind; may be empty.
    """

    override: str
    meaning: str


def sections() -> dict[str, str]:
    """Return every section of the configuration with its meaning; the section of the fields at the top is ""."""
    found = {"": "Name and length of the run, and the size of a training step."}
    for name, field in Config.model_fields.items():
        models = models_in(field.annotation)
        if models:
            found[name] = field.description or _doc(models[0])
    return found


@cache
def config_fields() -> tuple[ConfigField, ...]:
    """Return every field of every section, in the order of the schema.

    A key appears more than once where kinds of a section define the field differently.
    """
    found = [field for field in _fields_of(Config, "") if field.key not in sections()]
    for section in sections():
        kinds = kinds_of(section)
        if kinds:
            found += _merged([field for kind, model in kinds.items() for field in _fields_of(model, section, kind)])
        elif section:
            (model,) = models_in(Config.model_fields[section].annotation)
            found += _fields_of(model, section)
    return tuple(found)


def kinds_of(section: str) -> Mapping[str, type[pydantic.BaseModel]]:
    """Return the kinds of a section with their models; empty for a section of one kind."""
    if section in VARIANTS or not section:
        return VARIANTS.get(section, {})
    models = models_in(Config.model_fields[section].annotation)
    return {model.model_fields["kind"].default: model for model in models} if len(models) > 1 else {}


def left_out(section: str) -> ConfigField:
    """Return an optional section as the field that stands for it where it is absent."""
    return ConfigField(section, "null", ", ".join(kinds_of(section)), None, False, _sentence(sections()[section]))


def kind_meanings(section: str) -> dict[str, str]:
    """Return kind -> first paragraph of its docstring; empty for a section without kinds."""
    return {kind: _doc(model) for kind, model in kinds_of(section).items()} if section in sections() else {}


def choices(group: str) -> list[ConfigChoice]:
    """Return the files of a group of `conf/`; the override of an experiment has a +, because it adds to the
    defaults."""
    found = []
    for name in groups().get(group, []):
        path = conf_dir() / group / f"{name}.yaml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        head = [_comment(line) for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
        kind = (yaml.safe_load(path.read_text()) or {}).get("kind", "")
        meaning = " ".join(head) or kind_meanings(group).get(kind, "")
        found.append(ConfigChoice(f"{'+' * (group == 'experiment')}{group}={name}", meaning))
    return found


def _comment(line: str) -> str:
    """Return a line of a comment; an indented command becomes inline code."""
    text = line.removeprefix("#")
    return f"`{text.strip()}`." if text.startswith("    ") else text.strip()


def _doc(model: type[pydantic.BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").partition("\n\n")[0].split())


def _fields_of(model: type[pydantic.BaseModel], section: str, kind: str = "") -> list[ConfigField]:
    schema = model.model_json_schema()
    found = []
    for name, plain in schema["properties"].items():
        required = name in schema.get("required", ())
        type_, allowed = in_words(plain)
        meaning = _sentence(plain.get("description", ""))
        key = f"{section}.{name}" if section else name
        found.append(ConfigField(key, type_, allowed, plain.get("default"), required, meaning, (kind,) if kind else ()))
    return found


def _merged(fields: Sequence[ConfigField]) -> list[ConfigField]:
    """Return the fields of several kinds, merging equal ones; `kind` itself becomes one field that allows every
    kind."""
    merged: dict[ConfigField, list[str]] = {}
    all_kinds = list(dict.fromkeys(kind for field in fields for kind in field.kinds))
    for field in fields:
        plain = dataclasses.replace(field, kinds=(), default=_frozen(field.default))
        if field.key.endswith(".kind"):
            plain = dataclasses.replace(plain, default=None, allowed=", ".join(all_kinds), required=True)
        merged.setdefault(plain, []).extend(field.kinds)
    found = []
    for plain, kinds in merged.items():
        own: tuple[str, ...] = () if kinds == all_kinds else tuple(kinds)
        found.append(dataclasses.replace(plain, default=_thawed(plain.default), kinds=own))
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def _sentence(text: str) -> str:
    if not text:
        return ""
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def in_words(schema: Mapping[str, Any]) -> tuple[str, str]:
    """Return (type, allowed values) of a JSON schema in words, such as ("number or null", "> 0")."""
    if "anyOf" in schema:
        parts = [in_words(part) for part in schema["anyOf"]]
        allowed = list(dict.fromkeys(allowed for _, allowed in parts if allowed))
        return " or ".join(dict.fromkeys(type_ for type_, _ in parts)), "; ".join(allowed)
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        kind = "whole number" if all(isinstance(value, int) for value in values) else "text"
        return kind, ", ".join(map(str, values))
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        each, bounds = in_words(items[0])
        number = f"{len(items)} " if "prefixItems" in schema else ""
        return f"list of {number}{each}s", f"each {bounds}" if bounds else ""
    if "$ref" in schema or "type" not in schema:
        return "section", ""
    if schema["type"] == "boolean":
        return "boolean", "true, false"
    if "pattern" in schema:
        return _TYPES[schema["type"]], f"must match {schema['pattern']}"
    return _TYPES[schema["type"]], " and ".join(f"{sign} {schema[k]:g}" for k, sign in _BOUNDS.items() if k in schema)


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
