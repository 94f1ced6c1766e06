"""Reading of the facts of a report from MLflow and storage.

Parts are read independently: if one is gone, or an earlier release wrote it differently, only its section is missing,
and the notes name it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from ddpm.generate import Sampling
from ddpm.image_size import height_width
from ddpm.model import ModelSpec
from ddpm.models import NETWORKS
from pipelines import tracking
from pipelines.checkpoints import Published, list_published, published_spec
from pipelines.config import Config, DataConfig
from pipelines.evaluation.recorded import evaluation_pictures, read_scores
from pipelines.evaluation.scores import Scores
from pipelines.presentation.charts import Point
from pipelines.presentation.errors import PipelineError
from pipelines.presentation.images import Picture
from pipelines.presentation.progress import Notice, no_notice
from pipelines.registry import Verdict
from pipelines.registry.card import PICTURES, parameters
from pipelines.registry.decision import comparable
from pipelines.report.facts import Facts, Tried
from pipelines.report.subject import ReportSubject
from pipelines.search.space import get_value
from pipelines.search.study import StudyStore, TrialRecord
from pipelines.shards.audit.contents import SourceContents, trained_contents
from pipelines.shards.audit.recorded import IN_THREADS
from pipelines.shards.index import read_dataset
from pipelines.shards.joined import read_data, weight_in_words
from pipelines.shards.read import spread_positions
from pipelines.storage import Storage, join, layout
from pipelines.tracking import ModelVersion
from pipelines.training.ledger import goodput_of, read_sessions

T = TypeVar("T")
SAMPLES, NEAREST = PICTURES
"""Keys of the pictures of an evaluation."""
GRIDS = "samples"
"""Key of the grids of samples that are drawn while a run is trained."""
MOST_GRIDS = 24
"""Grids that the page holds."""
CURVES = ("train/loss", "updates/grad_norm", "train/images_per_s")
DISTANCE, ENDS = "eval/frechet_distance", ("low", "high")
ACCURACY, SOURCE_LOSS = "test/accuracy_tLEVEL".removesuffix("LEVEL"), "train/loss/SOURCE".removesuffix("SOURCE")
"""Prefixes of names: of the accuracies of a classifier of noisy images, and the losses of the sources of a mixture."""
NAMES = 12
"""Classes whose names are shown."""
SETTINGS = {
    "prediction": "objective.prediction",
    "loss": "objective.loss",
    "weight of the loss": "objective.weight",
    "batch size": "batch_size",
    "learning rate": "optim.lr",
    "half-life of the average": "optim.ema_half_life",
    "label drop": "objective.label_drop",
    "precision": "optim.precision",
    "workers": "cluster.num_workers",
    "seed": "seed",
}
"""Name of a setting in a report -> its key in the configuration."""


def gather(subject: ReportSubject, config: Config, notice: Notice = no_notice) -> Facts:
    """Return the recorded facts of a run and its model.

    Args:
        config: with the address of the MLflow server; `registry.alias` names the champion.
        notice: called with each part that cannot be read, and the reason.
    """
    return _Reader(subject, config, notice).facts()


@dataclass
class _Reader:
    """Reads the parts, and caches what several of them need."""

    subject: ReportSubject
    config: Config
    notice: Notice
    notes: list[str] = field(default_factory=list)

    @property
    def storage(self) -> Storage:
        """Reads and writes what is stored."""
        return Storage.of(self.config)

    def facts(self) -> Facts:
        """Return all facts that can be read."""
        tracker, version = self.subject.tracker, self.subject.version
        name = tracker.tag("ddpm.run") or tracker.run_id
        settings = self._read("the run's configuration", lambda: tracking.recorded_config(tracker)) or {}
        published = self._read("the published checkpoints", lambda: list_published(tracker, deleted=True)) or []
        there = [one for one in published if not one.deleted]
        seen = self._images_seen(there)
        of_time = self._read("how long the run took", lambda: self._time(settings, name)) or {}
        described = (published_spec(one, self.storage) for one in there if one.images_seen == seen)
        spec = self._read("the description of the model", lambda: next(described, None))
        training = self._training(settings, spec, seen)
        data = self._read("the data", lambda: self._data(settings)) or ()
        contents = () if spec is None else self._read("what the training data hold", lambda: self._contents(spec)) or ()
        curves = self._read("the curves", lambda: self._curves(published)) or {}
        recorded = self._read("the scores", self._recorded) or []
        of_scores = self._scores(recorded, published, spec, seen)
        artifact = next((name for name, of in recorded if of == of_scores.get("scores")), None)
        verdicts = self._read("the gate's decisions", lambda: _verdicts(version)) or ()
        pictures = self._read("the pictures", lambda: self._pictures(artifact, seen)) or {}
        bound = self._read("the terms of the bound", lambda: self._bound(artifact)) or ()
        tried = tried_by_evaluations(recorded, seen)
        tried += self._read("the studies of this model", self._tried_by_studies) or []
        return Facts(
            name=name,
            reference=self.subject.reference,
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            images_seen=seen,
            classifier=settings.get("task") == "classifier",
            version=None if version is None else version.uri,
            link=self._link(),
            training=training,
            data=data,
            contents=contents,
            curves=curves,
            verdicts=verdicts,
            bound=bound,
            tried=tuple(tried),
            notes=tuple(self.notes),
            **of_time,
            **of_scores,
            **pictures,
        )

    def _read(self, what: str, read: Callable[[], T]) -> T | None:
        """Return a part, or None where it cannot be read."""
        with self._part(what):
            return read()
        return None

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """Read a part; if that fails, continue without it."""
        try:
            yield
        except (PipelineError, LookupError, TypeError, ValueError, OSError) as error:
            self.notes.append(f"{what} could not be read: {error}")
            self.notice(self.notes[-1])

    def _images_seen(self, published: Sequence[Published]) -> int | None:
        version = self.subject.version
        text = "" if version is None else version.tags.get("images_seen", "")
        newest = published[-1].images_seen if published else None
        asked = self.subject.reference.startswith("models:/")
        return int(text) if text.isdecimal() and (asked or newest is None) else newest

    def _link(self) -> str:
        tracker = self.subject.tracker
        return tracker.url if tracker.uri.startswith(("http://", "https://")) else ""

    def _time(self, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return where the time went, and how long it took by the ledger, or else by MLflow."""
        root = get_value(settings, "storage.root") or self.config.storage.root
        goodput = goodput_of(read_sessions(self.storage, layout.run_folder(root, name)))
        if goodput is not None:
            return {"goodput": goodput, "wall_s": goodput.wall_s}
        tracker = self.subject.tracker
        records = [run for run in tracking.list_runs(tracker.uri, name) if run.run_id == tracker.run_id]
        ended = records[0].ended if records else None
        return {"wall_s": None if ended is None else ended - records[0].began}

    def _training(
        self, settings: Mapping[str, Any], spec: ModelSpec | None, seen: int | None
    ) -> tuple[tuple[str, str], ...]:
        rows = []
        if spec is not None:
            kind = "classifier of noisy images" if spec.task == "classifier" else NETWORKS.name_of(spec.network)
            rows.append(("network", f"{kind}, {parameters(spec):,} parameters"))
        asked = settings.get("images")
        if seen is not None:
            # A training that ends by the clock may see more images than its first guess was.
            ahead = asked is not None and seen < asked
            rows.append(("images seen", f"{seen:,} of {asked:,}" if ahead else f"{seen:,}"))
        schedule = settings.get("schedule") or {}
        if "kind" in schedule:
            rows.append(("schedule", _word(schedule)))
        for words, path in SETTINGS.items():
            value = get_value(settings, path)
            rows += [] if value is None else [(words, _word(value))]
        lineage = {} if spec is None else spec.lineage
        code = [str(lineage[key])[:12] for key in ("code_version", "git_commit") if lineage.get(key)]
        rows += [("code", ", commit ".join(code))] if code else []
        return tuple(rows)

    def _data(self, settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        tracker = self.subject.tracker
        uri = tracker.tag("dataset_uri") or get_value(settings, "data.uri")
        digest = tracker.tag("dataset_digest")
        rows = [("address", str(uri))] if uri else []
        rows += [("digest", digest[:12])] if digest else []
        if not uri:
            return tuple(rows)
        sources = get_value(settings, "data.sources") or ()
        for source in sources:
            weights = source["weight"] if isinstance(source["weight"], Mapping) else {0: source["weight"]}
            rows.append((f"source {source['name']}", f"{source['uri']}, weight {weight_in_words(weights)}"))
        with self._part("the index of the dataset"):
            whole = DataConfig.model_validate(settings["data"]) if sources else None
            dataset = read_data(whole, self.storage)[0] if whole else read_dataset(uri, self.storage)
            sides, colours = height_width(dataset.image_size), {1: "grey", 3: "colour"}.get(dataset.channels, "")
            counts = ", ".join(f"{dataset.samples(split):,} {split}" for split in dataset.splits)
            now = "" if digest in (None, dataset.digest) else " (there now: the data have changed since)"
            rows.append(("images", f"{counts}; {colours or dataset.channels} {sides[0]} x {sides[1]}{now}"))
            shown = ", ".join(dataset.classes[:NAMES])
            more = len(dataset.classes) - NAMES
            listed = f": {shown}{f' and {more:,} more' if more > 0 else ''}" if shown else ""
            rows.append(("classes", f"{len(dataset.classes):,}{listed}"))
        return tuple(rows)

    def _contents(self, spec: ModelSpec) -> tuple[SourceContents, ...]:
        return trained_contents(spec.lineage, self.storage, IN_THREADS) if "stream_digest" in spec.lineage else ()

    def _curves(self, published: Sequence[Published]) -> dict[str, tuple[Point, ...]]:
        tracker = self.subject.tracker
        there = tracker.last_steps()
        wanted = [*CURVES, *(key for key in there if key.startswith((ACCURACY, SOURCE_LOSS)))]
        found = {}
        for key in wanted:
            if key in there:
                by_step = dict(tracker.metric(key))  # a resumed run may have a step twice: the later one counts
                found[key] = tuple(Point(step, value) for step, value in sorted(by_step.items()))
        # Of the checkpoints' own settings alone: the curve in MLflow has scores of other settings too.
        distances = tuple(
            Point(one.images_seen, one.scores[DISTANCE], *(one.scores.get(f"eval/frechet_{end}") for end in ENDS))
            for one in published
            if DISTANCE in one.scores
        )
        return found | ({DISTANCE: distances} if distances else {})

    def _recorded(self) -> list[tuple[str, Scores]]:
        """Return (artifact, scores) of every evaluation of the run, those of fewest images first."""
        tracker, found = self.subject.tracker, []
        for name in sorted(name for name in tracker.names(layout.SCORES_RECORDED) if name.endswith(".json")):
            with self._part(f"the scores {name}"):
                found.append((name, read_scores(tracker, name)))
        return found

    def _scores(
        self,
        recorded: Sequence[tuple[str, Scores]],
        published: Sequence[Published],
        spec: ModelSpec | None,
        seen: int | None,
    ) -> dict[str, Any]:
        """Return the scores of the model, and those of the champion if it is another version."""
        version = self._shown_version(seen)
        scores = None
        if version is not None and "scores" in version.tags:
            with self._part(f"the scores of {version.uri}"):
                scores = Scores.from_plain(json.loads(version.tags["scores"]))
        if scores is None:
            settings = None if spec is None else spec.sampling
            scores = own_scores(recorded, settings, seen, {one.images_seen: one.scores for one in published})
        if scores is None:
            return {}
        copies = "" if scores.memorisation is None else str(scores.memorisation.get("verdict", ""))
        found: dict[str, Any] = {"scores": scores, "copies": copies}
        with self._part("the champion"):
            found |= self._champion(version, scores)
        return found

    def _shown_version(self, seen: int | None) -> ModelVersion | None:
        """Return the version if it belongs to the checkpoint that is shown."""
        version = self.subject.version
        return version if version is not None and version.tags.get("images_seen") in (None, str(seen)) else None

    def _champion(self, version: ModelVersion | None, scores: Scores) -> dict[str, Any]:
        name = self.config.registry.model if version is None else version.name
        alias = self.config.registry.alias
        champion = tracking.version(self.subject.tracker.uri, name, alias=alias)
        if champion is None or "scores" not in champion.tags:
            return {}
        if version is not None and champion.version == version.version:
            return {"champion_note": f"This version has the alias {alias}: there is no other to compare it with."}
        theirs = Scores.from_plain(json.loads(champion.tags["scores"]))
        differing = [
            row.name.removeprefix("same ") for row in comparable(scores, theirs, champion.uri) if not row.passed
        ]
        if differing:
            note = f"{champion.uri}, at the alias {alias}, was scored with another {' and '.join(differing)}: "
            return {"champion_note": f"{note}its scores do not compare with these."}
        return {"champion": (champion.uri, theirs)}

    def _pictures(self, artifact: str | None, seen: int | None) -> dict[str, Any]:
        """Return the grids of the training, and the pictures of the evaluation whose scores are shown.

        Args:
            artifact: of those scores.
        """
        names = self.subject.tracker.names("images")
        grids = list(tracking.pictures_of(names, GRIDS).items())
        shown = [grids[i] for i in spread_positions(len(grids), MOST_GRIDS)]
        found: dict[str, Any] = {"growth": tuple((step, self._picture(grid)) for step, grid in shown)}
        evaluated = {} if seen is None else evaluation_pictures(names, artifact, seen)
        for part, key in (("samples", SAMPLES), ("nearest", NEAREST)):
            if key in evaluated:
                found[part] = self._picture(evaluated[key])
        return found

    def _picture(self, name: str) -> Picture:
        return Picture.of_file(self.subject.tracker.read_file(name))

    def _bound(self, artifact: str | None) -> tuple[Point, ...]:
        """Return the terms that the evaluation of the shown scores recorded; the prior's is the last."""
        tracker = self.subject.tracker
        terms = "" if artifact is None else artifact.replace(layout.SCORES_RECORDED, layout.BOUND_TERMS, 1)
        if terms not in tracker.names("bound"):
            return ()
        plain = json.loads(tracker.read_text(terms))
        return tuple(Point(t, bits) for t, bits in zip(plain["timesteps"], plain["bits_per_dim"], strict=True))

    def _tried_by_studies(self) -> list[Tried]:
        root = join(self.config.storage.root, layout.STUDIES)
        below = {entry.uri[len(root) + 1 :].split("/")[0] for entry in self.storage.list(root)}
        found = []
        for name in sorted(below):
            store = StudyStore(self.storage, join(root, name))
            with self._part(f"the study {name}"):
                if self.subject.tracker.run_id in str(store.description().get("subject")):
                    tried = [tried_in_trial(name, record) for record in store.records()]
                    found += [one for one in tried if one is not None]
        return found


def own_scores(
    recorded: Sequence[tuple[str, Scores]],
    settings: Sampling | None,
    seen: int | None,
    of_checkpoints: Mapping[int, Mapping[str, float]],
) -> Scores | None:
    """Return the recorded scores of a checkpoint, or else scores with its own settings, or any scores, or None.

    Args:
        recorded: (artifact, scores) of every evaluation of the run.
        settings: with which the model draws; None where they are not known.
        seen: images seen by the checkpoint.
        of_checkpoints: images seen -> scores in the record of that checkpoint, by which the best one is chosen.
    """
    of_images = [scores for name, scores in recorded if _seen_in(name) == seen]
    own = [s for s in of_images if Sampling.from_json(s.sampling) == settings]
    record = {} if seen is None else of_checkpoints.get(seen, {})
    chosen = [s for s in own if s.metrics().items() <= record.items()]
    return next(reversed(chosen or own or of_images), None)


def _seen_in(artifact: str) -> int | None:
    text = artifact.rsplit("/", 1)[-1].split("-")[0]
    return int(text) if text.isdecimal() else None


def _verdicts(version: ModelVersion | None) -> tuple[Verdict, ...]:
    """Return the gate's verdicts about a version, one per alias."""
    tags = {} if version is None else version.tags
    tables = [text for key, text in sorted(tags.items()) if key.startswith("gate.") and key.endswith(".table")]
    return tuple(Verdict.from_plain(json.loads(text)) for text in tables)


def tried_by_evaluations(recorded: Sequence[tuple[str, Scores]], seen: int | None) -> list[Tried]:
    """Return the distances that `ddpm evaluate` measured for the model, which have no counts of network evaluations."""
    found = []
    for name, scores in recorded:
        if _seen_in(name) == seen and "frechet_distance" in scores:
            distance, scale = scores["frechet_distance"], scores.sampling.get("scale")
            source = f"evaluations, {scores.n:,} samples by {scores.evaluator}"
            point = Point(0.0, distance.value, distance.low, distance.high)
            found.append(Tried(source, point, None, None if scale is None else float(scale)))
    return found


def tried_in_trial(study: str, record: TrialRecord) -> Tried | None:
    """Return the result of a trial of a study; None if it has no distance."""
    distance, samples = record.scores.get("frechet_distance"), record.scores.get("samples")
    if record.state != "finished" or distance is None or not math.isfinite(distance):
        return None
    error, scale = record.scores.get("standard_error"), record.params.get("guidance.scale")
    low, high = (None, None) if error is None else (distance - 1.96 * error, distance + 1.96 * error)
    source = f"study {study}" + (f", {samples:,.0f} samples" if samples else "")
    known = None if isinstance(scale, bool) or not isinstance(scale, int | float) else float(scale)
    return Tried(source, Point(0.0, distance, low, high), record.scores.get("evaluations"), known)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        rest = [f"{k.replace('_', ' ')} {_word(v)}" for k, v in value.items() if k != "kind" and v is not None]
        return ", ".join([*([str(kind)] if kind else []), *rest])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return f"{int(value):,}"
    return str(value)
