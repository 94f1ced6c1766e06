"""The parameters of a search space, and the configuration of a trial: that which all trials share, with its parameters.

A parameter is a path such as `optim.lr` or `guidance.interval.1` with a distribution. One with `when` exists only where
earlier ones, or the configuration itself, have the values that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from ddpm.guidance import GUIDANCE
from ddpm.settings import settings_of
from pipelines.config import Config, ConfigError, from_dict, suggest
from pipelines.config.choices import VARIANTS, ConfigSection

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Value = bool | int | float | str | None
Params = Mapping[str, Value]
"""The parameters of one trial: path in the configuration -> value."""
DISTRIBUTIONS = {"uniform", "log", "int", "choice"}


class Parameter(ConfigSection):
    """The values that a parameter can take, by exactly one of Optuna's distributions, and when it exists.

    Attributes:
        uniform: ends of a range of real numbers, distributed uniformly.
        log: ends of a range of positive numbers, distributed uniformly on a logarithmic scale.
        integers: ends of a range of integers, both included, distributed uniformly; `int` where it is written.
        choice: values that are all equally likely.
        when: paths -> the value, or a list of the values, with which alone the parameter exists.
    """

    uniform: tuple[float, float] | None = None
    log: tuple[PositiveFloat, PositiveFloat] | None = None
    integers: tuple[int, int] | None = Field(default=None, alias="int")
    choice: Annotated[tuple[Value, ...], Field(min_length=1)] | None = None
    when: dict[str, Value | list[Value]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _has_one_distribution(cls, plain: Any) -> Any:
        """Refuse what is none of the four forms in which a parameter is written."""
        if isinstance(plain, dict) and (len(plain.keys() - {"when"}) != 1 or not DISTRIBUTIONS & plain.keys()):
            raise ValueError(
                "a parameter is {uniform: [a, b]}, {log: [a, b]}, {int: [a, b]} or {choice: [...]}, and may have `when`"
            )
        return plain

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}

    @property
    def corners(self) -> Sequence[Value]:
        """The ends of the range, or all choices: where a wrong range fails."""
        return self.choice or self.integers or self.log or self.uniform or ()

    def ask(self, trial: BaseTrial, path: str) -> Value:
        """Return the value that a trial of Optuna's has, or suggests, for the parameter at this path."""
        if self.choice is not None:
            return trial.suggest_categorical(path, self.choice)
        if self.integers is not None:
            return trial.suggest_int(path, *self.integers)
        low, high = self.log or self.uniform or ()  # type: ignore[misc]  # one of them is there
        return trial.suggest_float(path, low, high, log=self.log is not None)

    def nearest(self, value: Value) -> Value:
        """Return the value that is closest: of a choice the first for one that is none, of a range the middle."""
        if self.choice is not None:
            return value if value in self.choice else self.choice[0]
        low, high = self.integers or self.log or self.uniform or ()  # type: ignore[misc]  # one of them is there
        closest = min(max(float(value), low), high) if isinstance(value, int | float) else (low + high) / 2
        return closest if self.integers is None else round(closest)


def apply(base: Config, params: Params) -> Config:
    """Return the configuration of a trial: the base with its parameters.

    Where a parameter changes the kind of a group, such as `schedule.kind`, fields of the old kind that the new one does
    not have are dropped.

    Raises:
        ConfigError: a path does not exist, or a value is not allowed.
    """
    plain = base.model_dump(mode="json")
    for group in (*VARIANTS, "guidance"):
        before, kind = plain[group], params.get(f"{group}.kind")
        if kind is not None and kind != before["kind"]:
            kept = _kept(group, str(kind))
            plain[group] = {"kind": kind, **{name: value for name, value in before.items() if name in kept}}
    for path, value in params.items():
        set_value(plain, path, value)
    sampler, own = plain["sampler"], base.sampler
    if "sampler.timesteps" not in params and (sampler["kind"], sampler.get("steps")) != (own.kind, own.steps):
        sampler.pop("timesteps", None)  # they are for one kind of sampler and one number of steps
    return from_dict(plain)


def get_value(plain: Any, path: str) -> Any:
    """Return the value at a path such as `guidance.interval.1` of a plain (JSON) configuration, or None without one."""
    return reduce(_child, path.split("."), plain)


def set_value(plain: Any, path: str, value: Value) -> None:
    """Set the value at a path of a plain configuration, in place.

    Raises:
        ConfigError: a group on the path does not exist, or an index is out of range.
    """
    *parents, last = path.split(".")
    for part in parents:
        group = _child(plain, part)
        if not isinstance(group, dict | list):
            raise ConfigError(
                f"{path}: there is no '{part}' here.{suggest(part, plain if isinstance(plain, dict) else ())}"
            )
        plain = group
    if isinstance(plain, list) and not (last.isdecimal() and int(last) < len(plain)):
        raise ConfigError(f"{path}: write an index from 0 to {len(plain) - 1} for '{last}'")
    plain[int(last) if isinstance(plain, list) else last] = value


def _child(plain: Any, part: str) -> Any:
    if isinstance(plain, list):
        return plain[int(part)] if part.isdecimal() and int(part) < len(plain) else None
    return plain.get(part) if isinstance(plain, Mapping) else None


def _kept(group: str, kind: str) -> set[str]:
    """Return the fields of a group that stay as they are where its kind becomes this one."""
    if group == "guidance":
        own = {setting.name for setting in settings_of(GUIDANCE[kind])} if kind in GUIDANCE else set()
        return own | {s.name for cls in GUIDANCE.values() for s in settings_of(cls) if s.reference}
    # The number of steps is a choice of its own for every sampler; all else that both have stays.
    return set(VARIANTS[group][kind].model_fields) - {"kind", "steps"} if kind in VARIANTS[group] else set()
