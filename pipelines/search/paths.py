"""Access to fields of a plain (JSON) configuration by dotted path, such as `optim.lr` or `guidance.interval.1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config import ConfigError, suggest
from pipelines.search.parameters import Value


def get_value(plain: Any, path: str) -> Any:
    """Return the value at a path, or None where there is no such path."""
    for part in path.split("."):
        if isinstance(plain, list) and part.isdecimal() and int(part) < len(plain):
            plain = plain[int(part)]
        elif isinstance(plain, Mapping):
            plain = plain.get(part)
        else:
            return None
    return plain


def set_value(plain: Any, path: str, value: Value) -> None:
    """Set the value at a path, in place.

    Raises:
        ConfigError: a group on the path does not exist, or an index is out of range.
    """
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(plain, list) and part.isdecimal() and int(part) < len(plain):
            plain = plain[int(part)]
        elif isinstance(plain, dict) and isinstance(plain.get(part), dict | list):
            plain = plain[part]
        else:
            allowed = list(plain) if isinstance(plain, dict) else []
            raise ConfigError(f"{path}: there is no '{part}' here.{suggest(part, allowed)}")
    if isinstance(plain, list):
        if not last.isdecimal() or int(last) >= len(plain):
            raise ConfigError(f"{path}: write an index from 0 to {len(plain) - 1} for '{last}'")
        plain[int(last)] = value
    else:
        plain[last] = value
