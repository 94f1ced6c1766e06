"""The records of a study, one file for each trial, with its parameters, state and scores; and its noise.

They are the only state of a study. A resumed study reads them, gives the ended trials to Optuna, runs those that were
running again, and counts both towards its number of trials.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import typing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipelines import tracking
from pipelines.config import Config, ConfigError
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.progress import Notice, no_notice
from pipelines.search.space import Params, Value, apply
from pipelines.search.study_config import DIRECTIONS, Objective, StudyConfig, study_name
from pipelines.storage import NotFoundError, Storage, join, layout
from pipelines.tracking import Tracker

State = Literal["finished", "stopped", "failed", "running"]


class StudyError(PipelineError):
    """A study cannot start or be resumed."""


@dataclass(frozen=True)
class TrialRecord:
    """The record of one trial.

    Attributes:
        trial: name, equal for equal parameters.
        params: path in the configuration -> value.
        state: "stopped" means before its end, because other trials were better; "failed" has an `error`.
        scores: the last reported scores by name.
        history: all reported scores, in order.
        run_id: ID of its MLflow run; None before it has one.
        seconds: wall time from `began` to its end.
        error: why it failed.
        began: start time, in seconds since the epoch.
    """

    trial: str
    params: dict[str, Value]
    state: State
    scores: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    run_id: str | None = None
    seconds: float = 0.0
    error: str | None = None
    began: float = field(default_factory=time.time)

    def reported(self, scores: Mapping[str, float]) -> TrialRecord:
        """Return the record with one more report of scores."""
        return replace(self, scores=dict(scores), history=[*self.history, dict(scores)])

    def ended(self, state: State, error: str | None = None) -> TrialRecord:
        """Return the record of a trial that has ended in a state."""
        return replace(self, state=state, error=error, seconds=time.time() - self.began)


def trial_name(params: Params) -> str:
    """Return the name of a trial, a digest of its parameters."""
    return hashlib.sha256(json.dumps(dict(sorted(params.items()))).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class StudyStore:
    """The folder of a study, `ROOT/studies/NAME`.

    It holds `study.json`, `trials/TRIAL.json`, and `confirmation.json`, what the last confirmation found.
    """

    storage: Storage
    uri: str

    @classmethod
    def of(cls, config: Config, name: str) -> StudyStore:
        """Return the store of the study of this name.

        Raises:
            ConfigError: no study can be called that.
        """
        return cls(Storage.of(config), layout.study_folder(config.storage.root, study_name(name)))

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return self.uri.rsplit("/", 1)[-1]

    def open(self, study: StudyConfig, base: Config, subject: str, *, resume: bool) -> list[TrialRecord]:
        """Create a study, or check that it can be resumed, and return the trials so far.

        `study.json` says what it was last started as.

        Args:
            study: its settings.
            base: the configuration that its trials share.
            subject: identifies the model that is sampled, or the dataset that is trained on.
            resume: whether the study may exist already.

        Raises:
            StudyError: it exists and `resume` is false, or it has other settings.
        """
        described = {**self.describe(study, base, subject), "noise_seed": trials_seed(base, self.name)}
        where, text = join(self.uri, layout.STUDY), json.dumps(described, indent=1).encode()
        stored = self.storage.find(where)
        if stored is None:
            self.storage.write(where, text)
            return []
        if not resume:
            raise StudyError(
                f"a study '{self.name}' is at {self.uri}: go on with --resume, or give another --study NAME"
            )
        before = json.loads(stored)
        before["config"] = base.with_later_defaults(before.get("config", {}), described["config"])
        differing = [key for key in described if key != "trials" and before.get(key) != described[key]]
        if differing:
            raise StudyError(
                f"the study '{self.name}' was begun with another {', '.join(differing)}: resume it with the same, "
                "or begin another with --study NAME"
            )
        if before["trials"] != described["trials"]:
            self.storage.write(where, text)
        return self.records()

    @staticmethod
    def describe(study: StudyConfig, base: Config, subject: str) -> dict[str, Any]:
        """Return what a resumed study is compared by.

        The number of trials may grow, and fields that name machines, addresses and caches are left out.
        """
        plain = study.model_dump(mode="json", by_alias=True)
        machines: dict[str, Any] = {
            "cluster": True,
            "storage": True,
            "tracking": True,
            "launch": True,
            "data": {"cache_dir", "cache_gib", "memory_mib", "decode_threads", "prefetch_batches"},
        }
        trials, shared = plain.pop("trials"), base.model_dump(mode="json", exclude=machines)
        return json.loads(json.dumps({"space": plain, "config": shared, "subject": subject, "trials": trials}))

    def description(self) -> dict[str, Any]:
        """Return the content of `study.json`.

        Raises:
            StudyError: there is no such study.
        """
        try:
            return json.loads(self.storage.read(join(self.uri, layout.STUDY)))
        except NotFoundError as error:
            folder = self.uri.rpartition("/")[0]
            there = sorted({e.uri[len(folder) + 1 :].split("/")[0] for e in self.storage.list(folder)})
            raise StudyError(f"no study at {self.uri}; there are: {', '.join(there) or 'none'}") from error

    def study(self) -> StudyConfig:
        """Return the study as it was last started.

        Raises:
            StudyError: there is no such study.
        """
        described = self.description()
        return StudyConfig.model_validate({**described["space"], "trials": described["trials"]})

    def record(self, record: TrialRecord) -> None:
        """Write the record of a trial."""
        where = layout.trial_file(self.uri, record.trial)
        self.storage.write(where, json.dumps(asdict(record), indent=1).encode())

    def record_confirmation(self, found: Mapping[str, Any]) -> None:
        """Write what the last confirmation found, JSON types, as `confirmation.json`."""
        self.storage.write(join(self.uri, layout.CONFIRMATION), json.dumps(found, indent=1).encode())

    def records(self) -> list[TrialRecord]:
        """Return all records, in the order in which the trials began."""
        found = self.storage.list(join(self.uri, layout.TRIALS))
        with ThreadPoolExecutor(8) as pool:
            records = pool.map(lambda entry: TrialRecord(**json.loads(self.storage.read(entry.uri))), found)
        return sorted(records, key=lambda record: record.began)


def open_study_run(config: Config, name: str, kind: str, note: str) -> Tracker:
    """Return the MLflow run of a study, the one that there is or a new one.

    Args:
        kind: of the study.
        note: shown as the run's description.
    """
    tags = {"ddpm.study": name, "ddpm.study.kind": kind, "mlflow.note.content": note}
    return tracking.open_run(config.tracking.server, config.tracking.experiment, f"study-{name}", tags)[0]


# --- noise seeds ---------------------------------------------------------------------------------------------
# They are functions of a study's name, so that no two studies select and confirm on the same noise: a study that takes
# its first trials from another one would otherwise be given again the noise on which these have been chosen. No study
# uses the seeds of `ddpm evaluate`.


def trials_seed(config: Config, study: str) -> int:
    """Return the seed of all trials of the study of this name, which are compared on the same noise."""
    return _hashed(f"trials|{study}", config)


def confirmation_seed(config: Config, study: str, trials: Iterable[str]) -> int:
    """Return the seed of the confirmation after these trials: another one when the study has gone on."""
    return _hashed(f"confirmation|{study}|{','.join(sorted(trials))}", config, trials_seed(config, study))


def _hashed(text: str, config: Config, *taken: int) -> int:
    """Return a number below 2^48 that is a function of a text, and no seed that is taken or of evaluations."""
    asked = config.evaluation
    found = (hashlib.sha256(f"{text}|{attempt}".encode()).digest() for attempt in itertools.count())
    seeds = (int.from_bytes(digest[:6]) for digest in found)
    return next(seed for seed in seeds if seed not in (*range(asked.seed, asked.seed + asked.seeds), *taken))


# --- comparison of records -----------------------------------------------------------------------------------


def done(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the records of trials that finished or were stopped."""
    return [record for record in records if record.state in ("finished", "stopped")]


def ended(records: Iterable[TrialRecord]) -> list[str]:
    """Return the names of the trials that have ended in whichever way."""
    return [record.trial for record in records if record.state != "running"]


def count_states(records: Iterable[TrialRecord]) -> dict[str, int]:
    """Return the number of trials in each state."""
    states = [record.state for record in records]
    return {state: states.count(state) for state in typing.get_args(State)}


def loss(record: TrialRecord, objective: Objective) -> float:
    """Return the objective of a trial with the sign that makes lower better; infinity where it has no finite score."""
    score = record.scores.get(objective, math.nan)
    return math.inf if not math.isfinite(score) else score if DIRECTIONS[objective] == "min" else -score


def best(records: Iterable[TrialRecord], objective: Objective = "frechet_distance") -> TrialRecord | None:
    """Return the best finished trial, or None; a stopped one was judged with less training or fewer samples."""
    finished = [r for r in records if r.state == "finished" and math.isfinite(loss(r, objective))]
    return min(finished, key=lambda record: loss(record, objective), default=None)


def pareto_front(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the finished trials that no other trial dominates, ordered by the last objective.

    A trial dominates another that it equals or beats in every objective and beats in at least one.
    """
    finished = [r for r in records if r.state == "finished" and all(math.isfinite(loss(r, o)) for o in objectives)]

    def beats(a: TrialRecord, b: TrialRecord) -> bool:
        pairs = [(loss(a, o), loss(b, o)) for o in objectives]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    front = [r for r in finished if not any(beats(other, r) for other in finished)]
    return sorted(front, key=lambda record: loss(record, objectives[-1]))


def earlier_points(
    study: StudyConfig, base: Config, stores: Iterable[StudyStore], each: int = 3, notice: Notice = no_notice
) -> list[Params]:
    """Return the best parameters of earlier studies, as far as they are in this study's space, to try first.

    Args:
        stores: of the earlier studies.
        each: number of trials that are taken from each.
        notice: called with how many of these have no place in this study.

    Raises:
        StudyError: there is no such study.
    """
    found: dict[str, Params] = {}
    for store in stores:
        store.description()
        finished = (record for record in store.records() if record.state == "finished")
        taken, outside = sorted(finished, key=lambda r: loss(r, study.objectives[0]))[:each], 0
        for record in taken:
            shared = {path: value for path, value in record.params.items() if path in study.space}
            # What is in a range is its own nearest value; that has the range's type, as a whole number may be a float.
            params = {path: study.space[path].nearest(value) for path, value in shared.items()}
            if params and params == shared and _is_valid(base, params):
                found.setdefault(trial_name(params), params)
            else:
                outside += 1
        if outside:
            notice(f"of the best {len(taken)} trials of '{store.name}' {outside} are not tried: not in this space")
    return list(found.values())


def _is_valid(base: Config, params: Params) -> bool:
    """Return whether a configuration may have these parameters."""
    try:
        apply(base, params)
    except ConfigError:
        return False
    return True
