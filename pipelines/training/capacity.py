"""Whether a training fits where it is to run, and which setting makes it fit where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pipelines.config import Config, ConfigError, override_value
from pipelines.environment.limits import NODE_FOLDER, NodeLimits
from pipelines.training.loop.hardware import Precision, resolve_precision
from pipelines.training.loop.parallel import micro_batch_count
from pipelines.training.memory import GIB, Placement, estimate, in_words

SURE = 0.85
"""Share of an estimate that a training surely needs: estimates were within 15 % of what was measured."""
AT_MOST = ("backlog", "batches")
"""Parts that are only an upper limit: copies wait where the store is away, and few data sets are kept in memory."""
COMPILED = 0.5
"""Share of the activations that a compiled network surely keeps: fused operations keep fewer."""
MOST_RANKS = 4096
PLACES = {
    "device": "memory of a GPU",
    "node": "memory of a node",
    "disk": "temporary files",
    "shared": "shared memory",
}
"""The places that have a limit, in words."""


@dataclass(frozen=True)
class Finding:
    """How a place compares with what a training needs there.

    Attributes:
        place: a key of `PLACES`.
        needed: bytes by what takes them.
        there: bytes; None where they are not known.
        verdict: "too large": it surely does not fit; "tight": it may not.
        remedy: the setting that helps, unless it fits.
    """

    place: str
    needed: Mapping[str, int]
    there: float | None
    verdict: Literal["fits", "tight", "too large"]
    remedy: str = ""

    def __str__(self) -> str:
        there = "" if self.there is None else f"; {self.there / GIB:.2f} GiB are there"
        return f"{in_words(self.needed)}{there}"


def placement_of(config: Config, per_node: int | None = None) -> Placement:
    """Return where the ranks of a training are while it has the smallest number of workers.

    Args:
        per_node: workers on a node; None: all of them.
    """
    ranks, device = config.cluster.min_workers, "cuda" if config.cluster.gpus_per_worker else "cpu"
    precision: Precision = "bf16"  # what "auto" means on the GPUs that are sold today
    if device == "cpu" or torch.cuda.is_available() or config.optim.precision != "auto":
        precision = resolve_precision(config.optim, torch.device(device))
    return Placement(ranks, min(ranks, per_node or ranks), device, precision)


def compare(config: Config, placement: Placement, limits: NodeLimits) -> list[Finding]:
    """Return for each place what a training needs there, beside what is there; with a remedy where it does not fit."""
    found = _verdicts(config, placement, limits)
    return [
        each if each.verdict == "fits" else replace(each, remedy=_remedy(config, placement, limits, each))
        for each in found
    ]


def require_room(config: Config, placement: Placement, limits: NodeLimits) -> list[Finding]:
    """Refuse a training that surely does not fit, unless `cluster.check_memory` is off; return what was found.

    Raises:
        ConfigError: names the place, what takes it, and the setting that helps.
    """
    if not config.cluster.check_memory:
        return []
    found = compare(config, placement, limits)
    for each in found:
        if each.verdict == "too large":
            raise ConfigError(
                f"the training does not fit into the {PLACES[each.place]} of {limits.where}: it needs about {each}. "
                f"{each.remedy}; cluster.check_memory=false starts it anyway"
            )
    return found


def _verdicts(config: Config, placement: Placement, limits: NodeLimits) -> list[Finding]:
    needed = estimate(config, placement)
    places: dict[str, tuple[Mapping[str, int], float | None]] = {
        "device": (needed.device if placement.device == "cuda" else {}, limits.device),
        "node": (needed.node, limits.node),
        "disk": (needed.disk, limits.disk),
        "shared": (needed.shared if limits.shared is not None else {}, limits.shared),
    }
    return [
        Finding(name, parts, there, _verdict(config, parts, there)) for name, (parts, there) in places.items() if parts
    ]


def _verdict(config: Config, parts: Mapping[str, int], there: float | None) -> Literal["fits", "tight", "too large"]:
    if there is None or sum(parts.values()) <= there:
        return "fits"
    sure = sum(size for name, size in parts.items() if name not in AT_MOST)
    if config.cluster.compile:
        sure -= round((1 - COMPILED) * parts.get("activations", 0))
    return "too large" if SURE * sure > there else "tight"


# --- remedies -----------------------------------------------------------------------------------------------


def _remedy(config: Config, placement: Placement, limits: NodeLimits, finding: Finding) -> str:
    """Return the settings with which the training fits into a place, found by estimating it with them."""

    def fits(settings: Mapping[str, Any], ranks: int = placement.ranks) -> bool:
        found = _verdicts(_with(config, settings), replace(placement, ranks=ranks), limits)
        return all(each.verdict == "fits" for each in found if each.place == finding.place)

    if setting := limits.settings.get(finding.place):
        workers = 1 if finding.place == "disk" else placement.per_node
        return f"{setting}={math.ceil(sum(finding.needed.values()) / workers / GIB)} is enough"
    choices = _choices(config, placement, finding.place)
    helping = [next(((name, value) for value in values if fits({name: value})), None) for name, values in choices]
    if any(helping):
        return f"{' or '.join(_text(*each) for each in helping if each)} is enough"
    together, ranks = {name: values[-1] for name, values in choices}, placement.ranks
    if finding.place == "device":
        together["cluster.parallel"] = "fsdp"
        while not fits(together, ranks) and 2 * ranks <= min(config.batch_size, MOST_RANKS):
            ranks *= 2
    if fits(together, ranks):
        for name in list(together):
            fewer = {other: value for other, value in together.items() if other != name}
            together = fewer if fits(fewer, ranks) else together
        if ranks > placement.ranks:
            together["cluster.num_workers"] = ranks
        return f"{' '.join(_text(*each) for each in together.items())} are enough together"
    if finding.place == "disk":
        return "set TMPDIR to a larger disk, or cluster.parallel=fsdp with several workers, whose checkpoints need none"
    if finding.place == "shared":
        return f"set {NODE_FOLDER} to a folder on a fast disk, or give the container more with --shm-size"
    return "take a smaller network, fewer workers on a node, or a larger node"


def _choices(config: Config, placement: Placement, place: str) -> list[tuple[str, list[Any]]]:
    """Return settings by which less is needed in a place, each with values from the mildest to the strongest."""
    found: list[tuple[str, list[Any]]] = []
    parts = micro_batch_count(config.batch_size, placement.ranks, config.micro_batch_size)
    images = -(-config.batch_size // (placement.ranks * parts))
    computes_there = place == "device" or (place == "node" and placement.device == "cpu")
    if computes_there and images > 1:
        found.append(("micro_batch_size", [images >> by for by in range(1, images.bit_length())]))
    if computes_there and not config.model.checkpointing:
        found.append(("model.checkpointing", [True]))
    if config.cluster.parallel == "ddp" and placement.ranks > 1:
        found.append(("cluster.parallel", ["fsdp"]))
    if place == "node" and config.checkpoint.backlog:
        found.append(("checkpoint.backlog", [0]))
    return found


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the configuration with other values of some fields."""
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        changed = (
            {field: value} if not section else {section: getattr(config, section).model_copy(update={field: value})}
        )
        config = config.model_copy(update=changed)
    return config


def _text(name: str, value: Any) -> str:
    return f"{name}={override_value(value)}"
