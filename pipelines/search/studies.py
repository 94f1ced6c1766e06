"""A whole study: from a model or a configuration to records, an MLflow run with a page, and the best settings."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from pipelines import tracking
from pipelines.config import Config
from pipelines.evaluation.data import EvaluationData
from pipelines.evaluation.measure import MeasuredSamples, measure
from pipelines.evaluation.samples import SampledModel, SampleSpec
from pipelines.presentation.progress import Silent, StageNotice
from pipelines.search.confirmation import DEFAULT, Confirmed, decide, winner_of
from pipelines.search.judge import Reference
from pipelines.search.observer import Observer, OnChange
from pipelines.search.page import StudyPage, png
from pipelines.search.space import Params
from pipelines.search.study import (
    StudyStore,
    TrialRecord,
    best,
    confirmation_seed,
    count_states,
    earlier_points,
    ended,
    open_study_run,
    trials_seed,
)
from pipelines.search.study_config import StudyConfig, check_space
from pipelines.search.tune_trials import Trials, run_trials
from pipelines.search.watch import TrialWatch
from pipelines.shards.index import Dataset
from pipelines.storage import join, layout
from pipelines.tracking import Tracker
from pipelines.training.resources import connect_ray


@dataclass(frozen=True)
class Lines(Silent):
    """A `Display` of lines alone, for work beside the live table of a study."""

    notice: StageNotice

    def stage(self, name: str, text: str) -> None:
        """Show one line of a stage."""
        self.notice(name, text)


@dataclass
class Search(ABC):
    """The steps of a study, from its start to its page; what its trials run and how they are judged is for its kind.

    Attributes:
        config: the configuration.
        name: of the study.
        study: its settings.
        notice: called with "study" and a line of text.
        base: the configuration that its trials vary.
        subject: the model, or the address of the dataset, that it is about.
        identity: equal for equal subjects; a study can only be resumed with the same.
        data: what its samples are judged by.
    """

    COMMAND: ClassVar[str]
    """The command that runs the study, with places for its fields."""

    config: Config
    name: str
    study: StudyConfig
    notice: StageNotice
    base: Config = field(init=False)
    subject: str = field(init=False)
    identity: str = field(init=False)
    data: EvaluationData = field(init=False)

    def __post_init__(self) -> None:
        self.say = partial(self.notice, "study")
        self.store = StudyStore.of(self.config, self.name)
        self.storage, self.noise_seed = self.store.storage, trials_seed(self.config, self.name)

    @abstractmethod
    def begin(self) -> Dataset:
        """Set `base`, `subject` and `identity`, and return the dataset, before anything is connected."""

    @abstractmethod
    def open(self) -> None:
        """Load what trials share of `data`, by which samples are judged, and check that trials can run."""

    @abstractmethod
    def trials(self, records: Sequence[TrialRecord], parent: str) -> Trials:
        """Return how trials are run.

        Args:
            records: of those that there are.
            parent: ID of the study's MLflow run.
        """

    @abstractmethod
    def confirm(self, records: Sequence[TrialRecord], seed: int) -> list[Confirmed]:
        """Judge the default and the best others again, with more samples and noise of this seed, unknown to trials.

        Returns:
            The scores, best first.
        """

    @abstractmethod
    def conclude(
        self, records: Sequence[TrialRecord], confirmed: Sequence[Confirmed], tracker: Tracker
    ) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
        """Keep what was found.

        Returns:
            What the answer has beside that of all studies, notes on the cost, and trial -> images, uint8 [N, H, W, C].
        """

    def measure(
        self, subjects: Mapping[str, SampledModel], n: int, seed: int, **options: Any
    ) -> dict[str, MeasuredSamples]:
        """Return what n new samples of each subject say, all on the same noise; see `pipelines.evaluation.measure`."""
        request = replace(SampleSpec.of(self.base), n=n, seeds=(seed,))
        return measure(subjects, request, self.data, Lines(self.notice), "study", **options)

    def judge_again(
        self, chosen: Mapping[str, Params], subjects: Mapping[str, SampledModel], seed: int, **options: Any
    ) -> list[Confirmed]:
        """Return the scores of new samples, best first; their distance decides, or the bounds where they are asked for.

        Args:
            chosen: trial -> its parameters, `DEFAULT` among the trials.
            subjects: trial -> what draws the samples.
            seed: of the noise.
            options: of `measure`.
        """
        found = self.measure(subjects, self.study.confirm_samples, seed, **options)
        reference = Reference.of(self.data.real)
        scored = {
            trial: reference.scores(of.features, of.class_accuracy, of.evaluations)[0] for trial, of in found.items()
        }
        measured = {trial: of.bound or of.distance for trial, of in found.items()}
        measure = "bits_per_dim" if found[DEFAULT].bound else found[DEFAULT].measure
        return decide(chosen, {trial: of.sampling for trial, of in subjects.items()}, measured, scored, measure)

    def run(
        self, *, resume: bool, after: Sequence[str], on_change: OnChange
    ) -> tuple[TrialRecord | None, dict[str, Any]]:
        """Run the study, or what is left of it.

        Args:
            resume: whether it may exist already.
            after: names of earlier studies whose best trials are tried first.
            on_change: called after every change of a trial.

        Returns:
            The trial that is best in the first objective, if one finished, and the result as JSON types.

        Raises:
            ConfigError, StudyError, ModelError, DatasetError: the study cannot start.
        """
        began, config = time.monotonic(), self.config
        dataset = self.begin()
        check_space(self.study, self.base)
        first = earlier_points(
            self.study, self.base, (StudyStore.of(config, other) for other in after), notice=self.say
        )
        connect_ray(config)
        self.data = EvaluationData(dataset, config, notice=self.say)
        self.open()
        records = self.store.open(self.study, self.base, self.identity, resume=resume)
        with self._opened_run() as tracker:
            watch = TrialWatch(config.cluster.patience_s, self.say)
            observer = Observer(self.store, self.study, tracker, config, on_change, watch)
            observer.begin(records)
            run_trials(self.trials(records, tracker.run_id), self.study, self.base, records, observer, first)
            observer.settle()
            return self._publish(tracker, self.store.records(), began)

    def _publish(
        self, tracker: Tracker, records: list[TrialRecord], began: float
    ) -> tuple[TrialRecord | None, dict[str, Any]]:
        """Confirm the best trials, keep what was found, and write the page beside the records and into MLflow.

        Figures are logged as well, as PNG where plotly can render them.
        """
        seeds = {"trials": self.noise_seed, "confirmation": confirmation_seed(self.config, self.name, ended(records))}
        confirmed = self.confirm(records, seeds["confirmation"])
        winner, top = winner_of(confirmed), best(records, self.study.objectives[0])
        self.say(
            "no setting beats the default by more than chance"
            if winner is None
            else f"trial {winner.trial} beats the default by {winner.gained} on fresh noise"
        )
        own, notes, pictures = self.conclude(records, confirmed, tracker)
        found = {
            "confirmed": [asdict(c) | {"settings": c.settings.to_json()} for c in confirmed],
            "winner": None if winner is None else winner.trial,
            "seeds": seeds,
        }
        self.store.record_confirmation({**found, "after": ended(records)})
        seconds, command = time.monotonic() - began, self.COMMAND.format(search=self)
        notes = [*notes, f"{seconds:,.0f} s for this call."]
        page = StudyPage(self.name, self.study, self.subject, records, confirmed, pictures, seeds, command, notes)
        text, where = page.html(), join(self.store.uri, layout.STUDY_PAGE)
        self.storage.write(where, text.encode())
        with tracking.warn_on_error(f"the study's page, which is {where}"):
            tracker.text(text, layout.STUDY_PAGE)
            for name, figure in page.figures().items():
                tracker.text(figure.to_json(), f"{layout.FIGURES}/{name}.json")
                if (picture := png(figure)) is not None:
                    tracker.file(picture, f"{layout.FIGURES}/{name}.png")
            if top is not None:
                tracker.metrics({"search/frechet_distance": top.scores["frechet_distance"]}, len(records))
                tracker.tags({"ddpm.best": top.trial})
            tracker.status("FINISHED")
        answer = {"study": self.name, "run_id": tracker.run_id, "url": tracker.url, "trials": count_states(records)}
        return top, {**answer, **found, **own, "page": where, "seconds": seconds}

    @contextmanager
    def _opened_run(self) -> Iterator[Tracker]:
        """Open the study's MLflow run, the parent of its trials'; what breaks the study off makes it FAILED or KILLED.

        Ray ends the trials that run with this process. Their records say that they run, so that `--resume` runs them
        again.
        """
        kind = self.study.kind
        about = "its trials are the runs below it, its page is the artifact `study.html`."
        tracker = open_study_run(self.config, self.name, kind, f"{kind} study of {self.subject}; {about}")
        try:
            tracker.status("RUNNING")  # a study that goes on has the status with which it stopped
            tracker.text(tracking.to_json(self.study.model_dump(mode="json", by_alias=True)), layout.STUDY)
            yield tracker
        except BaseException as error:
            # Ctrl-C, and SIGTERM, by which a job on a cluster is stopped: Ray makes it a SystemExit.
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            with tracking.warn_on_error(f"the status {status} of the study"):
                replace(tracker, patience_s=0).status(status)
            raise
