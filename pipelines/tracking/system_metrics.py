"""CPU, memory, disk, network and GPU usage of a machine as metrics of an MLflow run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.storage import Fence, FencedError
from pipelines.tracking.client import authenticate, import_mlflow
from pipelines.tracking.run import Tracker

logger = logging.getLogger(__name__)
MONITOR_AFTER_S = 10.0
RESTART_AFTER_S = 30.0


@contextmanager
def system_metrics(tracker: Tracker, node: str, fence: Fence | None = None) -> Iterator[None]:
    """Log the resource usage of this machine to a run while the block runs, as system/NODE/…

    Args:
        fence: fence of the driver of this process; nothing is sent for a replaced driver.
    """
    ending = threading.Event()
    monitors: list[Any] = []

    def watch() -> None:
        # The imports of the monitor would delay the first steps.
        if ending.wait(MONITOR_AFTER_S):
            return
        import_mlflow()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        class Monitor(SystemMetricsMonitor):
            def publish_metrics(self, metrics: Any) -> None:
                if fence:
                    fence.check(patience_s=0)
                super().publish_metrics(metrics)

        authenticate()
        # MLflow's monitor ends when the server is unavailable for a moment; then it is restarted.
        while not ending.is_set():
            try:
                if fence:
                    fence.check(patience_s=0)
                monitor = Monitor(tracker.run_id, resume_logging=True, node_id=node, tracking_uri=tracker.uri)
                monitors.append(monitor)
                if ending.is_set():  # while the server was slow to answer
                    return
                monitor.monitor()
            except FencedError:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, training matters more
                logger.warning("system metrics of %s: %s", node, error)
            ending.wait(RESTART_AFTER_S)

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        for monitor in monitors[-1:]:
            monitor._shutdown_event.set()
