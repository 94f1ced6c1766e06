"""What a study searches: any field of the run's configuration by path, checked against the typed configuration first.

A space is an ordered mapping from paths such as `optim.lr` or `guidance.interval.1` to distributions. A parameter with
`when` exists only where earlier ones, or the configuration itself, have the values that it names.
"""

from __future__ import annotations

import itertools
import random
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipelines.config import Config, ConfigError, compose, conf_dir, from_dict, suggest
from pipelines.config.schema import SamplerConfig, ScheduleConfig

Value = bool | int | float | str | None
Params = Mapping[str, Value]
"""Path -> value; what one trial tries."""
FIXED = {
    "training": (
        *("name", "seed", "images", "data.uri", "cluster.address"),
        *("storage", "tracking", "registry", "evaluation", "checkpoint"),
    ),
    "guidance": tuple(name for name in Config.model_fields if name not in ("guidance", "sampler")),
}
"""What a study of a kind cannot vary: trials share it."""
Objective = Literal["frechet_distance", "bits_per_dim", "precision", "recall", "class_accuracy", "evaluations"]
DIRECTIONS: dict[Objective, Literal["min", "max"]] = {
    "frechet_distance": "min",
    "bits_per_dim": "min",
    "precision": "max",
    "recall": "max",
    "class_accuracy": "max",
    "evaluations": "min",
}
"""What a study may be about, and which way it is better."""
RANDOM_CHECKS = 64


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _Parameter(_Model):
    when: dict[str, Value | list[Value]] = Field(
        default_factory=dict, description="exists only where these paths have one of these values"
    )

    def exists(self, values: Callable[[str], Value]) -> bool:
        """Whether it exists beside the values of other paths."""
        return all(
            values(path) in (wanted if isinstance(wanted, list) else [wanted]) for path, wanted in self.when.items()
        )


class Uniform(_Parameter):
    """A real number, every value alike."""

    uniform: tuple[float, float]

    def nearest(self, value: Value) -> Value:
        """The value in the range that is closest to one."""
        return _clamped(value, self.uniform)

    def ask(self, path: str, trial: Suggester) -> Value:
        """A value from Optuna."""
        return trial.suggest_float(path, *self.uniform)

    def corners(self) -> list[Value]:
        """The values at which a wrong range shows."""
        return list(self.uniform)

    def draw(self, rng: random.Random) -> Value:
        """A random value."""
        return rng.uniform(*self.uniform)


class Log(_Parameter):
    """A positive number, every factor alike."""

    log: tuple[PositiveFloat, PositiveFloat]

    def nearest(self, value: Value) -> Value:
        """The value in the range that is closest to one."""
        return _clamped(value, self.log)

    def ask(self, path: str, trial: Suggester) -> Value:
        """A value from Optuna."""
        return trial.suggest_float(path, *self.log, log=True)

    def corners(self) -> list[Value]:
        """The values at which a wrong range shows."""
        return list(self.log)

    def draw(self, rng: random.Random) -> Value:
        """A random value."""
        low, high = self.log
        return low * (high / low) ** rng.random()


class Int(_Parameter):
    """A whole number, ends included."""

    bounds: tuple[int, int] = Field(alias="int")

    def nearest(self, value: Value) -> Value:
        """The value in the range that is closest to one."""
        return round(_clamped(value, self.bounds))

    def ask(self, path: str, trial: Suggester) -> Value:
        """A value from Optuna."""
        return trial.suggest_int(path, *self.bounds)

    def corners(self) -> list[Value]:
        """The values at which a wrong range shows."""
        return list(self.bounds)

    def draw(self, rng: random.Random) -> Value:
        """A random value."""
        return rng.randint(*self.bounds)


class Choice(_Parameter):
    """One of some values."""

    choice: Annotated[list[Value], Field(min_length=1)]

    def nearest(self, value: Value) -> Value:
        """The value itself where it is one of the choices, else the first."""
        return value if value in self.choice else self.choice[0]

    def ask(self, path: str, trial: Suggester) -> Value:
        """A value from Optuna."""
        return trial.suggest_categorical(path, self.choice)

    def corners(self) -> list[Value]:
        """The values at which a wrong range shows."""
        return list(self.choice)

    def draw(self, rng: random.Random) -> Value:
        """A random value."""
        return rng.choice(self.choice)


Parameter = Uniform | Log | Int | Choice


class Suggester(Protocol):
    """Optuna's trial, as far as a space asks it."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A real number."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number."""

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        """One of some values."""


class StudyConfig(_Model):
    """What a study tries, how long, and how it judges.

    Attributes:
        kind: "training", whose trials are trainings, or "guidance", whose trials sample one model.
        space: path -> distribution, in the order in which they are drawn.
        objectives: what is optimised. A training study has one, the Frechet distance by default, or bits/dim; a
            guidance study has the first against the others, by default the distance against network evaluations.
        trials: of the study, those of earlier, interrupted calls included.
        random_trials: drawn at random before the model of the space (TPE) takes over.
        seed: of the search.
        concurrent: trials at a time; null: as many as the cluster has room for.
        samples: images that judge a trial.
        rungs: of a training trial, evaluations at growing numbers of images; of a guidance trial, growing samples.
        reduction: share 1 / reduction of the trials goes on from a rung (ASHA); training only.
        bits_per_dim_images: real images on which a training trial's bound is taken; 0 for none.
        confirm: settings that are judged again on fresh seeds at the end; guidance only.
        confirm_samples: images that judge each of them.
    """

    kind: Literal["training", "guidance"]
    space: dict[str, Parameter]
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("frechet_distance",)
    trials: PositiveInt
    random_trials: PositiveInt = 10
    seed: NonNegativeInt = 0
    concurrent: PositiveInt | None = None
    samples: Annotated[int, Field(ge=4)] = 256
    rungs: PositiveInt = 3
    reduction: Annotated[int, Field(ge=2)] = 2
    bits_per_dim_images: NonNegativeInt = 64
    confirm: PositiveInt = 3
    confirm_samples: Annotated[int, Field(ge=4)] = 1024

    @model_validator(mode="before")
    @classmethod
    def _default_objectives(cls, plain: Any) -> Any:
        if isinstance(plain, dict) and plain.get("kind") == "guidance" and plain.get("objectives") is None:
            return {**plain, "objectives": ("frechet_distance", "evaluations")}
        return plain

    @model_validator(mode="after")
    def _judged(self) -> StudyConfig:
        chosen = self.objectives
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"objectives: each once, got {', '.join(chosen)}")
        if self.kind == "guidance" and "bits_per_dim" in chosen:
            raise ValueError("objectives: bits_per_dim is of the model, not of how it is sampled: leave it out")
        if self.kind == "training" and chosen not in (("frechet_distance",), ("bits_per_dim",)):
            raise ValueError(f"objectives: a training study has frechet_distance or bits_per_dim, got {list(chosen)}")
        if "bits_per_dim" in chosen and not self.bits_per_dim_images:
            raise ValueError("objectives: bits_per_dim needs bits_per_dim_images > 0")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> StudyConfig:
        if not self.space:
            raise ValueError("space is empty: name at least one path with a distribution")
        before: set[str] = set()
        for path, parameter in self.space.items():
            if isinstance(parameter, Uniform | Log | Int) and parameter.corners()[0] > parameter.corners()[1]:  # type: ignore[operator]
                raise ValueError(f"space: {path}: the range {parameter.corners()} must be [low, high]")
            later = [other for other in parameter.when if other in self.space and other not in before]
            if later:
                raise ValueError(f"space: {path} depends on {', '.join(later)}, which must come before it")
            before.add(path)
        return self

    def suggest(self, trial: Suggester, base: Config) -> dict[str, Value]:
        """What the next trial tries, asked from Optuna parameter by parameter (define by run)."""
        return self._choose(lambda path, parameter: parameter.ask(path, trial), base)

    def draw(self, rng: random.Random, base: Config) -> dict[str, Value]:
        """What a random trial tries."""
        return self._choose(lambda path, parameter: parameter.draw(rng), base)

    def nearest(self, base: Config) -> dict[str, Value]:
        """The trial that is closest to the configuration as it stands."""
        plain = base.model_dump(mode="json")
        return self._choose(lambda path, parameter: parameter.nearest(_get(plain, path)), base)

    def _choose(self, pick: Callable[[str, Parameter], Value], base: Config) -> dict[str, Value]:
        chosen: dict[str, Value] = {}
        plain = base.model_dump(mode="json")

        def value(path: str) -> Value:
            # A searched path that does not exist in this trial has no value, whatever the configuration says.
            return chosen.get(path) if path in self.space else _get(plain, path)

        for path, parameter in self.space.items():
            if parameter.exists(value):
                chosen[path] = pick(path, parameter)
        return chosen


def load_study(name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study of `conf/search/`, or a YAML file, with overrides such as `search.trials=8`.

    Raises:
        ConfigError: no such study, or a field of it that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    shipped = sorted(path.stem for path in (conf_dir() / "search").glob("*.yaml"))
    path = conf_dir() / "search" / f"{name}.yaml" if name in shipped else None
    if path is None and name.endswith((".yaml", ".yml")):
        path = Path(name)
    if path is None or not path.is_file():
        raise ConfigError(
            f"no study {name!r}: choose one of {', '.join(shipped)}, or give a YAML file.{suggest(name, shipped)}"
        )
    try:
        plain = typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path), resolve=True))
        for line in overrides:
            _override(plain, *line.removeprefix("search.").split("=", 1))
        return StudyConfig.model_validate(plain)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]}") from error
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(path.name, e) for e in error.errors()))) from error


def compose_study(name: str, kind: str, overrides: Sequence[str]) -> tuple[StudyConfig, Config]:
    """Return a study and the configuration that its trials share.

    Args:
        name: a study of `conf/search/`, or a YAML file.
        kind: "training" or "guidance", which the study has to be.
        overrides: of both; those of the study begin with `search.`.

    Raises:
        ConfigError: there is no such study, it is of another kind, or a field is wrong.
    """
    study = load_study(name, [line for line in overrides if line.startswith("search.")])
    if study.kind != kind:
        raise ConfigError(f"the space '{name}' is for `ddpm search {study.kind}`, not for `ddpm search {kind}`")
    return study, compose([line for line in overrides if not line.startswith("search.")])


def _override(plain: dict[str, Any], key: str, text: str) -> None:
    """`trials=8`, or a distribution such as `space.optim.lr.log=[1e-4,1e-2]`, whose conditions stay."""
    from omegaconf import OmegaConf

    value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload, index]
    if not key.startswith("space."):
        plain[key] = value
        return
    searched, _, distribution = key.removeprefix("space.").rpartition(".")
    when = plain["space"].get(searched, {}).get("when")
    plain["space"][searched] = {distribution: value, **({"when": when} if when else {})}


def apply(base: Config, params: Params) -> Config:
    """The configuration of a trial.

    Where a parameter changes the kind of a group, such as `schedule.kind`, the other kind's fields go with it.

    Raises:
        ConfigError: a path that does not exist, or a value that it refuses.
    """
    plain = base.model_dump(mode="json")
    for group in ("schedule", "sampler"):
        kind = params.get(f"{group}.kind")
        if kind is not None and kind != plain[group]["kind"]:
            plain[group] = {"kind": kind, **_shared(group, str(kind), plain[group])}
    if params.get("guidance.kind", "classifier_free") != "classifier_free":
        plain["guidance"]["rescale"] = 0.0  # of that kind alone
    for path, value in params.items():
        _set(plain, path, value)
    return from_dict(plain)


def check_space(study: StudyConfig, base: Config) -> None:
    """Try the ends of every range and every choice, and random draws, before anything starts.

    Raises:
        ConfigError: names the path, the value and what the configuration says of it.
    """
    for path, parameter in study.space.items():
        fixed = next((f for f in FIXED[study.kind] if path == f or path.startswith(f + ".")), None)
        if fixed is not None:
            raise ConfigError(f"search space: {path} cannot be searched by a {study.kind} study: trials share {fixed}")
        for condition in parameter.when:
            if condition not in study.space:
                _get_or_fail(base.model_dump(mode="json"), condition, f"{path} depends on {condition}")
    for params in itertools.chain(_corners(study, base), _random(study, base)):
        try:
            apply(base, params)
        except ConfigError as error:
            tried = ", ".join(f"{path}={value}" for path, value in params.items())
            raise ConfigError(f"search space, with {tried}:\n{error}") from error
    never = set(study.space) - {path for params in _random(study, base, 512) for path in params}
    if never:
        raise ConfigError(f"search space: {', '.join(sorted(never))}: `when` is never met")


def _corners(study: StudyConfig, base: Config) -> Iterator[dict[str, Value]]:
    """Each end of each range, among first choices of the rest that let it exist."""
    rng = random.Random(0)
    for path, parameter in study.space.items():
        for corner in parameter.corners():

            def pick(other: str, p: Parameter, path: str = path, corner: Value = corner) -> Value:
                return corner if other == path else p.draw(rng)

            for _ in range(64):  # conditions of others are drawn until they let it exist
                params = study._choose(pick, base)
                if path in params:
                    yield params
                    break


def _random(study: StudyConfig, base: Config, count: int = RANDOM_CHECKS) -> Iterator[dict[str, Value]]:
    rng = random.Random(study.seed)
    return (study.draw(rng, base) for _ in range(count))


def _shared(group: str, kind: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a group that its other kind has too."""
    union = {"schedule": ScheduleConfig, "sampler": SamplerConfig}[group]
    # Annotated[A | B, Field(discriminator="kind")]
    for variant in typing.get_args(typing.get_args(union)[0]):
        if typing.get_args(variant.model_fields["kind"].annotation) == (kind,):
            # The number of steps is a choice of its own for every sampler; all else that both have stays.
            kept = set(variant.model_fields) - {"kind", "steps"}
            return {name: value for name, value in before.items() if name in kept}
    return {}


def _clamped(value: Value, bounds: tuple[float, float]) -> float:
    """A number within bounds; their middle for what is none."""
    low, high = bounds
    return min(max(float(value), low), high) if isinstance(value, int | float) else (low + high) / 2


def _get(plain: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(plain, list) and part.isdecimal() and int(part) < len(plain):
            plain = plain[int(part)]
        elif isinstance(plain, Mapping):
            plain = plain.get(part)
        else:
            return None
    return plain


def _get_or_fail(plain: Mapping[str, Any], path: str, what: str) -> None:
    if _get(plain, path) is None:
        raise ConfigError(f"search space: {what}, which is neither in the space nor has a value in the configuration")


def _set(plain: Any, path: str, value: Value) -> None:
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


def _explain(where: str, error: Any) -> str:
    names = {cls.__name__ for cls in (Uniform, Log, Int, Choice)}
    path = ".".join(str(part) for part in error["loc"] if part not in names)
    if error["loc"][:1] == ("space",) and error["type"] in ("extra_forbidden", "missing"):
        return (
            f"{where}: {'.'.join(map(str, error['loc'][:2]))}: a parameter is {{uniform: [a, b]}}, {{log: [a, b]}}, "
            "{int: [a, b]} or {choice: [...]}, and may have `when`"
        )
    got = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{where}: {path + ': ' if path else ''}{error['msg'].removeprefix('Value error, ')}{got}"
