"""The log of a run, which rank 0 writes and which is sent to every configured sink, through a queue for each.

Nothing is sent twice after a restart or lost during an outage. Records are first written to a folder on this node and
then sent by a thread, so training never waits for the server. Records that a killed process had not sent are sent by
the next one on this node; they are also stored with checkpoints, because the next one may be on another node. Every
point keeps its time, so that sending it twice changes nothing; points at or below the last recorded step of their
metric are dropped, because a resumed run repeats steps. Metrics, and pictures and texts, may be in different stores:
neither waits for the other.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.presentation.errors import PipelineError
from pipelines.storage import Fence, FencedError
from pipelines.storage.retry import TransientError
from pipelines.tracking.client import UnreachableError
from pipelines.tracking.jsonl import JsonLines
from pipelines.tracking.mlflow_sink import MlflowSink
from pipelines.tracking.sink import Destination, Sink

logger = logging.getLogger(__name__)
RETRY_S = 5.0
REPEAT_S = 300.0
"""Seconds after which the warning about an unavailable sink is repeated."""


class Outbox:
    """The queue in front of one sink, on disk.

    Args:
        folder: folder on this node for unsent records of this run and sink.
        fence: checked before sending: the records of a replaced driver are sent by its successor. One record may be in
        flight at that time, and the successor sends it too.
        held: whether nothing is sent before `begin` or `flush`: the libraries of a sink take a second to import, which
        would delay the first step of a restarted process.
    """

    def __init__(self, sink: Sink, folder: Path, fence: Fence | None = None, *, held: bool = False) -> None:
        self.sink, self.folder, self.fence = sink, folder, fence
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.last_steps: dict[str, int] | None = None
        self.last_pictures: dict[str, int] | None = None
        self.reason = ""  # why something waits
        self.fenced: FencedError | None = None
        self._quiet_until = 0.0
        self._wake, self._ending = threading.Event(), threading.Event()
        if self._waiting():  # something from before
            self._wake.set()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        if not held:
            self.begin()

    def begin(self) -> None:
        """Start sending, if the outbox was held."""
        if self._thread.ident is None:
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

    def text(self, text: str, name: str, step: int, mark: str = "") -> None:
        """Send a text file; under the same name it replaces itself.

        Args:
            mark: an existing text of that name that contains the mark is the same text, perhaps longer, and is kept;
            "": it is always replaced.
        """
        self._keep("text", step, json.dumps({"text": text, "name": name, "mark": mark}).encode())

    def flush(self, timeout_s: float = 300.0) -> None:
        """Wait until everything is sent.

        Raises:
            UnreachableError: not everything was sent; the next process of this run sends the rest.
            FencedError: another driver has taken over, whose processes send the rest.
        """
        self.begin()
        deadline = time.monotonic() + timeout_s
        while left := len(self._waiting()):
            if self.fenced:
                raise self.fenced
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self.sink.uri} has not taken everything for {timeout_s:.0f} s: {left} points of the run "
                    f"wait in {self.folder}{f' ({self.reason})' if self.reason else ''}"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """End the thread; unsent records are left to the next process."""
        self._ending.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(RETRY_S + 1)

    def waiting(self) -> dict[str, bytes]:
        """Return the unsent records, by file name."""
        found = {}
        for path in self._waiting():
            with suppress(FileNotFoundError):  # sent meanwhile
                found[path.name] = path.read_bytes()
        return found

    def adopt(self, name: str, data: bytes) -> None:
        """Add a record that a process on another node had not sent when it wrote a checkpoint."""
        self._store(self.folder / name, data)
        self._wake.set()

    def _keep(self, kind: str, step: int, data: bytes) -> None:
        """Add data to the queue; file names sort by step, and only equal points have equal names."""
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
        while not self._ending.is_set() and not self.fenced:
            self._wake.wait()
            self._wake.clear()
            try:
                while self._send_waiting():
                    if self._ending.wait(RETRY_S):
                        return
            except Exception:  # an unavailable disk, for example: this is the only thread that sends
                logger.exception("what waits in %s could not be sent; this is tried again", self.folder)
                self._wake.set()
                if self._ending.wait(RETRY_S):
                    return

    def _send_waiting(self) -> bool:
        """Send the records in order; return whether some have to wait longer."""
        held = set()
        for path in self._waiting():
            if self._ending.is_set() or self.fenced:
                return False
            kind = _kind(path)
            if kind not in held and not self._sent(path):
                held.add(kind)
        return bool(held)

    def _sent(self, path: Path, again: bool = True) -> bool:
        """Send the record in a file and remove the file; return False if it has to wait.

        Args:
            again: whether it is sent once more if refused: the cause may have been fixed meanwhile.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # another process has sent it
            return True
        try:
            if self.fence:
                self.fence.check(patience_s=0)
            self._send(path.suffix, data)
        except FencedError as error:
            logger.warning("nothing more is sent to %s: %s", self.sink.uri, error)
            self.fenced = error
            return False
        except TransientError as error:
            self._wait(path, error)
            return False
        except PipelineError as error:
            if again:
                return self._sent(path, again=False)
            logger.warning("%s refuses %s, which is left out: %s", self.sink.uri, _described(path, data), error)
        except Exception:
            logger.exception("%s cannot be sent to %s and is left out", _described(path, data), self.sink.uri)
        path.unlink(missing_ok=True)
        return True

    def _wait(self, path: Path, error: TransientError) -> None:
        """Store why a record waits; warn once, and then every few minutes."""
        # The server may have stored records that it did not acknowledge: ask again for the last steps.
        if _kind(path) == "curves":
            self.last_steps = None
        else:
            self.last_pictures = None
        if str(error) != self.reason or time.monotonic() > self._quiet_until:
            logger.warning("training goes on without %s for now: %s", self.sink.uri, error)
            self._quiet_until = time.monotonic() + REPEAT_S
        self.reason = str(error)

    def _send(self, suffix: str, data: bytes) -> None:
        if suffix == ".metrics":
            if self.last_steps is None:
                self.last_steps = self.sink.last_steps()
            point = json.loads(data)
            step = point["step"]
            fresh = {k: v for k, v in point["values"].items() if step > self.last_steps.get(k, -1)}
            if fresh:
                self.sink.metrics(fresh, step, point["at_ms"])
                self.last_steps |= dict.fromkeys(fresh, step)
        elif suffix == ".text":
            written = json.loads(data)
            mark = written.get("mark")
            if not (mark and self.sink.holds(mark, written["name"])):
                self.sink.text(written["text"], written["name"])
        else:
            if self.last_pictures is None:
                self.last_pictures = self.sink.last_pictures()
            with np.load(io.BytesIO(data)) as stored:
                key, step, pixels = str(stored["key"]), int(stored["step"]), stored["pixels"]
            if step > self.last_pictures.get(f"images/{key}", -1):
                self.sink.image(key, pixels, step)
                self.last_pictures[f"images/{key}"] = step


def _kind(path: Path) -> str:
    """Return the group of a record; groups do not wait for each other."""
    return "curves" if path.suffix == ".metrics" else "artifacts"


def _described(path: Path, data: bytes) -> str:
    try:
        step = int(path.name.split("-")[0])
        if path.suffix == ".metrics":
            return f"the point of {', '.join(json.loads(data)['values'])} at {step:,} images"
        if path.suffix == ".text":
            return f"the text {json.loads(data)['name']}"
        return f"a picture at {step:,} images"
    except (ValueError, LookupError, TypeError):  # half a file, or none of ours
        return str(path)


SINKS: dict[str, Callable[[Destination], Sink]] = {
    "mlflow": MlflowSink.of,
    "jsonl": JsonLines,
}
"""Name in `tracking.sinks` -> sink."""
FIRST = "mlflow"
"""The sink whose unsent records are at the top of the folder and of the packed file; others have a subfolder."""


class RunLog:
    """The log of a run: every sink has its own queue, and none waits for another.

    Args:
        sinks: name -> sink.
        folder: folder on this node for unsent records of this run.
        fence: fence of the driver of this process; None if there is only one driver.
        held: whether nothing is sent before `begin` or `flush`.
    """

    def __init__(
        self, sinks: Mapping[str, Sink], folder: Path, fence: Fence | None = None, *, held: bool = False
    ) -> None:
        def place(name: str) -> Path:
            return folder if name == FIRST else folder.with_name(f"{folder.name}.{name}")

        self.outboxes = {name: Outbox(sink, place(name), fence, held=held) for name, sink in sinks.items()}

    @classmethod
    def open(cls, names: Iterable[str], run: Destination, folder: Path, *, held: bool = False) -> RunLog:
        """Return the log of a run with the sinks of these names."""
        return cls({name: SINKS[name](run) for name in names}, folder, run.fence, held=held)

    def begin(self) -> None:
        """Start sending, if the log was held."""
        for outbox in self.outboxes.values():
            outbox.begin()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log points of curves at `step` images seen."""
        for outbox in self.outboxes.values():
            outbox.metrics(values, step)

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Log a picture, uint8 [H, W, C], at `step` images seen."""
        for outbox in self.outboxes.values():
            outbox.image(key, pixels, step)

    def text(self, text: str, name: str, step: int, mark: str = "") -> None:
        """Log a text file at `step` images seen; under the same name it replaces itself.

        Args:
            mark: an existing text of that name that contains the mark is the same text, perhaps longer, and is kept;
            "": it is always replaced.
        """
        for outbox in self.outboxes.values():
            outbox.text(text, name, step, mark)

    def flush(self, timeout_s: float = 300.0) -> None:
        """Wait until everything is sent.

        Raises:
            UnreachableError: not everything was sent; the next process of this run sends the rest.
        """
        deadline = time.monotonic() + timeout_s
        for outbox in self.outboxes.values():
            outbox.flush(max(deadline - time.monotonic(), 0))

    def close(self) -> None:
        """End the threads; unsent records are left to the next process."""
        for outbox in self.outboxes.values():
            outbox.close()

    def pack(self) -> bytes | None:
        """Return the unsent records as a zip that is stored with a checkpoint; None if there are none."""
        waiting = {
            name if sink == FIRST else f"{sink}/{name}": data
            for sink, outbox in self.outboxes.items()
            for name, data in outbox.waiting().items()
        }
        if not waiting:
            return None
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in waiting.items():
                archive.writestr(name, data)
        return packed.getvalue()

    def adopt(self, packed: Path | IO[bytes]) -> None:
        """Add the records that a process on another node had not sent when it wrote a checkpoint or ended."""
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                sink = str(Path(name).parent)
                outbox = self.outboxes.get(FIRST if sink == "." else sink)
                if outbox is not None:  # else a sink that the run no longer has
                    outbox.adopt(Path(name).name, archive.read(name))
