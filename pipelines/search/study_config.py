"""The settings of a study, and how they are read from `conf/search/`, a YAML file and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipelines.config import Config, ConfigError, compose, conf_dir, suggest
from pipelines.config.choices import ConfigSection
from pipelines.config.compose import parse_overrides
from pipelines.config.sections import NAME
from pipelines.search.space import Parameter, Value, apply, get_value

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Objective = Literal["frechet_distance", "bits_per_dim", "precision", "recall", "class_accuracy", "evaluations"]
DIRECTIONS: dict[Objective, Literal["min", "max"]] = {
    "frechet_distance": "min",
    "bits_per_dim": "min",
    "precision": "max",
    "recall": "max",
    "class_accuracy": "max",
    "evaluations": "min",
}
"""The objectives that a study can have, and whether lower or higher is better."""
FIXED = {
    "training": (
        *("name", "seed", "images", "data.uri", "cluster.address"),
        *("storage", "tracking", "registry", "evaluation", "checkpoint"),
    ),
    "guidance": tuple(name for name in Config.model_fields if name not in ("guidance", "sampler")),
}
"""Fields that the trials of a study share, so that a space cannot vary them, by kind of study."""
RANDOM_CHECKS = 64
"""Random trials whose configuration is checked before a study starts."""
MOST_DRAWS = 512
"""Random trials in none of which a parameter exists: it never does."""


class StudyConfig(ConfigSection):
    """The settings of a study: what it searches, for how long, and how trials are judged.

    Attributes:
        kind: "training", whose trials are trainings, or "guidance", whose trials sample one model.
        space: path in the configuration -> distribution, in the order in which values are drawn.
        objectives: the scores to optimise. A training study has one: the Frechet distance (default) or bits/dim. A
            guidance study has several, by default the Frechet distance and the number of network evaluations.
        trials: number of trials, those of earlier, interrupted calls included.
        random_trials: number of trials that are drawn at random before Optuna's TPE sampler chooses.
        seed: seed of the search.
        concurrent: number of trials that run at a time; None for as many as the cluster has room for.
        samples: number of images by which a trial is judged.
        rungs: number of evaluations of a trial: after growing numbers of training images (training), or on growing
            numbers of samples (guidance).
        reduction: a fraction 1 / reduction of the trials continues after a rung (ASHA); training only.
        bits_per_dim_images: number of real images on which a training trial's bound is computed; 0 for none.
        confirm: number of settings, or of trained models, that are judged again on fresh noise at the end.
        confirm_samples: number of images by which each of them is judged; of fewer than 64 no normal test holds.
    """

    kind: Literal["training", "guidance"]
    space: dict[str, Parameter]
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default_factory=lambda given: (
            "frechet_distance",
            *(("evaluations",) if given.get("kind") == "guidance" else ()),
        )
    )
    trials: PositiveInt
    random_trials: PositiveInt = 10
    seed: NonNegativeInt = 0
    concurrent: PositiveInt | None = None
    samples: Annotated[int, Field(ge=4)] = 256
    rungs: PositiveInt = 3
    reduction: Annotated[int, Field(ge=2)] = 2
    bits_per_dim_images: NonNegativeInt = 64
    confirm: PositiveInt = 3
    confirm_samples: Annotated[int, Field(ge=64)] = 1024

    @model_validator(mode="after")
    def _check_objectives(self) -> StudyConfig:
        """Refuse objectives that this kind of study cannot have."""
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
    def _check_space(self) -> StudyConfig:
        """Refuse empty spaces, empty ranges, and conditions on later parameters."""
        if not self.space:
            raise ValueError("space is empty: name at least one path with a distribution")
        for place, (path, parameter) in enumerate(self.space.items()):
            if parameter.choice is None and parameter.corners[0] > parameter.corners[1]:  # type: ignore[operator]
                raise ValueError(f"space: {path}: the range {list(parameter.corners)} must be [low, high]")
            later = [other for other in parameter.when if other in [*self.space][place:]]
            if later:
                raise ValueError(f"space: {path} depends on {', '.join(later)}, which must come before it")
        return self

    def suggest(self, trial: BaseTrial, base: Config) -> dict[str, Value]:
        """Return the parameters that exist in a trial of Optuna's, asked for one by one (define by run)."""
        plain, chosen = base.model_dump(mode="json"), dict[str, Value]()

        def met(path: str, wanted: Value | list[Value]) -> bool:
            # A searched path that does not exist in this trial has no value, whatever the configuration says.
            value = chosen.get(path) if path in self.space else get_value(plain, path)
            return value in (wanted if isinstance(wanted, list) else [wanted])

        for path, parameter in self.space.items():
            if all(met(*condition) for condition in parameter.when.items()):
                chosen[path] = parameter.ask(trial, path)
        return chosen

    def nearest(self, base: Config) -> dict[str, Value]:
        """Return the parameters that are closest to the values of the configuration."""
        from optuna.trial import FixedTrial

        plain = base.model_dump(mode="json")
        closest = {path: parameter.nearest(get_value(plain, path)) for path, parameter in self.space.items()}
        return self.suggest(FixedTrial(closest), base)

    def values(self, path: str, base: Config) -> Sequence[Value]:
        """Return the values that a path can have in trials: all choices, or the ends of its range.

        Where it is not searched, it has that of the configuration.
        """
        searched = self.space.get(path)
        return [get_value(base.model_dump(mode="json"), path)] if searched is None else searched.corners


def check_space(study: StudyConfig, base: Config) -> None:
    """Check the configurations at the ends of every range, at every choice, and of random trials.

    Raises:
        ConfigError: one of them is not valid; the message names path, value and reason.
    """
    plain = base.model_dump(mode="json")
    for path, parameter in study.space.items():
        fixed = next((f for f in FIXED[study.kind] if path == f or path.startswith(f + ".")), None)
        if fixed is not None:
            raise ConfigError(f"search space: {path} cannot be searched by a {study.kind} study: trials share {fixed}")
        for condition in parameter.when:
            if condition not in study.space and get_value(plain, condition) is None:
                raise ConfigError(
                    f"search space: {path} depends on {condition}, which is neither in the space nor has a value in "
                    "the configuration"
                )
    for params in _trials(study, base):
        try:
            apply(base, params)
        except ConfigError as error:
            tried = ", ".join(f"{path}={value}" for path, value in params.items())
            raise ConfigError(f"search space, with {tried}:\n{error}") from error


def _trials(study: StudyConfig, base: Config) -> Iterator[dict[str, Value]]:
    """Yield trials with each end of each range and each choice, and random ones.

    Raises:
        ConfigError: a parameter exists in none.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(study.seed))
    for path, parameter in study.space.items():
        for corner in parameter.corners:
            for _ in range(MOST_DRAWS):  # the conditions of others are drawn until they let it exist
                drawn.enqueue_trial({path: corner})
                if path in (params := study.suggest(drawn.ask(), base)):
                    yield params
                    break
            else:
                raise ConfigError(f"search space: {path}: `when` is never met")
    yield from (study.suggest(drawn.ask(), base) for _ in range(RANDOM_CHECKS))


def study_name(name: str) -> str:
    """Return the name of a study, which is a part of addresses and of the names of its runs.

    Raises:
        ConfigError: no study can be called that.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"no study can be called '{name}': use letters, digits, '.', '_' and '-', the first a letter or a digit, "
            "with --study NAME"
        )
    return name


def load_study(name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study of `conf/search/`, or of a YAML file, with overrides such as `search.trials=8`.

    Raises:
        ConfigError: there is no such study, or a field of it is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    shipped = sorted(path.stem for path in (conf_dir() / "search").glob("*.yaml"))
    path = conf_dir() / "search" / f"{name}.yaml" if name in shipped else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(
            f"no study {name!r}: choose one of {', '.join(shipped)}, or give a YAML file.{suggest(name, shipped)}"
        )
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(plain, dict):
            raise ConfigError(f"{path.name}: a study is a mapping from names to values, this is none")
        for line in overrides:
            _override(plain, line)
        return StudyConfig.model_validate(plain)
    except YAMLError as error:
        raise ConfigError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is no text in UTF-8: {error}") from error
    except (OmegaConfBaseException, OSError, TypeError) as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]}") from error
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(path.name, e) for e in error.errors()))) from error


def compose_study(name: str, kind: str, overrides: Sequence[str]) -> tuple[StudyConfig, Config, list[str]]:
    """Return a study, the configuration that its trials share, and the overrides of that configuration.

    Args:
        name: a study of `conf/search/`, or a YAML file.
        kind: "training" or "guidance", which the study has to be.
        overrides: of both; those of the study begin with `search.`.

    Raises:
        ConfigError: there is no such study, it is of another kind, or a field is wrong.
    """
    of_study = [line for line in overrides if line.startswith("search.")]
    of_run = [line for line in overrides if not line.startswith("search.")]
    study = load_study(name, of_study)
    if study.kind != kind:
        raise ConfigError(f"the space '{name}' is for `ddpm search {study.kind}`, not for `ddpm search {kind}`")
    return study, compose(of_run), of_run


def _override(plain: dict[str, Any], line: str) -> None:
    """Apply an override, in place.

    It is a field such as `search.trials=8`, or a new distribution such as `search.space.optim.lr.log=[1e-4,1e-2]`: the
    condition `when` of the parameter stays.

    Raises:
        ConfigError: it has no value, or one that cannot be read.
    """
    try:
        (override,) = parse_overrides([line.removeprefix("search.")])
    except ConfigError as error:
        raise ConfigError(
            f"{line}: cannot be read: write search.FIELD=VALUE, such as search.trials=8 or "
            "search.space.optim.lr.log=[1e-4,1e-2]"
        ) from error
    key, value, space = str(override.key_or_group), override.value(), plain.get("space") or {}
    if not key.startswith("space.") or not isinstance(space, dict):
        plain[key] = value
        return
    parameter, _, distribution = key.removeprefix("space.").rpartition(".")
    previous = space.get(parameter)
    when = previous.get("when") if isinstance(previous, dict) else None
    plain["space"] = {**space, parameter: {distribution: value, **({"when": when} if when else {})}}


def _explain(where: str, error: Any) -> str:
    """Return one pydantic error in words, with the field's path in the file."""
    path = ".".join(map(str, error["loc"]))
    got = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{where}: {path + ': ' if path else ''}{error['msg'].removeprefix('Value error, ')}{got}"
