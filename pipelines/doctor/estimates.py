"""Checks of what a training will need of memory and disk, by its configuration, beside what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.config import Config, ConfigError, KubeRayLaunch
from pipelines.doctor.check import Check, Status
from pipelines.environment.limits import NodeLimits, limits_here
from pipelines.launch.pods import pod_limits
from pipelines.training.capacity import PLACES, Finding, compare, placement_of

STATUS: Mapping[str, Status] = {"fits": "ok", "tight": "warning", "too large": "failed"}


def check_estimates(config: Config, *, here: bool) -> list[Check]:
    """Check that a training fits: into the pods of `launch=kuberay`, or into this machine.

    Args:
        here: whether the local stack trains. Of another Ray cluster, nothing is known before a training asks it.
    """
    if isinstance(config.launch, KubeRayLaunch):
        per_node, limits = config.launch.workers_per_node, pod_limits(config.launch)
        return estimate_checks(compare(config, placement_of(config, per_node), limits))
    limits = limits_here() if here else NodeLimits("the Ray cluster")
    return estimate_checks(compare(config, placement_of(config), limits))


def estimate_checks(findings: Sequence[Finding]) -> list[Check]:
    """Return a check of each finding, with its numbers."""
    return [
        Check(PLACES[each.place], STATUS[each.verdict], f"about {each}", each.remedy or None, each.needed)
        for each in findings
    ]


def numbers(checks: Sequence[Check]) -> dict[str, Mapping[str, int] | None]:
    """Return the bytes of each place by what takes them."""
    return {check.name: check.numbers for check in checks}


def require_fit(checks: Sequence[Check]) -> None:
    """Refuse what surely does not fit.

    Raises:
        ConfigError: names the place and the setting that helps.
    """
    for check in checks:
        if check.status == "failed":
            raise ConfigError(f"the training does not fit the {check.name}: it needs {check.found}. {check.fix}")
