"""What is measured of a system, each in a process that is forked for it from one that has imported the system."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.peers import PEERS
from benchmarks.data.systems import BATCH, OWN, ReadSetup, System, floats
from pipelines.storage import Storage

SYSTEMS = OWN | PEERS
DEPTHS = (10, 50, 90)
"""Percent of an epoch at which a stream is resumed."""


def measured(name: str, measures: Sequence[str], setup: ReadSetup, images: int) -> dict[str, dict[str, Any]]:
    """Return what was measured, by its name: "cold", "warm", "save", or "resume50" and the like.

    "cold" and "resume50" begin with an empty cache, as on a new node; "warm" follows "cold". "save" saves the states
    that "resume50" goes on from, beside the cache.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.cores])
    torch.set_num_threads(1)
    os.environ["ENERGON_LOCAL_COPY_TMP_DIR"] = str(setup.cache)  # else it keeps an index for all that run here
    kind = SYSTEMS[name]
    for module in (kind.module, "boto3", "pipelines.storage.s3"):
        import_module(module)
    found = {}
    for measure in measures:
        if measure != "warm":
            shutil.rmtree(setup.cache, ignore_errors=True)
        depth = int(measure.removeprefix("resume")) if measure.startswith("resume") else None
        function, argument = (_epoch, images) if depth is None else (_resumed, depth)
        if measure == "save":
            function = _saved
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            found[measure] = pool.submit(function, kind, setup, argument).result()
    return found


def _epoch(kind: type[System], setup: ReadSetup, images: int) -> dict[str, Any]:
    """Return the seconds to the first batch, and the samples per second of the others of an epoch but the last two."""
    began = time.perf_counter()
    batches = kind(setup).batches()
    check(*next(batches))
    first = time.perf_counter() - began
    count, began = 0, time.perf_counter()
    for pixels, _ in batches:
        count += len(floats(pixels))
        if count >= images - 3 * BATCH:
            break
    rate = count / (time.perf_counter() - began)
    return {"first_batch_s": first, "samples_per_s": rate, "anonymous_mib": anonymous_mib()}


def _saved(kind: type[System], setup: ReadSetup, images: int) -> dict[str, Any]:
    """Save the state at each depth, and the checksum of the batch that follows; return the samples before them."""
    system = kind(setup)
    places = {depth: depth * images // 100 // BATCH * BATCH for depth in DEPTHS}
    count, batches = 0, system.batches()
    for depth, at in places.items():
        while count < at:
            count += len(next(batches)[0])
        state = pickle.dumps(system.state())
        following = next(batches)
        count += len(following[0])
        _state_file(setup, depth).write_bytes(pickle.dumps((state, _checksum(*following))))
    return {"samples": places}


def _resumed(kind: type[System], setup: ReadSetup, depth: int) -> dict[str, Any]:
    """Return the seconds from a saved state to the first batch, and whether it is the one that followed the state."""
    state, following = pickle.loads(_state_file(setup, depth).read_bytes())
    saved = pickle.loads(state)
    began = time.perf_counter()
    pixels, labels = next(kind(setup, saved).batches())
    seconds = time.perf_counter() - began
    check(pixels, labels)
    return {"first_batch_s": seconds, "same_batch": _checksum(pixels, labels) == following}


def _state_file(setup: ReadSetup, depth: int) -> Path:
    return setup.cache.with_name(f"{setup.cache.name}-state-{depth}")


def check(pixels: Tensor, labels: Tensor) -> None:
    """Make sure that a batch is what every system has to yield."""
    images = floats(pixels)
    assert images.dtype == torch.float32
    assert tuple(images.shape) == (BATCH, 3, 32, 32)
    assert len(labels) == BATCH


def _checksum(pixels: Tensor, labels: Tensor) -> int:
    return zlib.crc32(labels.numpy().tobytes(), zlib.crc32(floats(pixels).numpy().tobytes()))


def anonymous_mib() -> float:
    """Return the anonymous memory of this process and its children in MiB, without mapped files."""
    import psutil

    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):  # a loader worker may have just ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return total / 1024


def storage_at(endpoint: str | None, credentials: Path | str | None) -> Storage:
    """Return the S3 server of a stack."""
    return Storage(endpoint, str(credentials), "us-east-1")
