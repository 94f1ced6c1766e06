"""The walk over the stages: those of which no result is there run in order; or only what would run, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config import ConfigError
from pipelines.flow.stage import Results, Site, Stage, select


@dataclass(frozen=True)
class FlowResult:
    """The result of a walk.

    Attributes:
        results: of the stages that were looked at.
        skipped: stage -> why, of those whose results were there before.
        ran: names of the stages that ran.
        inputs: stage -> digests of what its result is made from, by name.
    """

    results: Results
    skipped: Mapping[str, str]
    ran: tuple[str, ...]
    inputs: Mapping[str, Mapping[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return what is there as JSON types, for `--json`."""
        found = self.results
        plain: dict[str, Any] = {"skipped": list(self.skipped)}
        if found.dataset is not None:
            plain |= {"dataset": found.dataset.uri, "dataset_digest": found.dataset.digest}
        if found.evaluation is not None:
            plain["scores"] = found.evaluation.to_plain()
        if found.version is not None:
            plain["model"] = found.version.uri
        if found.champion is not None:
            plain["gate"] = asdict(found.champion)
        if found.run is not None:
            plain |= {"run_id": found.run.tracker.run_id, "mlflow": found.run.tracker.url}
        return plain


@dataclass(frozen=True)
class Preview:
    """What a walk would do with a stage.

    Attributes:
        name: of the stage.
        runs: whether it would run.
        reason: why, in words.
        output: address of its result.
        inputs: digests of what it is made from; empty where that is not there yet.
    """

    name: str
    runs: bool
    reason: str
    output: str
    inputs: Mapping[str, str]


def walk(stages: Sequence[Stage[Any]], site: Site, first: str | None = None, last: str | None = None) -> FlowResult:
    """Run every stage whose result is not there, in order.

    Args:
        stages: see `graph.stages`.
        first: name of the first stage that may run; the results of those before it have to be there.
        last: name of the last stage that may run.

    Raises:
        ConfigError: there is no such stage, or the result of one before the first is not there.
        PipelineError: a stage cannot make its result; says why and what to do.
    """
    before, chosen = select(stages, first, last)
    site.storage.require(stages[0].config.storage.root)
    given = _results(before, site)
    skipped: dict[str, str] = {}
    ran: list[str] = []
    inputs: dict[str, Mapping[str, str]] = {}
    for i, stage in enumerate(chosen):
        look = stage.look(site, given)
        inputs[stage.name] = look.inputs
        if look.result is not None:
            site.display.stage(stage.name, f"skipped: {look.reason}")
            skipped[stage.name] = look.reason
            given = given.having(stage.place, look.result)
        else:
            for later in chosen[i:]:  # before hours of work
                later.check(site, given)
            given = given.having(stage.place, stage.run(site, given))
            ran.append(stage.name)
    return FlowResult(given, skipped, tuple(ran), inputs)


def preview(
    stages: Sequence[Stage[Any]], site: Site, first: str | None = None, last: str | None = None
) -> tuple[Preview, ...]:
    """Return what `walk` would do with each stage; nothing is started or written.

    Raises:
        ConfigError: as `walk`.
        PipelineError: a stage would refuse to run; says why and what to do.
    """
    before, chosen = select(stages, first, last)
    given = _results(before, site)
    found = []
    for stage in chosen:
        missing = given.missing(stage.place)
        if missing:
            reason = f"it is made from the {missing[0]}, which is not there yet"
            found.append(Preview(stage.name, True, reason, stage.output, {}))
            continue
        look = stage.look(site, given)
        found.append(Preview(stage.name, look.result is None, look.reason, stage.output, look.inputs))
        if look.result is not None:
            given = given.having(stage.place, look.result)
    return tuple(found)


def _results(before: Sequence[Stage[Any]], site: Site) -> Results:
    """Return the results of stages that do not run.

    Raises:
        ConfigError: one is not there.
    """
    given = Results()
    for stage in before:
        look = stage.look(site, given)
        if look.result is None:
            raise ConfigError(
                f"the result of {stage.name}, which comes before, is not there: {look.reason}. "
                f"Start with --from {stage.name}, or without --from"
            )
        given = given.having(stage.place, look.result)
    return given
