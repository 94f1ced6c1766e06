"""Free the resources of a training in a Ray cluster where Ray Train forgets them and the next attempt would wait."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util import remove_placement_group

if TYPE_CHECKING:  # every worker imports this module when Ray Train sends it the callback
    from ray.train.torch import TorchTrainer

    from pipelines.storage import Fence


class FreeWorkers(ControllerCallback, WorkerGroupCallback):
    """Frees what the newest group of workers had reserved when Ray Train's controller ends.

    A controller that loses a worker while it launches the training on a group, which is neither the start of the group
    nor the training, ends without it. The reservation lasts as long as the driver, and the driver's next controller
    would wait for the same CPUs.
    """

    def __init__(self) -> None:
        self._reserved: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember what the workers of a new group have reserved."""
        self._reserved = worker_group.get_worker_group_state().placement_group_handle.placement_group

    async def before_controller_shutdown(self) -> None:
        """Free it; where Ray Train has, nothing happens."""
        if self._reserved is not None:
            remove_placement_group(self._reserved)


def take_over_reservation(fence: Fence, trainer: TorchTrainer) -> None:
    """Cancel what the controller of a killed driver had reserved, and record the name of this one's reservation.

    Ray's coordinator, which outlives drivers, keeps a reservation for three minutes; for so long an elastic run would
    wait for resources that its own former driver had reserved.
    """
    # Not at the top: it takes half a second.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    before = fence.note(reservation=f"train-{trainer.train_run_context.run_id}").get("reservation")
    if before is not None:
        with suppress(RayError):
            ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(requester_id=before), timeout=10)
