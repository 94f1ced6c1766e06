"""The functions that Ray Train calls in its workers.

Ray Train's controller loads this module too. So what takes seconds to import, and only workers need, is imported inside
the functions, and their arguments come as a pickle.
"""

from __future__ import annotations

import pickle

from pipelines.training import STARTED


def train(call: dict[str, bytes]) -> None:
    """Train one rank's part of a run that has a Ray Train run of its own.

    Args:
        call: under "pickled", the pickle of (job, handle of the run's monitor actor).
    """
    job, monitor = pickle.loads(call["pickled"])
    from pipelines.training.loop.train import train_rank
    from pipelines.training.ray_train.shell import failed_for_good, open_rank

    if failed_for_good(monitor):
        return  # Ray Train starts the workers again whatever the error was; the driver reports it
    with open_rank(job, monitor, STARTED) as (context, shell):
        train_rank(context, shell, STARTED)


def train_one_after_another(call: dict[str, bytes]) -> None:
    """Train one rank's part of run after run, as a reusable worker.

    Args:
        call: under "pickled", the pickle of the handle of the driver's job queue.
    """
    queue = pickle.loads(call["pickled"])
    from pipelines.training.ray_train.reusable_workers import train_jobs

    train_jobs(queue)
