"""The start of a worker, which is mostly imports: this module imports what a worker has anyway, and runs before them.

Python's garbage collector looks through all objects time and again while modules are imported, and finds hardly any to
free. It costs most where torch is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback


class QuickStart(ControllerCallback):
    """Lets the garbage collector of a process rest from the moment in which Ray Train hands this callback to it.

    Settings of torch follow in the same message, and with them its import. In a worker the collector rests until
    `pipelines.training.startup.end_startup`, in the controller until it has started.
    """

    def __reduce__(self) -> tuple[Callable[[], QuickStart], tuple[()]]:
        """Return what a process that receives this callback calls."""
        return _receive, ()

    def after_controller_start(self, train_run_context: object) -> None:
        """Let the controller's collector run again."""
        gc.enable()


def _receive() -> QuickStart:
    # Only in actors, the controller and the workers: a server of Ray Client receives it too, and passes it on.
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        gc.disable()
    return QuickStart()
