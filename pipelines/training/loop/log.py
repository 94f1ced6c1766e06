"""The metrics log of a run on rank 0: points that could not be sent wait in storage for the next process."""

from __future__ import annotations

import io
import logging

from pipelines.storage import NotFoundError, StorageError, join, layout
from pipelines.tracking import Destination, RunLog, UnreachableError
from pipelines.training.loop.context import Job
from pipelines.training.loop.data import stream_settings

logger = logging.getLogger(__name__)
FLUSH_S = 300.0
"""How long a process of a run waits at its end until everything is sent."""


def open_log(job: Job) -> RunLog:
    """Return the log of a run, with what an earlier process left in the run's folder.

    What is not sent yet is kept beside the shard cache. Nothing is sent before the log's `begin` or `flush`.
    """
    destination = Destination(job.tracker, job.storage, job.run_uri, job.fence)
    folder = stream_settings(job.config).cache_dir.parent / "unsent" / job.tracker.run_id
    log = RunLog.open(job.config.tracking.sinks, destination, folder, held=True)
    left = join(job.run_uri, layout.UNSENT)
    try:
        packed = job.storage.read(left)
    except NotFoundError:
        return log
    log.adopt(io.BytesIO(packed))
    job.storage.delete(left)
    return log


def finish_log(job: Job, log: RunLog) -> None:
    """Wait until everything is sent; where the server stays away, leave the rest in the run's folder."""
    try:
        log.flush(FLUSH_S)
        return
    except UnreachableError as error:
        reason = error
    packed, left = log.pack(), join(job.run_uri, layout.UNSENT)
    if packed is None:  # sent meanwhile
        return
    try:
        if job.fence:
            job.fence.check()
        job.storage.write(left, packed, patience_s=60)
    except StorageError as failure:
        logger.warning("%s; they are sent when the same command runs on this node again (%s)", reason, failure)
    else:
        logger.warning("%s, and in %s: the same command sends them, on any node", reason, left)


def send_unsent(job: Job) -> None:
    """Send the points that are left in the folder of a run that has ended."""
    log = open_log(job)
    try:
        finish_log(job, log)
    finally:
        log.close()
