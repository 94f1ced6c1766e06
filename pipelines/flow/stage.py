"""A stage of the flow: a value that says what it needs, where its result is, whether it exists, and how to make it.

This module imports nothing that takes long, so that whoever only asks for the graph gets it at once.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pipelines.presentation.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.evaluation.evaluators import Evaluator
    from pipelines.evaluation.scores import Scores
    from pipelines.presentation.progress import Display
    from pipelines.registry import Verdict
    from pipelines.shards.index import Dataset
    from pipelines.storage import Storage
    from pipelines.tracking import ModelVersion
    from pipelines.training.driver import TrainingResult

T = TypeVar("T")


@dataclass(frozen=True)
class StageSpec:
    """The place of a stage in the graph, whatever the configuration.

    Attributes:
        name: of the stage.
        gives: name of its result, a field of `Results`.
        needs: names of the results that it is made from.
        title: what it does, in words.
    """

    name: str
    gives: str
    needs: tuple[str, ...]
    title: str


INGEST = StageSpec("ingest", "dataset", (), "Shards of the source's images, with their index")
TRAIN = StageSpec("train", "run", ("dataset",), "A run that has seen all its images, with published checkpoints")
EVALUATOR = StageSpec("evaluator", "evaluator", ("dataset",), "The network that judges samples, the same for all runs")
EVALUATE = StageSpec(
    "evaluate", "evaluation", ("dataset", "run", "evaluator"), "Scores of the run's newest published checkpoint"
)
REGISTER = StageSpec(
    "register", "version", ("dataset", "run", "evaluation"), "A signed model version with its evidence"
)
GATE = StageSpec("gate", "champion", ("version",), "The guarded alias at the version, where the gate lets it pass")

GRAPH = (INGEST, TRAIN, EVALUATOR, EVALUATE, REGISTER, GATE)
"""The stages in an order in which they can run."""


def independent(one: StageSpec, other: StageSpec, graph: Sequence[StageSpec] = GRAPH) -> bool:
    """Return whether neither of two places needs, over any number of stages between them, the result of the other."""

    def below(spec: StageSpec) -> set[str]:
        needed = [found for found in graph if found.gives in spec.needs]
        return {spec.gives}.union(*map(below, needed))

    return one.gives not in below(other) and other.gives not in below(one)


@dataclass(frozen=True)
class Results:
    """The results of stages, as far as they are there."""

    dataset: Dataset | None = None
    run: TrainingResult | None = None
    evaluator: Evaluator | None = None
    evaluation: Scores | None = None
    version: ModelVersion | None = None
    champion: Verdict | None = None

    def having(self, spec: StageSpec, result: Any) -> Results:
        """Return these results with that of a stage."""
        given: dict[str, Any] = {spec.gives: result}
        return replace(self, **given)

    def missing(self, spec: StageSpec) -> tuple[str, ...]:
        """Return the names of results that a stage needs and that are not there."""
        return tuple(name for name in spec.needs if getattr(self, name) is None)


def there(result: T | None) -> T:
    """Return a result that a stage needs, which is there before the stage is looked at."""
    assert result is not None
    return result


def digest(plain: Any) -> str:
    """Return the SHA-256 of JSON types, for what a stage is made from."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Site:
    """Where stages run.

    Attributes:
        storage: reads and writes what is stored.
        lineage: which code runs, see `pipelines.environment.lineage`.
        display: shows what is done.
        training_ends: `time.monotonic()` at which a new training that has seconds is to end, if it began at once; None
            where its configuration alone says how many it has.
    """

    storage: Storage
    lineage: Mapping[str, Any]
    display: Display
    training_ends: float | None = None


@dataclass(frozen=True)
class StageStatus(Generic[T]):
    """The state of a stage's result in storage, MLflow and the registry.

    Attributes:
        result: None where it is not there, or is that of another input or of other settings.
        reason: why it is there or is not, in words.
        inputs: digests of what it is made from, by name.
    """

    result: T | None
    reason: str
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage(ABC, Generic[T]):
    """A stage of the flow of a configuration; nothing happens before one of its methods is called.

    Attributes:
        config: the run, with every address filled in.
    """

    spec: ClassVar[StageSpec]
    on_ray: ClassVar[bool] = False
    """Whether all of its work is done in Ray tasks, so that it may run in a thread beside another stage."""
    config: Config

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.spec.name

    @property
    @abstractmethod
    def output(self) -> str:
        """Address of the result."""

    def fills_time(self, site: Site) -> bool:
        """Return whether the stage takes as long as the others leave to it, so that they come first if they can."""
        return False

    @abstractmethod
    def inputs(self, site: Site, given: Results) -> dict[str, str]:
        """Return the digests of what the result is made from, by name.

        Args:
            given: what the stage needs.
        """

    def check(self, site: Site, given: Results) -> None:
        """Check what can be known of a run of this stage before an earlier one starts.

        Args:
            given: the results that are there by then.

        Raises:
            PipelineError: the stage would fail; says why and what to do.
        """

    def has_room(self, site: Site) -> bool:
        """Return whether the cluster has room for this stage beside one that uses all that `cluster` asks for.

        It is asked of stages with `on_ray` only, right before both start.
        """
        return False

    def look(self, site: Site, given: Results) -> StageStatus[T]:
        """Look whether the result is there, made from what is there now; nothing is started or written.

        Arguments and errors are those of `done`.
        """
        inputs = self.inputs(site, given)
        return replace(self.done(site, given, inputs), inputs=inputs)

    @abstractmethod
    def done(self, site: Site, given: Results, inputs: Mapping[str, str]) -> StageStatus[T]:
        """Look whether the result is there, made from these inputs; nothing is started or written.

        Args:
            given: what the stage needs.
            inputs: the digests of that.

        Raises:
            PipelineError: something else is in its place, which a run would refuse too.
        """

    @abstractmethod
    def run(self, site: Site, given: Results) -> T:
        """Make the result.

        Args:
            given: what the stage needs.

        Raises:
            PipelineError: it cannot be made; says why and what to do.
        """


S = TypeVar("S", StageSpec, Stage[Any])


def select(stages: Sequence[S], first: str | None, last: str | None) -> tuple[tuple[S, ...], tuple[S, ...]]:
    """Return the stages before the first one that may run, and those that may run.

    Args:
        first: name of the first one; None for the first of all.
        last: name of the last one; None for the last of all.

    Raises:
        ConfigError: there is no such stage, or the last one comes before the first.
    """
    names = [stage.name for stage in stages]
    for option, name in (("--from", first), ("--until", last)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: there is no such stage. Allowed: {', '.join(names)}")
    start = 0 if first is None else names.index(first)
    end = len(names) - 1 if last is None else names.index(last)
    if end < start:
        raise ConfigError(
            f"--from {first} --until {last}: {last} comes before {first}. The order is {', '.join(names)}"
        )
    return tuple(stages[:start]), tuple(stages[start : end + 1])
