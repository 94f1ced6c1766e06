"""A search space against the configuration that its trials share: a trial's configuration, and checks up front.

A space is an ordered mapping from paths such as `optim.lr` or `guidance.interval.1` to distributions. A parameter with
`when` exists only where earlier ones, or the configuration itself, have the values that it names.
"""

from __future__ import annotations

import itertools
import random
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config import Config, ConfigError, from_dict
from pipelines.config.schema import SamplerConfig, ScheduleConfig
from pipelines.search.parameters import Parameter, Params, Value
from pipelines.search.paths import get_value, set_value
from pipelines.search.study_config import StudyConfig

FIXED = {
    "training": (
        *("name", "seed", "images", "data.uri", "cluster.address"),
        *("storage", "tracking", "registry", "evaluation", "checkpoint"),
    ),
    "guidance": tuple(name for name in Config.model_fields if name not in ("guidance", "sampler")),
}
"""What a study of a kind cannot vary: trials share it."""
RANDOM_CHECKS = 64


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
        set_value(plain, path, value)
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


def _get_or_fail(plain: Mapping[str, Any], path: str, what: str) -> None:
    if get_value(plain, path) is None:
        raise ConfigError(f"search space: {what}, which is neither in the space nor has a value in the configuration")
