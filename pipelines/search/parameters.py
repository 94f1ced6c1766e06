"""The distributions of a search space: what values a parameter can take, and when it exists."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Protocol

import pydantic
from pydantic import Field, PositiveFloat

Value = bool | int | float | str | None
Params = Mapping[str, Value]
"""The parameters of one trial: path in the configuration -> value."""


class Suggester(Protocol):
    """The part of an Optuna trial that a space uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a real number."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return an integer."""

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        """Return one of the choices."""


class FrozenModel(pydantic.BaseModel):
    """A settings object that refuses unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class _Parameter(FrozenModel):
    """What all distributions have: the condition under which the parameter exists."""

    when: dict[str, Value | list[Value]] = Field(
        default_factory=dict, description="exists only where these paths have one of these values"
    )

    def exists(self, values: Callable[[str], Value]) -> bool:
        """Return whether the parameter exists in a trial.

        Args:
            values: returns the value of another path in that trial.
        """
        return all(
            values(path) in (wanted if isinstance(wanted, list) else [wanted]) for path, wanted in self.when.items()
        )


class Uniform(_Parameter):
    """A real number, distributed uniformly."""

    uniform: tuple[float, float]

    def nearest(self, value: Value) -> Value:
        """Return the value of the range that is closest to `value`."""
        return _clamped(value, self.uniform)

    def ask(self, path: str, trial: Suggester) -> Value:
        """Return the value that Optuna suggests for this trial."""
        return trial.suggest_float(path, *self.uniform)

    def corners(self) -> list[Value]:
        """Return the ends of the range or all choices: where a wrong range fails."""
        return list(self.uniform)

    def draw(self, rng: random.Random) -> Value:
        """Return a random value."""
        return rng.uniform(*self.uniform)


class Log(_Parameter):
    """A positive number, distributed uniformly on a logarithmic scale."""

    log: tuple[PositiveFloat, PositiveFloat]

    def nearest(self, value: Value) -> Value:
        """Return the value of the range that is closest to `value`."""
        return _clamped(value, self.log)

    def ask(self, path: str, trial: Suggester) -> Value:
        """Return the value that Optuna suggests for this trial."""
        return trial.suggest_float(path, *self.log, log=True)

    def corners(self) -> list[Value]:
        """Return the ends of the range or all choices: where a wrong range fails."""
        return list(self.log)

    def draw(self, rng: random.Random) -> Value:
        """Return a random value."""
        low, high = self.log
        return low * (high / low) ** rng.random()


class Int(_Parameter):
    """An integer, distributed uniformly, both ends included."""

    bounds: tuple[int, int] = Field(alias="int")

    def nearest(self, value: Value) -> Value:
        """Return the value of the range that is closest to `value`."""
        return round(_clamped(value, self.bounds))

    def ask(self, path: str, trial: Suggester) -> Value:
        """Return the value that Optuna suggests for this trial."""
        return trial.suggest_int(path, *self.bounds)

    def corners(self) -> list[Value]:
        """Return the ends of the range or all choices: where a wrong range fails."""
        return list(self.bounds)

    def draw(self, rng: random.Random) -> Value:
        """Return a random value."""
        return rng.randint(*self.bounds)


class Choice(_Parameter):
    """One of several values, all equally likely."""

    choice: Annotated[list[Value], Field(min_length=1)]

    def nearest(self, value: Value) -> Value:
        """Return `value` where it is one of the choices, else the first choice."""
        return value if value in self.choice else self.choice[0]

    def ask(self, path: str, trial: Suggester) -> Value:
        """Return the value that Optuna suggests for this trial."""
        return trial.suggest_categorical(path, self.choice)

    def corners(self) -> list[Value]:
        """Return the ends of the range or all choices: where a wrong range fails."""
        return list(self.choice)

    def draw(self, rng: random.Random) -> Value:
        """Return a random value."""
        return rng.choice(self.choice)


Parameter = Uniform | Log | Int | Choice


def _clamped(value: Value, bounds: tuple[float, float]) -> float:
    """Return a number clamped to the bounds, or their middle for a value that is no number."""
    low, high = bounds
    return min(max(float(value), low), high) if isinstance(value, int | float) else (low + high) / 2
