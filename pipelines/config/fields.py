"""The definition of every configuration field: type, default, allowed values and meaning, as `ddpm config` shows them.

Everything is read from the pydantic models, which take a choice's fields from its settings class in `ddpm`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pydantic
import yaml

from pipelines.config.choices import VARIANTS
from pipelines.config.compose import conf_dir, groups, models_in
from pipelines.config.schema import Config

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
