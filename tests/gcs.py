"""Google Cloud Storage as its emulator answers, for tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def gcs_emulator() -> Iterator[str]:
    """The URL of an emulator that runs beside the tests, with a bucket `ddpm`; skips where it is not installed."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory", "--quiet"]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), "--default-bucket", "ddpm"])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # it waits for connections that its clients keep
            server.kill()
            server.wait()
