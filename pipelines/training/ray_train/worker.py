"""The functions that Ray Train calls in its workers.

Ray Train's controller loads this module too. So what takes seconds to import, and only workers need, is imported inside
the functions, and their arguments come as a pickle.
"""

from __future__ import annotations

import pickle
from typing import Any

from pipelines.training import STARTED

Call = dict[str, Any]
"""What Ray Train passes to a worker: under "pickled" a pickle, under "buffers" the arrays that it leaves out."""


def given(call: Call) -> Any:
    """Return what the driver has given, whose arrays lie in Ray's object store: once on a node, and read-only."""
    return pickle.loads(call["pickled"], buffers=call["buffers"])


def train(call: Call) -> None:
    """Train one rank's part of a run that has a Ray Train run of its own.

    Args:
        call: with (job, handle of the run's monitor actor).
    """
    job, monitor = given(call)
    from pipelines.training.loop.train import train_rank
    from pipelines.training.ray_train.shell import failed_for_good, open_rank

    if failed_for_good(monitor):
        return  # Ray Train starts the workers again whatever the error was; the driver reports it
    with open_rank(job, monitor, STARTED) as (context, shell):
        train_rank(context, shell, STARTED)


def train_one_after_another(call: Call) -> None:
    """Train one rank's part of run after run, as a reusable worker.

    Args:
        call: with the handle of the driver's job queue.
    """
    queue = given(call)
    from pipelines.training.ray_train.reusable_workers import train_jobs

    train_jobs(queue)
