"""What one process tells MLflow of a run: nothing twice after a restart, nothing lost while the server is away.

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
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.tracking import Tracker, TrackingError, UnreachableError

logger = logging.getLogger(__name__)
RETRY_S = 5.0


class MetricLog:
    """What rank 0 tells MLflow.

    Args:
        folder: on this node, where what is not sent yet is kept; of this run alone.
    """

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.last: dict[str, int] | None = None
        self._wake, self._ending = threading.Event(), threading.Event()
        if self._waiting():  # something from before
            self._wake.set()
        self._thread = threading.Thread(target=self._run, name="metric-log", daemon=True)
        self._thread.start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves at `step` images seen."""
        point = {"values": dict(values), "step": step, "at_ms": int(time.time() * 1000)}
        self._keep("metrics", step, json.dumps(point).encode())

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """A picture, uint8 [H, W, C], at `step` images seen."""
        stored = io.BytesIO()
        np.savez(stored, pixels=pixels, key=np.array(key), step=np.array(step))
        self._keep("image", step, stored.getvalue())

    def text(self, text: str, name: str, step: int) -> None:
        """A text file as an artifact; written again under the same name it replaces itself."""
        self._keep("text", step, json.dumps({"text": text, "name": name}).encode())

    def flush(self, timeout_s: float = 300.0) -> None:
        """Wait until everything is sent.

        Raises:
            UnreachableError: it is not; the next process of this run sends it.
        """
        deadline = time.monotonic() + timeout_s
        while left := len(self._waiting()):
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"MLflow at {self.tracker.uri} has not answered for {timeout_s:.0f} s: {left} points of the run "
                    f"wait in {self.folder} and are sent when it is resumed"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """End; what waits is left to the next process."""
        self._ending.set()
        self._wake.set()
        self._thread.join(RETRY_S + 1)

    def pack(self) -> bytes | None:
        """What waits, as a file that travels with a checkpoint; None where nothing does."""
        waiting = self._waiting()
        if not waiting:
            return None
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for path in waiting:
                with suppress(FileNotFoundError):  # sent meanwhile
                    archive.writestr(path.name, path.read_bytes())
        return packed.getvalue()

    def adopt(self, packed: Path) -> None:
        """Take up what a process on another node had not sent when it made a checkpoint."""
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                self._store(self.folder / Path(name).name, archive.read(name))
        self._wake.set()

    def _keep(self, kind: str, step: int, data: bytes) -> None:
        """Names order by step, and are the same for nothing but the same point."""
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
                except UnreachableError as error:
                    logger.warning("MLflow does not answer, training goes on: %s", error)
                    # It may have taken what it did not acknowledge: ask anew what is there.
                    self.last = None
                    if self._ending.wait(RETRY_S):
                        return
                    continue
                except TrackingError as error:
                    logger.warning("MLflow refuses %s, which is left out: %s", waiting[0].name, error)
                waiting[0].unlink()
            if self._ending.is_set():
                return

    def _send(self, path: Path) -> None:
        if self.last is None:
            self.last = self.tracker.last_steps()
        if path.suffix == ".metrics":
            point = json.loads(path.read_bytes())
            step = point["step"]
            fresh = {k: v for k, v in point["values"].items() if step > self.last.get(k, -1)}
            if fresh:
                self.tracker.metrics(fresh, step, point["at_ms"])
                self.last |= dict.fromkeys(fresh, step)
        elif path.suffix == ".text":
            written = json.loads(path.read_bytes())
            self.tracker.text(written["text"], written["name"])
        else:
            with np.load(io.BytesIO(path.read_bytes())) as stored:
                key, step, pixels = str(stored["key"]), int(stored["step"]), stored["pixels"]
            if step > self.last.get(f"images/{key}", -1):
                self.tracker.image(key, pixels, step)
                self.last[f"images/{key}"] = step
