"""A run's curves as JSON lines in its folder on storage: `runs/RUN/metrics.jsonl`, for `tracking.sinks=[mlflow,jsonl]`.

A line holds the values that were logged together: `{"step": 2560, "at_ms": 1790000000000, "train/loss": 0.12, …}`;
step is images seen, at_ms the time in milliseconds since the epoch, null a value that is not finite. Read it with
`pandas.read_json(path, lines=True)`. Object stores cannot append: every line rewrites the file, so a file that reaches
`PART_BYTES` is moved to `runs/RUN/metrics/000001.jsonl` and so on, and a new one is started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from pipelines.storage import ConflictError, NotFoundError, StorageError, TransientStorageError, join, layout
from pipelines.tracking.sink import Destination

PART_BYTES = 1 << 20
_ABOUT = ("step", "at_ms")


class JsonLines:
    """A sink for metrics; pictures and texts are ignored.

    Every process reads the file once before it writes, so it survives restarts on any node. Writes are conditional: of
    two processes, for example one that a newer driver has replaced, neither undoes the writes of the other.
    """

    def __init__(self, run: Destination) -> None:
        self.storage, self.parts = run.storage, join(run.folder, layout.METRICS)
        self.current: bytes | None = None
        self.tag: str | None = None
        self.count = 0

    @property
    def uri(self) -> str:
        """Address of the file that is being written."""
        return f"{self.parts}.jsonl"

    def last_steps(self) -> dict[str, int]:
        """Return the last recorded step of every curve."""
        with _waiting():
            return self._read()

    def _read(self) -> dict[str, int]:
        listed = [entry.uri for entry in self.storage.list(self.parts, patience_s=0)]
        older = [self.storage.read(uri, patience_s=0) for uri in listed if uri.endswith(".jsonl")]
        current, self.tag = b"", None
        with suppress(NotFoundError):
            current, self.tag = self.storage.read_tagged(self.uri, patience_s=0)
        if current in older[-1:]:  # it was moved, and the next one was not started
            current = b""
        self.count, self.current = len(older), current
        steps: dict[str, int] = {}
        for point in _points(b"".join([*older, current])):
            for key in point.keys() - set(_ABOUT):
                steps[key] = max(point["step"], steps.get(key, -1))
        return steps

    def last_pictures(self) -> dict[str, int]:
        """Return nothing: pictures are ignored."""
        return {}

    def metrics(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Add a line."""
        with _waiting():
            self._append({"step": step, "at_ms": at_ms}, values)

    def _append(self, about: Mapping[str, int], values: Mapping[str, float]) -> None:
        if self.current is None:
            self._read()
        assert self.current is not None
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({**about, **finite}).encode() + b"\n"
        try:
            if len(self.current) >= PART_BYTES:
                part = join(self.parts, layout.metrics_part(self.count + 1))
                self.storage.write_if(part, self.current, None, patience_s=0)
                self.count, self.current = self.count + 1, b""
            self.tag = self.storage.write_if(self.uri, self.current + line, self.tag, patience_s=0)
            self.current += line
        except ConflictError as error:
            self.current = None
            raise TransientStorageError(f"{self.uri}: another process has written it; it is read again") from error

    def image(self, key: str, pixels: NDArray[Any], step: int) -> None:
        """Ignore a picture."""

    def text(self, text: str, name: str) -> None:
        """Ignore a text."""

    def holds(self, mark: str, name: str) -> bool:
        """Return that there is none."""
        return False


@contextmanager
def _waiting() -> Iterator[None]:
    """Treat every storage error as temporary: a missing permission or full disk is not the fault of a point."""
    try:
        yield
    except StorageError as error:
        raise TransientStorageError(str(error)) from error


def _points(lines: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file."""
    for line in lines.splitlines():
        yield json.loads(line)
