"""The settings of a study, and how they are read from `conf/search/`, a YAML file and overrides."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipelines.config import Config, ConfigError, compose, conf_dir, suggest
from pipelines.config.choices import Section
from pipelines.config.sections import NAME
from pipelines.search.parameters import Parameter, Value, get_value

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


class StudyConfig(Section):
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
    confirm_samples: Annotated[int, Field(ge=64)] = 1024

    @model_validator(mode="before")
    @classmethod
    def _default_objectives(cls, plain: Any) -> Any:
        """Fill in the default objectives of a guidance study."""
        if isinstance(plain, dict) and plain.get("kind") == "guidance" and plain.get("objectives") is None:
            return {**plain, "objectives": ("frechet_distance", "evaluations")}
        return plain

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
        before: set[str] = set()
        for path, parameter in self.space.items():
            if parameter.choice is None and parameter.corners[0] > parameter.corners[1]:  # type: ignore[operator]
                raise ValueError(f"space: {path}: the range {list(parameter.corners)} must be [low, high]")
            later = [other for other in parameter.when if other in self.space and other not in before]
            if later:
                raise ValueError(f"space: {path} depends on {', '.join(later)}, which must come before it")
            before.add(path)
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
    path = conf_dir() / "search" / f"{name}.yaml" if name in shipped else None
    if path is None and name.endswith((".yaml", ".yml")):
        path = Path(name)
    if path is None or not path.is_file():
        raise ConfigError(
            f"no study {name!r}: choose one of {', '.join(shipped)}, or give a YAML file.{suggest(name, shipped)}"
        )
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(plain, dict):
            raise ConfigError(f"{path.name}: a study is a mapping from names to values, this is none")
        for line in overrides:
            _override(typing.cast("dict[str, Any]", plain), line)
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

    It is a field such as `search.trials=8`, or a distribution such as `search.space.optim.lr.log=[1e-4,1e-2]`, which
    keeps the `when` of the parameter.

    Raises:
        ConfigError: it has no value, or one that is no YAML.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    key, equals, text = line.removeprefix("search.").partition("=")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    except YAMLError:
        read = None
    if not equals or read is None:
        raise ConfigError(
            f"{line}: cannot be read: write search.FIELD=VALUE, such as search.trials=8 or "
            "search.space.optim.lr.log=[1e-4,1e-2]"
        )
    value, space = read["value"], plain.get("space") or {}
    if not key.startswith("space.") or not isinstance(space, dict):
        plain[key] = value
        return
    searched, _, distribution = key.removeprefix("space.").rpartition(".")
    before = space.get(searched)
    when = before.get("when") if isinstance(before, dict) else None
    plain["space"] = {**space, searched: {distribution: value, **({"when": when} if when else {})}}


def _explain(where: str, error: Any) -> str:
    """Return one pydantic error in words, with the field's path in the file."""
    path = ".".join(map(str, error["loc"]))
    got = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{where}: {path + ': ' if path else ''}{error['msg'].removeprefix('Value error, ')}{got}"
