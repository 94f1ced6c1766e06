"""Advice on larger budgets: the plans that they would lead to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm.image_size import in_words, parse_image_size
from pipelines.plan.budget import written
from pipelines.plan.facts import MachineFacts, Plan, SourceFacts
from pipelines.plan.networks import WIDTHS
from pipelines.plan.propose import propose
from pipelines.presentation.errors import ConfigError

FACTORS = (2, 4, 12)


def more_time(
    plan: Plan,
    source: SourceFacts,
    machine: MachineFacts,
    settings: Mapping[str, Any] | None = None,
    trained: int | None = None,
) -> str:
    """Return a sentence on what larger budgets than a plan's would train.

    Args:
        settings: what the user has set.
        trained: images that the plan's training has seen, for the estimate of other budgets; None before the training.
    """
    trained = trained or plan.images
    machine = machine.times(trained / plan.images, 1.0, 1.0)
    said, before, seen = [], plan, trained
    for factor in FACTORS:
        try:
            other = propose(source, machine, plan.budget_s * factor, settings)
        except ConfigError:
            break
        if other.images <= seen and other.network == before.network:
            said.append(f"a larger budget does not help with {source.images:,} images: add images")
            break
        network = "" if other.network == before.network else f" of a {_named(other.network)}"
        said.append(f"budget={written(other.budget_s)} trains on {other.images:,} images{network}")
        before, seen = other, other.images
    return f"this training saw {trained:,} images; {'; '.join(said)}" if said else ""


def _named(key: str) -> str:
    network, _, size = key.partition("@")
    return f"{network if network not in WIDTHS else f'{network} UNet'} at {in_words(parse_image_size(size))}"
