"""What waits for a sink such as MLflow: nothing is sent twice after a restart, nothing is lost while it is away.

What is logged is first written to a folder on this node and then sent by a thread, so training waits neither for the
server nor for its return. What a killed process had not sent, the next one on this node does; and it travels with the
checkpoints, for the next one may be on another node. Every point keeps the time at which it was made, so that sending
it twice changes nothing; points at or below the last recorded step of their curve are dropped, for a resumed run comes
by steps that it has passed before.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import PipelineError
from pipelines.retry import TransientError
from pipelines.tracking.client import UnreachableError
from pipelines.tracking.sink import Sink

logger = logging.getLogger(__name__)
RETRY_S = 5.0


class Outbox:
    """The queue before one sink, on disk.

    Args:
        folder: on this node, where what is not sent yet is kept; of this run and sink alone.
    """

    def __init__(self, sink: Sink, folder: Path) -> None:
        self.sink, self.folder = sink, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.last: dict[str, int] | None = None
        self._wake, self._ending = threading.Event(), threading.Event()
        if self._waiting():  # something from before
            self._wake.set()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Send points of curves at `step` images seen."""
        point = {"values": dict(values), "step": step, "at_ms": int(time.time() * 1000)}
        self._keep("metrics", step, json.dumps(point).encode())

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Send a picture, uint8 [H, W, C], at `step` images seen."""
        stored = io.BytesIO()
        np.savez(stored, pixels=pixels, key=np.array(key), step=np.array(step))
        self._keep("image", step, stored.getvalue())

    def text(self, text: str, name: str, step: int) -> None:
        """Send a text file; under the same name it replaces itself."""
        self._keep("text", step, json.dumps({"text": text, "name": name}).encode())

    def flush(self, timeout_s: float = 300.0) -> None:
        """Wait until everything is sent.

        Raises:
            UnreachableError: not everything is; the next process of this run sends the rest.
        """
        deadline = time.monotonic() + timeout_s
        while left := len(self._waiting()):
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self.sink.uri} has not taken everything for {timeout_s:.0f} s: {left} points of the run "
                    f"wait in {self.folder} and are sent when it is resumed"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """End the thread; what waits is left to the next process."""
        self._ending.set()
        self._wake.set()
        self._thread.join(RETRY_S + 1)

    def waiting(self) -> dict[str, bytes]:
        """Return what waits, by file name."""
        found = {}
        for path in self._waiting():
            with suppress(FileNotFoundError):  # sent meanwhile
                found[path.name] = path.read_bytes()
        return found

    def adopt(self, name: str, data: bytes) -> None:
        """Take up a file that a process on another node had not sent when it made a checkpoint."""
        self._store(self.folder / name, data)
        self._wake.set()

    def _keep(self, kind: str, step: int, data: bytes) -> None:
        """Put data into the queue; file names order by step, and are the same for nothing but the same point."""
        name = f"{step:015d}-{time.time_ns():020d}-{self.count:06d}.{kind}"
        self.count += 1
        try:
            self._store(self.folder / name, data)
        except OSError as error:  # a full disk costs a point, not the training
            logger.warning("a point of the run is lost: %s", error)
        self._wake.set()

    def _store(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(data)
        temporary.replace(path)

    def _waiting(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while waiting := self._waiting():
                if self._ending.is_set():
                    return
                try:
                    self._send(waiting[0])
                except TransientError as error:
                    logger.warning("training goes on without %s for now: %s", self.sink.uri, error)
                    # It may have taken what it did not acknowledge: ask anew what is there.
                    self.last = None
                    if self._ending.wait(RETRY_S):
                        return
                    continue
                except PipelineError as error:
                    logger.warning("%s refuses %s, which is left out: %s", self.sink.uri, waiting[0].name, error)
                waiting[0].unlink()
            if self._ending.is_set():
                return

    def _send(self, path: Path) -> None:
        if self.last is None:
            self.last = self.sink.last_steps()
        if path.suffix == ".metrics":
            point = json.loads(path.read_bytes())
            step = point["step"]
            fresh = {k: v for k, v in point["values"].items() if step > self.last.get(k, -1)}
            if fresh:
                self.sink.metrics(fresh, step, point["at_ms"])
                self.last |= dict.fromkeys(fresh, step)
        elif path.suffix == ".text":
            written = json.loads(path.read_bytes())
            self.sink.text(written["text"], written["name"])
        else:
            with np.load(io.BytesIO(path.read_bytes())) as stored:
                key, step, pixels = str(stored["key"]), int(stored["step"]), stored["pixels"]
            if step > self.last.get(f"images/{key}", -1):
                self.sink.image(key, pixels, step)
                self.last[f"images/{key}"] = step
