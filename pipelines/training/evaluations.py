"""Evaluation during training: a thread of the driver has the run's published checkpoints scored.

Each published checkpoint becomes a logged model of the MLflow run. Those that `evaluation.every` asks for are scored,
one at a time, the newest first: on resources of the Ray cluster that the training will never want, or else when it has
ended. An evaluation that fails, and services that are away, cost scores and not training: a resumed run makes up for
what was not tried.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace

from pipelines import checkpoints, tracking
from pipelines.checkpoints import BEST, Published
from pipelines.config import Config
from pipelines.evaluation.recorded import Scored
from pipelines.presentation.errors import ConfigError, PipelineError
from pipelines.presentation.progress import Notice
from pipelines.remote.tasks import named
from pipelines.signing import Authority
from pipelines.storage import FencedError, layout
from pipelines.storage.retry import TransientError
from pipelines.tracking import CheckpointModel, Tracker
from pipelines.training.loop.context import Job
from pipelines.training.loop.progress import passes
from pipelines.training.scoring import CancelledError, Evaluate, needs

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 5.0
"""How often MLflow is asked for checkpoints that were published."""
STATE_TAG = "ddpm.evaluation"
"""Tag of a logged model: "scored", or why it is not."""
URI_TAG, DIGEST_TAG, DELETED_TAG = "ddpm.uri", "ddpm.digest", "ddpm.deleted"


def due(images: Iterable[int], every: int | None, end: int) -> set[int]:
    """Return the published checkpoints whose scores are due.

    They are the first one at or after each multiple of `every` images, and the one at the end of the run.

    Args:
        images: seen by the published checkpoints of the run.
        every: None for none at all.
        end: length of the run in images.
    """
    found, before = set(), 0
    for seen in sorted(images):
        if every is not None and (seen >= end or passes(before, seen, every)):
            found.add(seen)
        before = seen
    return found


def to_score(
    records: Sequence[Published], every: int | None, end: int, tried: Container[int], settled: Container[int]
) -> list[Published]:
    """Return the published checkpoints that are due and have no scores, in the order in which they are scored.

    The newest comes first. One that an earlier driver has tried is not tried again, unless it is the newest.

    Args:
        tried: images seen by those that an earlier driver tried or left out.
        settled: the same of this driver.
    """
    wanted = due([p.images_seen for p in records], every, end)
    left = [p for p in records if p.images_seen in wanted and not (p.scores or p.deleted or p.images_seen in settled)]
    newest = max((p.images_seen for p in records), default=0)
    again = [p for p in left if p.images_seen not in tried or p.images_seen == newest]
    return sorted(again, key=lambda p: -p.images_seen)


def has_outstanding(tracker: Tracker, config: Config, end: int) -> bool:
    """Return whether a run that has ended has checkpoints that are still to be scored; nothing is written.

    That is a published checkpoint that is no logged model yet, or one that is to be scored.

    Args:
        end: length of the run in images.

    Raises:
        TrackingError: MLflow does not answer.
    """
    records = [Published.read(tracker, name) for name in tracker.names(layout.CHECKPOINTS_RECORDED)]
    models = tracking.checkpoint_models(tracker)
    tried = {images for images, model in models.items() if model.tags.get(STATE_TAG)}
    unentered = any(published.images_seen not in models for published in records)
    return unentered or bool(to_score(records, config.evaluation.every, end, tried, ()))


class Evaluations:
    """The evaluations of a run during the life of a driver; a context, in which its thread runs.

    Args:
        end: length of the run in images, as far as is known.
        evaluate: scores a checkpoint; called in the thread, which it may hold for as long as it takes.
        has_room: whether the cluster has resources for an evaluation beside the training.
        notice: called with lines for the user.
    """

    def __init__(self, job: Job, end: int, evaluate: Evaluate, has_room: Callable[[], bool], notice: Notice) -> None:
        self.job, self.end, self.evaluate, self.has_room, self.notice = job, end, evaluate, has_room, notice
        self.config: Config = job.config
        self.tracker = replace(job.tracker, patience_s=0)
        self.records: dict[str, Published] = {}  # by name
        self.models: dict[int, CheckpointModel] | None = None  # by images seen; None before they were read
        self.tried: set[int] = set()
        self.settled: set[int] = set()
        self.unrecorded: tuple[Published, Scored] | None = None
        self.at_work: int | None = None  # images seen by the checkpoint that is being scored
        self._said: set[str] = set()
        self._retire_next = True
        self._wake, self._ended, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def __enter__(self) -> Evaluations:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._cancelled.set()
        self._wake.set()
        self._thread.join(LOOK_EVERY_S)

    def finish(self) -> None:
        """Wait until the remaining checkpoints are scored; called after the training has seen all its images.

        At most `evaluation.wait_s` seconds, and until Ctrl-C; of several that are left the newest is scored.
        """
        self._ended.set()
        self._wake.set()
        wait_s = self.config.evaluation.wait_s
        deadline = time.monotonic() + wait_s
        try:
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._thread.join(0.5)
                if (images := self.at_work) is not None:
                    self._say_once(
                        f"waiting for the evaluation at {images:,} images, at most {wait_s:,.0f} s; Ctrl-C ends the "
                        "training without it"
                    )
        except KeyboardInterrupt:
            logger.debug("interrupted by the user")
        if self._thread.is_alive() and self.config.evaluation.every is not None:
            self.notice("the evaluations that are left are not waited for: the same command makes up for them")

    def newest_distance(self) -> tuple[int, float] | None:
        """Return (images seen, Frechet distance) of the newest checkpoint with scores; None where there is none yet."""
        found = [(p.images_seen, p.scores[BEST]) for p in list(self.records.values()) if BEST in p.scores]
        return max(found, default=None)

    def outstanding(self) -> bool:
        """Record published checkpoints as logged models, and return whether one is still to be scored.

        Raises:
            TrackingError, StorageError: MLflow or storage does not answer.
        """
        self._look()
        return bool(self._to_score())

    def _run(self) -> None:
        away_since: float | None = None
        while not self._cancelled.is_set():
            ended = self._ended.is_set()
            try:
                if self._round(ended):
                    continue
                away_since = None
                if ended:
                    return
            except FencedError as error:
                logger.warning("no more checkpoints are scored: %s", error)
                return
            except Exception as error:
                if self.config.evaluation.every is not None:
                    self._say_once(f"checkpoints are not scored for now: {error}")
                logger.debug("the evaluations of the run wait", exc_info=error)
                away_since = time.monotonic() if away_since is None else away_since
                if ended and time.monotonic() - away_since >= self.job.tracker.patience_s:
                    return
            (self._cancelled if ended else self._wake).wait(LOOK_EVERY_S)

    def _round(self, ended: bool) -> bool:
        """Look for new checkpoints and score one; return whether one was tried.

        Args:
            ended: whether the training has ended.
        """
        if self.unrecorded is not None:
            self._record(*self.unrecorded)
        self._look()
        self._retire()
        todo = self._to_score()
        if not todo:
            return False
        newest, *older = todo
        if ended and older:
            self._leave_out(older)
        elif not ended and not self.has_room():
            asked = named(needs(self.config))
            self._say_once(
                f"the evaluation at {newest.images_seen:,} images, and later ones, wait: no node of the cluster has "
                f"{asked} free beside what the training may want. When it has ended, the newest checkpoint is scored",
            )
            return False
        self._score(newest)
        return True

    def _look(self) -> None:
        """Read the records that are new, and the newest once more, which a restart of the workers may replace."""
        if self.models is None:
            self.models = tracking.checkpoint_models(self.tracker)
            self.tried = {images for images, model in self.models.items() if model.tags.get(STATE_TAG)}
        names = sorted(self.tracker.names(layout.CHECKPOINTS_RECORDED))
        for name in names:
            if name not in self.records or name == names[-1]:
                self._enter(Published.read(self.tracker, name))

    def _enter(self, published: Published) -> None:
        """Record a published checkpoint as a logged model, or update its logged model."""
        assert self.models is not None
        images, model = published.images_seen, self.models.get(published.images_seen)
        said = {URI_TAG: published.uri, DIGEST_TAG: published.digest}
        if model is None or not said.items() <= model.tags.items():
            self._check_fence()
            if model is not None:  # these are other weights
                said |= {STATE_TAG: ""}
                self.tried.discard(images)
                self.settled.discard(images)
            self.models[images] = tracking.enter_checkpoint_model(self.tracker, images, said)
        self.records[published.name] = published

    def _to_score(self) -> list[Published]:
        every = self.config.evaluation.every
        return to_score(list(self.records.values()), every, self.end, self.tried, self.settled)

    def _score(self, published: Published) -> None:
        self._enter(Published.read(self.tracker, published.name))
        published, images = self.records[published.name], published.images_seen
        if published.scores or published.deleted:  # meanwhile, by `ddpm evaluate`, say
            return
        self._check_fence()
        self.at_work = images
        try:
            done = self.evaluate(published, self._cancelled)
        except CancelledError as error:
            self.notice(f"{error}; the same command makes up for it")
            return
        except TransientError:
            raise  # it is tried again
        except Exception as error:  # noqa: BLE001 - whatever it is, training matters more
            self.settled.add(images)
            self._failed(images, error)
            return
        finally:
            self.at_work = None
        self.settled.add(images)
        self.unrecorded = (published, done)
        self._record(published, done)

    def _record(self, published: Published, done: Scored) -> None:
        """Record scores, the published checkpoint's record last: until then an interruption repeats this."""
        assert self.models is not None
        images, current = published.images_seen, Published.read(self.tracker, published.name)
        if current.digest != published.digest:  # workers that started again have published other weights meanwhile
            self.unrecorded = None
            self._enter(current)
            return
        model = self.models[images]
        self._check_fence()
        done.record(self.tracker, model, self._authority())
        self.models[images] = tracking.tag_checkpoint_model(self.tracker, model, {STATE_TAG: "scored"})
        scored = replace(current, scores={**current.scores, **done.scores.metrics()})
        checkpoints.record_published(self.tracker, scored)
        self.records[scored.name] = scored
        self.unrecorded, self._retire_next = None, True
        for name, text in done.scores.lines():
            self.notice(f"at {images:,} images: {name} {text}")

    def _authority(self) -> Authority | None:
        """Return who signs scores and samples; None where the key is not on this machine."""
        try:
            return Authority.of(self.config.registry)
        except ConfigError as error:
            self._say_once(f"scores are not signed, so that a registration scores the model again: {error}")
            return None

    def _failed(self, images: int, error: Exception) -> None:
        first = (str(error).strip() or "no reason is given").splitlines()[0]
        first = first if isinstance(error, PipelineError) else f"{type(error).__name__}: {first}"
        self.notice(f"the evaluation at {images:,} images has failed, and training goes on: {first}")
        logger.debug("the evaluation at %d images", images, exc_info=error)
        self._tag(images, {STATE_TAG: f"failed: {first}"[:4900]})
        self.tracker.tags({f"{STATE_TAG}.failed": f"at {images} images: {first}"[:4900]})

    def _leave_out(self, older: Sequence[Published]) -> None:
        run = self.tracker.run_id
        for published in reversed(older):
            images = published.images_seen
            self.notice(f"{images:,} images are left without scores: `ddpm evaluate runs:/{run}/{images}` makes them")
            self.settled.add(images)
            self._tag(images, {STATE_TAG: "left out: the training ended before its turn"})

    def _retire(self) -> None:
        """Delete scored checkpoints that `checkpoint.keep_best` does not keep; once after each new score."""
        keep, run_id = self.config.checkpoint.keep_best, self.tracker.run_id
        if keep is None or not self._retire_next:
            return
        records = list(self.records.values())
        if checkpoints.superseded(records, keep, run_id, [], []):
            versions = tracking.all_versions(self.tracker.uri)
            references = tracking.starting_points(self.tracker.uri, run_id)
            for old in checkpoints.superseded(records, keep, run_id, versions, references):
                current = Published.read(self.tracker, old.name)
                if current != old:  # workers that started again have published other weights meanwhile
                    self._enter(current)
                    continue
                deleted = checkpoints.retire(self.job.storage, self.tracker, self.job.fence, old)
                self.records[deleted.name] = deleted
                self._tag(deleted.images_seen, {DELETED_TAG: f"not among the {keep} best (checkpoint.keep_best)"})
        self._retire_next = False

    def _tag(self, images: int, tags: dict[str, str]) -> None:
        assert self.models is not None
        self.models[images] = tracking.tag_checkpoint_model(self.tracker, self.models[images], tags)

    def _check_fence(self) -> None:
        if self.job.fence is not None:
            self.job.fence.check(patience_s=0)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.notice(text)
