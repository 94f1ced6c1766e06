"""Settings of an algorithm as a frozen dataclass that defines the default, range and meaning of each field.

Configuration files, the command line and the documentation use these definitions:

    @dataclass(frozen=True)
    class DDIM(Settings):
        steps: int = setting(50, "network evaluations", ge=1)
        eta: float = setting(0.0, "share of the posterior's noise that a step adds", ge=0, le=1)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar

T = TypeVar("T")
_MEANING, _BOUNDS, _REFERENCE = "meaning", "bounds", "reference"
_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
_COMPARE = {
    "gt": (lambda value, bound: value > bound, ">"),
    "ge": (lambda value, bound: value >= bound, ">="),
    "lt": (lambda value, bound: value < bound, "<"),
    "le": (lambda value, bound: value <= bound, "<="),
}


def setting(
    default: T,
    meaning: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    reference: bool = False,
) -> T:
    """Return a dataclass field for `Settings`.

    Args:
        default: default value.
        meaning: description for users in one line, with the unit.
        gt, ge, lt, le: bounds on the value, or on each element of a tuple; a value of None is always allowed.
        reference: whether the value is a MODEL reference to another network, which the caller has to load.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Blur(Settings):
        ...     width: float = setting(1.0, "standard deviation in pixels", gt=0)
        >>> Blur(width=2).width
        2.0
        >>> Blur(width=0.0)
        Traceback (most recent call last):
            ...
        ValueError: width must be > 0, got 0.0
    """
    bounds = {name: bound for name, bound in (("gt", gt), ("ge", ge), ("lt", lt), ("le", le)) if bound is not None}
    metadata = {_MEANING: meaning, _BOUNDS: bounds, _REFERENCE: reference}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """The definition of one settings field.

    Attributes:
        name: name of the field.
        type: resolved type of its values.
        default: default value.
        meaning: description for users in one line.
        bounds: "gt", "ge", "lt" or "le" -> bound.
        reference: whether the value is a MODEL reference to another network.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    bounds: Mapping[str, float]
    reference: bool

    @property
    def fractional(self) -> bool:
        """Whether the values, or the elements of tuples, are floats."""
        parts = {part for kind in self._kinds for part in (typing.get_args(kind) or (kind,))}
        return float in parts and int not in parts

    @property
    def several(self) -> bool:
        """Whether a value may be a tuple."""
        return any(typing.get_origin(kind) is tuple for kind in self._kinds)

    def check(self, value: Any) -> None:
        """Check a value; a list counts as a tuple.

        Raises:
            ValueError: the value has the wrong type or is out of range; the message has the name and the allowed
                values.
        """
        value = tuple(value) if isinstance(value, list) else value
        if not _is_of(self.type, value):
            raise ValueError(f"{self.name} must be {_in_words(self.type)}, got {value!r}")
        allowed = list(_allowed(self.type))
        if allowed and value not in allowed:
            raise ValueError(f"unknown {self.name} {value!r}; allowed: {', '.join(map(str, allowed))}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, numbers.Real) and not math.isfinite(part):
                raise ValueError(f"{self.name} must be finite, got {value}")
            for name, bound in self.bounds.items():
                holds, _ = _COMPARE[name]
                if part is not None and not holds(part, bound):
                    raise ValueError(f"{self.name} must be {_range(self.bounds)}, got {value}")

    @property
    def _kinds(self) -> tuple[Any, ...]:
        union = typing.get_origin(self.type) in (typing.Union, types.UnionType)
        return typing.get_args(self.type) if union else (self.type,)


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are made by `setting`; values are checked at construction.

    Raises:
        ValueError: a value is out of range; the message has the field's name and the allowed values.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Blur(Settings):
        ...     width: float = setting(1.0, "standard deviation in pixels", gt=0)
        >>> Blur().replaced(width=2.5).width
        2.5
    """

    def __post_init__(self) -> None:
        for field in settings_of(type(self)):
            value = getattr(self, field.name)
            field.check(value)
            if field.fractional and value is not None:  # 2 and 2.0 are one value, and are stored as one text
                exact = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
                object.__setattr__(self, field.name, exact)

    def replaced(self, **values: Any) -> Self:
        """Return the settings with some fields changed."""
        return dataclasses.replace(self, **values)


def settings_of(cls: Any) -> tuple[Setting, ...]:
    """Return the fields of a settings class that were made by `setting`, in order.

    Examples:
        >>> from ddpm.schedule import Cosine
        >>> [(field.name, field.default, dict(field.bounds)) for field in settings_of(Cosine)]
        [('s', 0.008, {'ge': 0})]
    """
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> tuple[Setting, ...]:
    types = typing.get_type_hints(cls)
    return tuple(
        Setting(f.name, types[f.name], f.default, f.metadata[_MEANING], f.metadata[_BOUNDS], f.metadata[_REFERENCE])
        for f in dataclasses.fields(cls)
        if _MEANING in f.metadata
    )


def check_settings(what: str, kinds: Iterable[Any], values: Mapping[str, Any]) -> None:
    """Check settings of an algorithm whose kind is not known yet.

    Args:
        what: what the settings belong to, for the message.
        kinds: settings classes of the possible kinds.
        values: values by the names of their settings.

    Raises:
        ValueError: no kind has a setting of this name, or no kind that has it accepts the value.

    Examples:
        >>> from ddpm.schedule import Cosine, Linear
        >>> check_settings("schedules", [Cosine, Linear], {"s": 0.01, "beta_end": 0.03})
        >>> check_settings("schedules", [Cosine], {"tau": 1.0})
        Traceback (most recent call last):
            ...
        ValueError: tau: no setting of schedules; there are: s
    """
    there: dict[str, list[Setting]] = {}
    for field in (field for kind in kinds for field in settings_of(kind)):
        there.setdefault(field.name, []).append(field)
    if unknown := values.keys() - there.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no setting of {what}; there are: {', '.join(there)}")
    for name, value in values.items():
        problems = []
        for field in there[name]:
            try:
                field.check(value)
            except ValueError as error:
                problems.append(error)
        if len(problems) == len(there[name]):
            raise problems[0]


def _range(bounds: Mapping[str, float]) -> str:
    """Return bounds as text, such as ">= 1", or "in [0, 1)" for two bounds."""
    if len(bounds) == 2:
        low, high = (bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt")))
        return f"in {'[' if 'ge' in bounds else '('}{low:g}, {high:g}{']' if 'le' in bounds else ')'}"
    ((name, bound),) = bounds.items()
    return f"{_COMPARE[name][1]} {bound:g}"


def _is_of(annotation: Any, value: Any) -> bool:
    """Return whether a value is of a setting's type; whole numbers are numbers, and bools are neither."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(part, value) for part in parts)
    if origin is tuple:
        inner = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is_of, inner, value))
    if annotation in _NUMBERS:
        return isinstance(value, _NUMBERS[annotation]) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _in_words(annotation: Any) -> str:
    """Return a setting's type as text, such as "a number or None"."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is tuple:
        return f"{'numbers' if parts[-1] is Ellipsis else f'{len(parts)} numbers'} in a list"
    return _WORDS.get(annotation, str(annotation))


def _allowed(annotation: Any) -> Iterator[Any]:
    """Yield the values of a Literal type; nothing for other types."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
