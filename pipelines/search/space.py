"""A search space against the configuration that its trials share: a trial's configuration, and checks up front.

A space is an ordered mapping from paths such as `optim.lr` or `guidance.interval.1` to distributions. A parameter with
`when` exists only where earlier ones, or the configuration itself, have the values that it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ddpm.guidance import GUIDANCE
from ddpm.settings import settings_of
from pipelines.config import Config, ConfigError, from_dict
from pipelines.config.choices import VARIANTS
from pipelines.search.parameters import Params, Value, get_value, set_value
from pipelines.search.study_config import StudyConfig

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


def apply(base: Config, params: Params) -> Config:
    """Return the configuration of a trial: the base with its parameters.

    Where a parameter changes the kind of a group, such as `schedule.kind`, fields of the old kind that the new one does
    not have are dropped.

    Raises:
        ConfigError: a path does not exist, or a value is not allowed.
    """
    plain = base.model_dump(mode="json")
    for group in VARIANTS:
        kind = params.get(f"{group}.kind")
        if kind is not None and kind != plain[group]["kind"]:
            plain[group] = {"kind": kind, **_shared(group, str(kind), plain[group])}
    kind = params.get("guidance.kind")
    if kind is not None and kind != plain["guidance"]["kind"]:
        plain["guidance"] = _guidance_of(str(kind), plain["guidance"])
    for path, value in params.items():
        set_value(plain, path, value)
    sampler, own = plain["sampler"], base.sampler
    if "sampler.timesteps" not in params and (sampler["kind"], sampler.get("steps")) != (own.kind, own.steps):
        sampler.pop("timesteps", None)  # they are for one kind of sampler and one number of steps
    return from_dict(plain)


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


def _shared(group: str, kind: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a group that its new kind has too."""
    if kind not in VARIANTS[group]:
        return {}
    # The number of steps is a choice of its own for every sampler; all else that both have stays.
    kept = set(VARIANTS[group][kind].model_fields) - {"kind", "steps"}
    return {name: value for name, value in before.items() if name in kept}


def _guidance_of(kind: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guidance section for another kind: references to networks stay, and settings that the kind has."""
    own = {setting.name for setting in settings_of(GUIDANCE[kind])} if kind in GUIDANCE else set()
    references = {s.name for cls in GUIDANCE.values() for s in settings_of(cls) if s.reference}
    return {name: value for name, value in before.items() if name in own | references | {"kind"}}
