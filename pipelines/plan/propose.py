"""The proposal: a pure function of a source's and a machine's facts, a budget, and what the user has set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.plan import lines
from pipelines.plan.choose import choose
from pipelines.plan.facts import MachineFacts, Plan, SourceFacts, UserOverrides


def propose(
    source: SourceFacts,
    machine: MachineFacts,
    budget_s: float,
    settings: Mapping[str, Any] | None = None,
    *,
    compared: bool = True,
) -> Plan:
    """Return the configuration that is expected to give the best model of a source in a budget of time.

    Args:
        source: from `look`.
        machine: from `measure`.
        budget_s: seconds for everything, from the command to the registered version.
        settings: settings of the user, by field or group, which are kept.
        compared: whether the gate will compare the model with a version that has the alias, which takes time.

    Raises:
        ConfigError: the source has too few images, or the budget leaves no time to train; the message says what to do.
    """
    user = UserOverrides(settings or {})
    basis = choose(source, machine, budget_s, user, compared)
    found = (
        *lines.data_lines(source, basis, user),
        *lines.network_lines(source, basis, user),
        *lines.optim_lines(source, machine, basis, user),
        *lines.machine_lines(machine, basis, user),
        *lines.judging_lines(source, machine, basis, budget_s, user),
    )
    warnings = lines.warnings(source, machine, basis, budget_s)
    return Plan(budget_s, found, basis.seconds, basis.images, basis.candidate.key, warnings)
