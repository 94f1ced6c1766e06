"""The watchdog of a rank: it ends one that makes no progress, and ranks that wait for one that has failed."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import NoReturn

import torch
from torch._C import _distributed_c10d

from pipelines.presentation.errors import PipelineError
from pipelines.training.loop.collectives import group_store, this_rank
from pipelines.training.loop.progress import Clock

logger = logging.getLogger(__name__)
EXIT_CODE = 70
"""Of a process that the watchdog ends, which is how `sysexits.h` names an internal error."""
POLL_S = 0.5
STALLED_GRACE_S = 3.0
"""How long a rank without progress waits before its process ends, so that the others log where they are as well."""
OTHERS_GRACE_S = 6.0
"""How long a rank may take to notice by itself that another one has failed, before its process ends."""
KEY = "ddpm/first-failure"


class RankFailedError(PipelineError):
    """Another rank of the run has failed, and this one was waiting for it; the message names the rank and its error."""


@dataclass(frozen=True)
class Failure:
    """The message of a failing rank to the others.

    Attributes:
        rank: the rank that failed.
        message: its error in words.
        stalled: whether it made no progress, so that every rank has to say where it is.
    """

    rank: int
    message: str
    stalled: bool


class Watchdog:
    """Watches one rank and its process group while the context lasts.

    A collective ends when all ranks take part, so one rank that fails or hangs leaves the others waiting. Neither gloo
    nor NCCL lets go of them while the failed rank's process is alive, as it is in a Ray actor, and no exception can
    reach a thread that waits. So the first rank that fails says so in the store of the process group. The others look
    there twice a second, log what they find, and end their processes if they are still waiting `OTHERS_GRACE_S` later;
    Ray Train then starts the workers again. A rank whose collective does break raises a `RankFailedError` instead.

    A rank that stays longer than `timeout_s` in one phase of its clock (startup, one step, the wait for one batch, one
    sample grid or evaluation, one wait for a checkpoint) logs the stacks of all its threads, on a GPU NCCL's record of
    unfinished collectives too, and ends its process. There is one limit for all phases, because while one rank is in a
    long phase the others wait for it in a short one. It has to be longer than whatever may rightly last: storage's
    patience of 300 s, torch.compile in the first step, an evaluation hook.

    Args:
        clock: of the loop; it is switched at every phase.
        timeout_s: seconds without progress; None or 0 to wait for ever.
        grace_s: how much longer a rank that waits for a failed one is left alone, for an upload in its background.
    """

    def __init__(self, clock: Clock, timeout_s: float | None, grace_s: float = 0) -> None:
        self.clock, self.timeout_s, self.rank = clock, timeout_s, this_rank()
        self.grace_s = OTHERS_GRACE_S + grace_s
        # A connection of its own: the process group's is busy while a collective is being set up.
        self.store = group_store()
        self.failure: Failure | None = None
        self._found = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        # Two threads: a store whose host hangs must not keep the first one from noticing.
        if self.timeout_s:
            _start(self._watch_progress)
        if self.store is not None:
            _start(self._watch_others)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the other ranks of an error that ended this one.

        Raises:
            RankFailedError: the error is that another rank has failed.
        """
        try:
            if error is not None and self.store is not None:
                # Errors of torch.distributed are RuntimeErrors: they may mean that another rank has ended.
                if isinstance(error, RuntimeError) and self._found.wait(2 * POLL_S) and self.failure:
                    raise RankFailedError(_in_words(self.failure)) from error
                self._tell(Failure(self.rank, f"{type(error).__name__}: {error}", stalled=False))
        finally:
            self._over.set()

    def _watch_progress(self) -> None:
        assert self.timeout_s
        while not self._over.wait(POLL_S):
            phase, seconds = self.clock.phase()
            if seconds < self.timeout_s:
                continue
            message = f"no progress for {seconds:.0f} s in the phase '{phase}' (cluster.step_timeout_s)"
            try:
                logger.error("rank %d has made %s. Its threads:\n%s", self.rank, message, stacks())
                if torch.cuda.is_available():
                    _start(self._log_nccl_trace)  # in a thread: NCCL may hang as well
                self._tell(Failure(self.rank, message, stalled=True))
            finally:
                if not self._over.wait(STALLED_GRACE_S):
                    end_process()
            return

    def _log_nccl_trace(self) -> None:
        logger.error("rank %d, collectives that have not ended: %s", self.rank, nccl_trace())

    def _watch_others(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                found = self._first_failure()
            except RuntimeError as error:  # rank 0, which has the store, has ended: what breaks now breaks by itself
                logger.debug("the store of the process group is gone: %s", error)
                return
            if found is None or found.rank == self.rank:
                continue
            self.failure = found
            self._found.set()
            logger.error("%s; rank %d cannot go on", _in_words(found), self.rank)
            if found.stalled:
                logger.error("the threads of rank %d at that time:\n%s", self.rank, stacks())
            if not self._over.wait(self.grace_s):
                phase, _ = self.clock.phase()
                logger.error("rank %d still waits in the phase '%s': its process ends", self.rank, phase)
                end_process()
            return

    def _first_failure(self) -> Failure | None:
        assert self.store is not None
        return Failure(**json.loads(self.store.get(KEY))) if self.store.check([KEY]) else None

    def _tell(self, failure: Failure) -> None:
        """Put a failure into the store, unless there is one, and give the others time to read it."""
        store = self.store
        if store is None or self.failure is not None:
            return

        def put() -> None:
            with suppress(RuntimeError):  # the store has gone with rank 0
                store.compare_set(KEY, "", json.dumps(asdict(failure)))

        _start(put)  # in a thread: the store may not answer
        self._over.wait(2 * POLL_S)


def stacks() -> str:
    """Return the stack of each thread of this process, as `faulthandler` writes it."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def nccl_trace() -> str:
    """Return NCCL's record of the collectives that have not ended, as JSON; a torch without NCCL has none."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)
    return "none" if dump is None else dump(onlyActive=True).decode(errors="replace")


def end_process() -> NoReturn:
    """End this process at once: a thread that waits in a collective cannot be interrupted."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_CODE)


def _start(target: Callable[[], object]) -> None:
    threading.Thread(target=target, name="watchdog", daemon=True).start()


def _in_words(failure: Failure) -> str:
    return f"rank {failure.rank} of the run failed: {failure.message}"
