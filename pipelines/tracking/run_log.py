"""The log of a run, which rank 0 writes and which is sent to every configured sink."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from pipelines.storage import Fence
from pipelines.tracking.jsonl import JsonLines
from pipelines.tracking.mlflow_sink import MlflowSink
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.sink import Destination, Sink

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
