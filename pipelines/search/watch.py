"""Trials whose process stands still: their beats stop, and they are ended, so that the study goes on.

Ray notices processes that are gone, and waits without end for one that was stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from pipelines.presentation.progress import Notice

BEAT_S = 1.0
_COUNT_BYTES = 8


def _place() -> str:
    """Return the namespace, in Ray's store of the cluster, of the beats of the trials of this driver."""
    return f"ddpm-beats-{ray.get_runtime_context().get_job_id()}"


class Beats:
    """Beats of an actor of Ray Tune, from a thread, so that a long step is not taken for a process that stands still.

    Args:
        first: ID of the trial that the actor begins with.
    """

    def __init__(self, first: str) -> None:
        context = ray.get_runtime_context()
        self.key, self.place, self.ended = context.get_actor_id(), _place(), threading.Event()
        self.said = cloudpickle.dumps((first, context.current_actor))
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def _beat(self) -> None:
        count = 0
        while not self.ended.is_set():
            count += 1
            with suppress(RayError):  # the cluster's store is away: the next one may arrive
                _internal_kv_put(self.key, count.to_bytes(_COUNT_BYTES, "big") + self.said, namespace=self.place)
            self.ended.wait(BEAT_S)

    def close(self) -> None:
        """Beat no more."""
        self.ended.set()
        with suppress(RayError):
            _internal_kv_del(self.key, namespace=self.place)


class TrialWatch:
    """Ends trials whose process stands still: the first time a trial begins again, the second time it has failed.

    Args:
        patience_s: seconds without a beat after which a process is ended.
        notice: called with what was done.
    """

    def __init__(self, patience_s: float, notice: Notice) -> None:
        self.patience_s, self.notice = patience_s, notice
        self.looked = 0.0
        self.seen: dict[bytes, tuple[bytes, float]] = {}
        self.failed: dict[str, str] = {}
        """ID of a trial that stood still again -> why it has failed."""
        self._again: set[str] = set()

    def look(self, trials: Sequence[Any], name: Callable[[Any], str]) -> None:
        """Look which actors still beat, at most every `BEAT_S`, and end those that do not.

        Args:
            trials: of Ray Tune.
            name: returns the name of one of them.
        """
        now = time.monotonic()
        if now - self.looked < BEAT_S:
            return
        self.looked, place = now, _place()
        with suppress(RayError):
            for key in _internal_kv_list("", namespace=place):
                value = _internal_kv_get(key, namespace=place)
                if value is None:
                    continue
                count, since = self.seen.get(key, (b"", now))
                if value[:_COUNT_BYTES] != count:
                    self.seen[key] = value[:_COUNT_BYTES], now
                elif now - since >= self.patience_s:
                    first, actor = cloudpickle.loads(value[_COUNT_BYTES:])
                    _internal_kv_del(key, namespace=place)
                    for trial in trials:
                        ran_by = trial.temporary_state.ray_actor  # None until it has started
                        if not trial.is_finished() and (ran_by == actor if ran_by else trial.trial_id == first):
                            self._end(trial, name, now - since)
                    ray.kill(actor)

    def _end(self, trial: Any, name: Callable[[Any], str], silent_s: float) -> None:
        """Say that a trial's process is ended, and let Ray Tune begin the trial again where it is the first time."""
        stood = f"its process has not answered for {silent_s:.0f} s and stands still"
        if trial.trial_id in self._again:
            self.failed[trial.trial_id] = f"{stood}, for the second time"
            self.notice(f"trial {name(trial)} has failed: {self.failed[trial.trial_id]}")
            return
        self._again.add(trial.trial_id)
        trial.max_failures = trial.run_metadata.num_failures + 1
        self.notice(f"trial {name(trial)} begins again: {stood}")
