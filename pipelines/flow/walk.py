"""The walk over the stages: those of which no result is there run, independent ones side by side; or what would run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.config import ConfigError
from pipelines.flow.stage import Results, Site, Stage, independent, select


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
class StagePreview:
    """What would happen to a stage if the flow ran now.

    Attributes:
        name: of the stage.
        runs: whether it would run.
        reason: why, in words.
        output: address of its result.
        inputs: digests of what it is made from; empty where that is not there yet.
        beside: names of the stages beside which it would run, where the cluster has room for both.
    """

    name: str
    runs: bool
    reason: str
    output: str
    inputs: Mapping[str, str]
    beside: tuple[str, ...] = ()


def walk(stages: Sequence[Stage[Any]], site: Site, first: str | None = None, last: str | None = None) -> FlowResult:
    """Run every stage whose result is not there, as soon as what it needs is.

    Stages of independent branches run side by side where one of them does all its work on Ray and the cluster has room
    for it beside the other; else in order, but for one that fills the time that is left, which comes last. A stage that
    fails ends the walk, but not another one that is at work.

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
    return _Walk(site, chosen, _results(before, chosen, site)).run()


class _Walk:
    """A walk under way.

    Args:
        chosen: the stages that may run.
        given: the results of those before them.

    Attributes:
        waiting: the stages that have not been started or skipped, in order.
        beside: number of stages that are at work in threads.
    """

    def __init__(self, site: Site, chosen: Sequence[Stage[Any]], given: Results) -> None:
        self.site, self.chosen, self.given = site, chosen, given
        self.waiting = list(chosen)
        self.skipped: dict[str, str] = {}
        self.ran: set[str] = set()
        self.inputs: dict[str, Mapping[str, str]] = {}
        self.beside = 0
        self.errors: list[Exception] = []
        self._ended: queue.SimpleQueue[tuple[Stage[Any], Any, Exception | None]] = queue.SimpleQueue()

    def run(self) -> FlowResult:
        """Walk to the end, or to the first error, of which stages in threads are told when they have ended."""
        while True:
            self._take_ended(wait=False)
            try:
                ready = [] if self.errors else self._ready()
                if ready:
                    here, *others = sorted(ready, key=lambda stage: stage.on_ray)
                    self._run(here, others)
                    continue
            except Exception as error:  # noqa: BLE001 - not Ctrl-C, which ends the walk at once
                self.errors.append(error)
            if not self.beside:
                break
            self._take_ended(wait=True)
        for further in self.errors[1:]:
            self.site.display.stage("failed", str(further))
        if self.errors:
            raise self.errors[0]
        ran = tuple(stage.name for stage in self.chosen if stage.name in self.ran)
        return FlowResult(self.given, self.skipped, ran, self.inputs)

    def _ready(self) -> list[Stage[Any]]:
        """Return the stages that have to run and can; those whose results are there are skipped."""
        ready = []
        for stage in tuple(self.waiting):
            if self.given.missing(stage.spec):
                continue
            status = stage.look(self.site, self.given)
            self.inputs[stage.name] = status.inputs
            if status.result is None:
                ready.append(stage)
                continue
            self.site.display.stage(stage.name, f"skipped: {status.reason}")
            self.skipped[stage.name] = status.reason
            self.waiting.remove(stage)
            self.given = self.given.having(stage.spec, status.result)
        return ready

    def _run(self, here: Stage[Any], others: Sequence[Stage[Any]]) -> None:
        """Run a stage in this thread, which has the signals, and start those of the others for which there is room."""
        for later in self.waiting:  # before hours of work
            later.check(self.site, self.given)
        beside = [other for other in others if other.on_ray and other.has_room(self.site)]
        alone = [other for other in others if other not in beside]
        if alone and here.fills_time(self.site):
            here, beside = alone[0], []
        for other in beside:
            self.site.display.stage(other.name, f"beside {here.name}")
            self.waiting.remove(other)
            self.beside += 1
            threading.Thread(target=self._work, args=(other, self.given), name=other.name, daemon=True).start()
        self.waiting.remove(here)
        self._take(here, here.run(self.site, self.given))

    def _work(self, stage: Stage[Any], given: Results) -> None:
        """Run a stage in a thread."""
        try:
            self._ended.put((stage, stage.run(self.site, given), None))
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that walks
            self._ended.put((stage, None, error))

    def _take_ended(self, *, wait: bool) -> None:
        """Take what stages in threads have made; wait for one of them, or for none."""
        while self.beside and (wait or not self._ended.empty()):
            stage, result, error = self._ended.get()
            self.beside, wait = self.beside - 1, False
            if error is None:
                self._take(stage, result)
            else:
                self.errors.append(error)

    def _take(self, stage: Stage[Any], result: Any) -> None:
        self.ran.add(stage.name)
        self.given = self.given.having(stage.spec, result)


def preview(
    stages: Sequence[Stage[Any]], site: Site, first: str | None = None, last: str | None = None
) -> tuple[StagePreview, ...]:
    """Return what `walk` would do with each stage; nothing is started or written.

    Raises:
        ConfigError: as `walk`.
        PipelineError: a stage would refuse to run; says why and what to do.
    """
    before, chosen = select(stages, first, last)
    given = _results(before, chosen, site)
    found = []
    for stage in chosen:
        missing = given.missing(stage.spec)
        if missing:
            reason = f"it is made from the {missing[0]}, which is not there yet"
            found.append(StagePreview(stage.name, True, reason, stage.output, {}))
            continue
        status = stage.look(site, given)
        found.append(StagePreview(stage.name, status.result is None, status.reason, stage.output, status.inputs))
        if status.result is not None:
            given = given.having(stage.spec, status.result)
    running = [stage for stage, row in zip(chosen, found, strict=True) if row.runs]
    graph = [stage.spec for stage in stages]

    def beside(stage: Stage[Any]) -> tuple[str, ...]:
        others = [other for other in running if stage.on_ray or other.on_ray]
        return tuple(other.name for other in others if independent(stage.spec, other.spec, graph))

    return tuple(
        replace(row, beside=beside(stage)) if row.runs else row for stage, row in zip(chosen, found, strict=True)
    )


def _results(before: Sequence[Stage[Any]], chosen: Sequence[Stage[Any]], site: Site) -> Results:
    """Return the results of those stages before the chosen ones that these need, or that such a stage does.

    Raises:
        ConfigError: one is not there.
    """
    given, needed = Results(), {name for stage in chosen for name in stage.spec.needs}
    for stage in reversed(before):
        needed |= set(stage.spec.needs) if stage.spec.gives in needed else set()
    for stage in before:
        if stage.spec.gives not in needed:
            continue
        status = stage.look(site, given)
        if status.result is None:
            raise ConfigError(
                f"the result of {stage.name}, which comes before, is not there: {status.reason}. "
                f"Start with --from {stage.name}, or without --from"
            )
        given = given.having(stage.spec, status.result)
    return given
