"""The local stack that a benchmark measures on."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import stack
from pipelines.stack import SERVICES, StackState


@contextmanager
def stack_of(home: Path | None, services: Collection[str] = SERVICES) -> Iterator[StackState]:
    """Provide the stack that runs in a folder, or where none is named one of its own, of which nothing is kept."""
    if home is not None:
        state = stack.read_state(home.resolve())
        if state is None:
            raise ValueError(f"no stack runs in {home}: start one by `DDPM_HOME={home} ddpm up`, or leave --home out")
        yield state
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        own = Path(folder) / ".ddpm"
        try:
            yield stack.up(own, services)
        finally:
            stack.down(own)
