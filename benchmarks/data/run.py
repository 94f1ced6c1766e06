"""Benchmark of reading shards from S3: this project, WebDataset, MosaicML Streaming, litData and Megatron Energon.

    python -m benchmarks.data [--quick] [--json]

One SeaweedFS server on this machine serves the same PNGs to all systems, in the same tar shards (MosaicML and litData:
in their own formats, with as many samples in a shard). Each measurement runs in a fresh process that is pinned to as
many cores, the systems by turns, and medians are reported. Every system yields shuffled batches of 256 images, decoded
by the same function, as float32 [256, 3, 32, 32] with int64 labels.

- throughput: samples per second over an epoch, on one core in one process, with an empty cache on this node's disk
  (cold) and with what the epoch before has left there (warm), and on two cores: in one process with two threads (ours),
  or with two loader processes (the others). `speedup_PEER` is that of ours, cold, by that of the peer.
- resuming: seconds to the first batch from the state of a stream at 10, 50 and 90 % of an epoch, in a process that has
  imported everything and has an empty cache, with what opens the dataset and its connections. WebDataset has no state,
  and skips. `same_batch` tells whether it is the batch that would have followed.
- mixture: the throughput of ours from five sources with the same images together.

A peer that is not installed, or never runs, is named in `missing`, and one that fails in some turn in `failed`, with
the reason. How to install them: `benchmarks.data`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.data.measures import DEPTHS, SYSTEMS, measured, storage_at
from benchmarks.data.peers import PEERS
from benchmarks.data.systems import BATCH, BUFFER, OWN, SIZE, SOURCES, URI, ReadSetup
from benchmarks.results import ROOT, Size, commit, make_parser, publish, python_m
from benchmarks.stacks import stack_of
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage, join

RESUMES = tuple(f"resume{depth}" for depth in DEPTHS)
Rows = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("data", __doc__, quick="fewer images and turns")
    parser.add_argument("--child", nargs=4, metavar=("SYSTEM", "CORES", "CACHE", "IMAGES"), help=argparse.SUPPRESS)
    parser.add_argument("--measures", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--server", nargs=2, metavar=("ENDPOINT", "CREDENTIALS"), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help="folder of a stack that runs; default: one of its own")
    options = parser.parse_args(arguments)
    if options.child:
        name, cores, cache, images = options.child
        setup = ReadSetup(storage_at(*options.server), Path(cache), int(cores))
        print(json.dumps(measured(name, options.measures, setup, int(images))))
        return
    publish(run(options.size, options.home), "data", options)


def run(size: Size, home: Path | None) -> dict[str, Any]:
    """Write the data, measure all systems and return the summary."""
    began = time.perf_counter()
    images, turns = size.of((16_000, 5), (8_000, 1), (1_280, 1))
    with stack_of(home, ["s3"]) as state, tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        storage = storage_at(state.s3_endpoint, state.credentials_file)
        say(f"writing {images:,} images")
        missing = write_data(storage, Path(scratch), images)
        rows, failed = measure(storage, Path(scratch), images, turns, missing)
    for name in (name for name in PEERS if name not in missing):
        if not any((row["system"], row["measure"], row["cores"]) == (name, "cold", 1) for row in rows):
            missing[name] = failed[f"{name}, 1 core"]
    return (
        summary(rows, missing, images, turns, size)
        | {"failed": failed}
        | {"seconds": round(time.perf_counter() - began)}
    )


# --- data ----------------------------------------------------------------------------------------------------


def write_data(storage: Storage, scratch: Path, images: int) -> dict[str, str]:
    """Write smooth random images in all formats; return the peers without one, with the reason."""
    parts = [scratch / f"part-{number}" for number in range(SOURCES)]
    draw(scratch / "images", parts, images)
    for folder, uri in [(scratch / "images", URI), *((part, f"{URI}-{part.name}") for part in parts)]:
        ingest(str(folder), uri, storage, image_size=SIZE, channels=3, shard_samples=BUFFER)
    tars = scratch / "tars"
    tars.mkdir()
    for shard in read_dataset(URI, storage).shards("train"):
        (tars / shard.name).write_bytes(storage.read(join(URI, shard.name)))
    missing: dict[str, str] = {}
    for name, kind in PEERS.items():
        try:
            kind.write(tars, scratch / name)
        except Exception as error:  # noqa: BLE001  whatever keeps a peer from running here
            missing[name] = reason(error)
            say(f"{name} is left out: {missing[name]}")
            continue
        for path in (path for path in (scratch / name).rglob("*") if path.is_file()):
            storage.upload(path, join(f"{URI}-{name}", str(path.relative_to(scratch / name))))
    return missing


def draw(folder: Path, parts: Sequence[Path], images: int) -> None:
    """Write images as PNGs in class folders, and each once more in one of the parts."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 50)):
        for root in (folder, *parts):
            for label in range(10):
                (root / split / str(label)).mkdir(parents=True)
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE))
            name = Path(split, str(i % 10), f"{i:07d}.png")
            pixels.save(folder / name)
            os.link(folder / name, parts[i // 10 % len(parts)] / name)


def reason(error: Exception) -> str:
    """Return why a peer is missing: the error, or the last one that the process printed that measured it."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    return next(line for line in reversed(lines) if re.match(r"\w*(Error|Exception): ", line))[:200]


# --- measurements --------------------------------------------------------------------------------------------


def plan(name: str, first: bool) -> dict[int, tuple[str, ...]]:
    """Return what is measured of a system in a turn, by the number of cores; states are saved in the first turn."""
    if name == "webdataset_readme":
        return {1: ("cold",)}
    if name == "ours_of_5_sources":
        return {1: ("cold", "warm")}
    return {1: (*(("save",) if first else ()), "cold", "warm", *RESUMES), 2: ("cold",)}


def measure(
    storage: Storage, scratch: Path, images: int, turns: int, missing: Mapping[str, str]
) -> tuple[Rows, dict[str, str]]:
    """Measure the systems by turns.

    Returns:
        A row per measurement; and peers that failed in a turn, with their cores and the reason.
    """
    rows: Rows = []
    failed: dict[str, str] = {}
    for turn in range(turns):
        for name in SYSTEMS:
            for cores, measures in plan(name, turn == 0).items():
                if name in missing:
                    continue
                setup = ReadSetup(storage, scratch / f"cache-{name}-{cores}", cores)
                try:
                    found = in_process(name, measures, setup, images)
                except RuntimeError as error:
                    if name in OWN:
                        raise
                    failed[f"{name}, {cores} core{'s' * (cores > 1)}"] = reason(error)
                    say(f"{name} has failed: {error}")
                    continue
                for measure_, row in found.items():
                    say(f"turn {turn}, {cores} cores, {name}, {measure_}: {row}")
                    rows.append({"system": name, "measure": measure_, "cores": cores, "turn": turn, **row})
    return rows, failed


def in_process(name: str, measures: Sequence[str], setup: ReadSetup, images: int) -> dict[str, dict[str, Any]]:
    """Return what was measured of a system, in a process that has imported nothing before.

    Raises:
        RuntimeError: it failed; the last line is why.
    """
    command = [*python_m("benchmarks.data"), "--child", name, str(setup.cores), str(setup.cache), str(images)]
    command += ["--server", setup.storage.endpoint_url or "", setup.storage.credentials_file or ""]
    command += ["--measures", *measures]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed\n{done.stderr[-4000:]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# --- summary -------------------------------------------------------------------------------------------------


def summary(rows: Rows, missing: Mapping[str, str], images: int, turns: int, size: Size) -> dict[str, Any]:
    """Return medians by system, and the ratios."""
    there = [name for name in SYSTEMS if name not in missing]
    table = {name: figures([row for row in rows if row["system"] == name]) for name in there}
    ours, mixed = table["ours"], table["ours_of_5_sources"]
    ratios: dict[str, float] = {}
    for name in (name for name in PEERS if name in table):
        for ending in ("", "_warm", "_2_cores"):
            if (rate := table[name].get(f"samples_per_s{ending}")) is not None:
                ratios[f"speedup_{name}{ending}"] = ours[f"samples_per_s{ending}"] / rate
    return {
        "benchmark": "data",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {name: version_of(SYSTEMS[name].package) for name in ("ours", *PEERS)},
        "missing": dict(missing),
        "conditions": conditions(images, turns),
        **ratios,
        "mixture_of_one_source": {
            key: mixed[each] / ours[each] for key, each in (("cold", "samples_per_s"), ("warm", "samples_per_s_warm"))
        },
        "systems": table,
    }


def figures(rows: Rows) -> dict[str, Any]:
    """Return the medians of a system."""

    def of(measure_: str, cores: int = 1) -> Rows:
        return [row for row in rows if (row["measure"], row["cores"]) == (measure_, cores)]

    def median(picked: Rows, key: str, digits: int | None = None) -> float:
        return round(statistics.median(row[key] for row in picked), digits)

    found: dict[str, Any] = {
        "samples_per_s": median(of("cold"), "samples_per_s"),
        "first_batch_s": median(of("cold"), "first_batch_s", 4),
        "anonymous_mib": median(of("cold"), "anonymous_mib"),
    }
    if warm := of("warm"):
        found["samples_per_s_warm"] = median(warm, "samples_per_s")
        found["first_batch_s_warm"] = median(warm, "first_batch_s", 4)
    if two := of("cold", 2):
        found["samples_per_s_2_cores"] = median(two, "samples_per_s")
        found["anonymous_mib_2_cores"] = median(two, "anonymous_mib")
    if resumed := [row for row in rows if row["measure"] in RESUMES]:
        found["resume_first_batch_s"] = {
            str(depth): median(of(f"resume{depth}"), "first_batch_s", 4) for depth in DEPTHS
        }
        found["resume_same_batch"] = all(row["same_batch"] for row in resumed)
    return found


def conditions(images: int, turns: int) -> dict[str, Any]:
    """Return what is the same for all systems."""
    return {
        "images": images,
        "image": f"PNG of {SIZE}x{SIZE}, RGB, the same bytes for all",
        "shard_samples": BUFFER,
        "batch_size": BATCH,
        "decoder": "that of this project (OpenCV); webdataset_readme: that of WebDataset's README (Pillow)",
        "batches": "float32 [256, 3, 32, 32], int64 [256]",
        "processes": "1 core: one process; 2 cores: ours one with two threads, the others two loader processes",
        "shuffle": {
            "ours": "8 lanes, windows of 4 shards",
            "webdataset": "order of shards, buffer of 1,000 samples",
            "mosaicml": "its default, py1e",
            "litdata": "order of chunks, and within a chunk",
            "energon": "order of shards, buffer of 1,000 samples",
        },
        "store": "SeaweedFS by S3 on the same machine",
        "turns": turns,
        "statistic": "median over turns, each in a process of its own",
        "torch_threads": torch.get_num_threads(),
    }


def version_of(package: str) -> str:
    """Return the version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
