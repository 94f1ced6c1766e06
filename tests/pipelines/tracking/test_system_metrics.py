"""System metrics do not hold up the end of a training."""

from __future__ import annotations

import socket
import sys
import threading
import time

from pipelines.tracking import Tracker, system_metrics


def test_the_end_does_not_wait_for_a_server_that_hangs(monkeypatch):
    monkeypatch.setattr(sys.modules["pipelines.tracking.system_metrics"], "MONITOR_AFTER_S", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "r")
        with system_metrics(tracker, "node-0"):
            asked, _ = silent.accept()
            (thread,) = [t for t in threading.enumerate() if t.name == "system-metrics"]
            began = time.monotonic()
        assert time.monotonic() - began < 0.5
        assert thread.daemon
        thread.join(20)  # and it records nothing more when the server answers at last
        assert not thread.is_alive()
        asked.close()
