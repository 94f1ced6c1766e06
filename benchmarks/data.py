"""Benchmark of reading shards from S3: this project, WebDataset's documented pipeline and MosaicML Streaming.

    python -m benchmarks.data [--quick] [--json]

One SeaweedFS server on this machine serves the same images to all systems, as the same tar shards (MosaicML: in its own
format). Each measurement runs in a fresh process pinned to the same number of cores, with the systems alternating;
medians are reported. Every system yields shuffled batches of 256 float32 images [B, 3, 32, 32] with int64 labels. Ours
shuffles with the default of 8 lanes and windows of 4 shards, which mixes more than the buffer of 1,000 samples in
WebDataset's README.

MosaicML Streaming requires an older numpy than the other packages; install it without its other stores by
`pip install --no-deps mosaicml-streaming brotli python-snappy cramjam zstd xxhash catalogue`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.results import ROOT, Size, commit, make_parser, publish, python_m
from benchmarks.stacks import stack_of
from pipelines import stack
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import Storage, join

BATCH = 256
SHARD_SAMPLES = 1_000
SYSTEMS = {"ours": "ddpm-pipelines", "webdataset": "webdataset", "mosaicml": "mosaicml-streaming"}
URI = "s3://ddpm/benchmarks/data"
Make = Callable[[int], Iterator[Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and publish its result."""
    parser = make_parser("data", __doc__, quick="fewer images and turns")
    parser.add_argument("--child", nargs=4, metavar=("SYSTEM", "MEASURE", "WORKERS", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help="folder of a stack that runs; default: one of its own")
    options = parser.parse_args(arguments)
    if options.child:
        system, measure, workers, cache = options.child
        print(json.dumps(child(system, measure, int(workers), Path(cache), options.home)))
        return
    publish(run(options.size, options.home), "data", options)


# --- the parent ----------------------------------------------------------------------------------------------


def run(size: Size, home: Path | None) -> dict[str, Any]:
    """Write the data, measure all systems and return the summary."""
    images, turns, measures = size.of((16_000, 5, MEASURES), (8_000, 1, MEASURES), (1_024, 1, FEW_MEASURES))
    with stack_of(home, ["s3"]) as state, tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        storage = Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1")
        say(f"writing {images:,} images")
        systems = write_data(storage, Path(scratch), images)
        rows = measure(systems, Path(scratch), state.home, turns, measures)
    return summary(rows, systems, images, size)


def write_data(storage: Storage, scratch: Path, images: int) -> list[str]:
    """Write smooth random images as tar shards, and as MDS if installed; return the systems that can be measured."""
    folder = scratch / "images"
    rng = np.random.default_rng(0)
    from PIL import Image

    for split, count in (("train", images), ("test", 10)):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
            pixels.save(folder / split / str(i % 10) / f"{i:07d}.png")
    ingest(str(folder), URI, storage, image_size=32, channels=3, shard_samples=SHARD_SAMPLES)
    systems = ["ours", "webdataset"]
    try:
        from streaming import MDSWriter
    except ImportError:
        say("mosaicml-streaming is not installed: left out")
        return systems
    with MDSWriter(out=str(scratch / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for path in sorted((folder / "train").rglob("*.png"), key=lambda p: p.name):
            writer.write({"image": path.read_bytes(), "label": int(path.parent.name)})
    for path in (scratch / "mds").iterdir():
        storage.upload(path, join(f"{URI}-mds", path.name))
    return [*systems, "mosaicml"]


MEASURES = {1: ("cold", "warm", "resume10", "resume50", "resume90"), 2: ("cold",)}
"""Number of cores -> what is measured."""
FEW_MEASURES = {1: ("cold", "resume50"), 2: ("cold",)}
"""As many with `--smoke`."""


def measure(
    systems: list[str], scratch: Path, home: Path, turns: int, measures: Mapping[int, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return one row per measurement, each from a fresh process, with the systems alternating."""
    rows = []
    for turn in range(turns):
        for cores, names in measures.items():
            for system in systems:
                cache = scratch / f"cache-{system}-{cores}"
                shutil.rmtree(cache, ignore_errors=True)
                for name in names:
                    if name.startswith("resume"):
                        shutil.rmtree(cache, ignore_errors=True)  # a resumed run may be on a new node
                    row = in_process(system, name, cores, cache, home)
                    say(f"turn {turn}, {cores} cores, {system}, {name}: {row}")
                    rows.append({"system": system, "measure": name, "cores": cores, "turn": turn, **row})
                shutil.rmtree(cache, ignore_errors=True)
    return rows


def in_process(system: str, name: str, cores: int, cache: Path, home: Path) -> dict[str, Any]:
    """Return one measurement, made in a process of its own on `cores` cores."""
    command = [*python_m("benchmarks.data"), "--home", str(home)]
    command += ["--child", system, name, str(cores), str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{system}, {name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(rows: list[dict[str, Any]], systems: list[str], images: int, size: Size) -> dict[str, Any]:
    """Return medians by system and number of cores, and the ratios."""

    def median(system: str, measure_: str, cores: int, key: str) -> float:
        picked = [r[key] for r in rows if (r["system"], r["measure"], r["cores"]) == (system, measure_, cores)]
        return statistics.median(picked)

    table: dict[str, Any] = {}
    for system in systems:
        for cores in (1, 2):
            table[f"{system}_{cores}"] = {
                "samples_per_s": median(system, "cold", cores, "samples_per_s"),
                "first_batch_s_cold": median(system, "cold", cores, "first_batch_s"),
                "peak_rss_mib": median(system, "cold", cores, "anonymous_mib"),
            }
        measured = {row["measure"] for row in rows}
        if "warm" in measured:
            table[f"{system}_1"]["samples_per_s_warm"] = median(system, "warm", 1, "samples_per_s")
            table[f"{system}_1"]["first_batch_s_warm"] = median(system, "warm", 1, "first_batch_s")
        table[f"{system}_1"]["resume_first_batch_s"] = {
            name.removeprefix("resume"): median(system, name, 1, "first_batch_s")
            for name in sorted(measured)
            if name.startswith("resume")
        }
    ratios = {
        f"speedup_{peer}" + ("" if cores == 1 else "_2_cores"): table[f"ours_{cores}"]["samples_per_s"]
        / table[f"{peer}_{cores}"]["samples_per_s"]
        for peer in systems[1:]
        for cores in (1, 2)
    }
    return {
        "benchmark": "data",
        "quick": size is not Size.FULL,
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {name: _version(package) for name, package in SYSTEMS.items()},
        "images": images,
        **ratios,
        "systems": table,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- a child -------------------------------------------------------------------------------------------------


def child(system: str, name: str, cores: int, cache: Path, home: Path) -> dict[str, Any]:
    """Return the time to the first batch, and for "cold" and "warm" the samples per second over an epoch."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    state = stack.read_state(home)
    assert state is not None
    storage = Storage(state.s3_endpoint, str(state.credentials_file), "us-east-1")
    total = read_dataset(URI, storage).samples("train")
    skip = int(name.removeprefix("resume")) * total // 100 // BATCH * BATCH if name.startswith("resume") else 0
    make = {"ours": ours, "webdataset": webdataset_, "mosaicml": mosaicml}[system](storage, cache, cores)
    began = time.perf_counter()
    batches = make(skip)
    images, labels = next(batches)
    first = time.perf_counter() - began
    assert images.dtype == torch.float32
    assert tuple(images.shape[1:]) == (3, 32, 32)
    assert len(labels) == len(images)
    row = {"first_batch_s": round(first, 4)}
    if not skip:
        count, began = 0, time.perf_counter()
        for images, _ in batches:
            count += len(images)
            if count >= total - 2 * BATCH:
                break
        row["samples_per_s"] = round(count / (time.perf_counter() - began))
        row["anonymous_mib"] = round(anonymous_mib())
    return row


def anonymous_mib() -> float:
    """Return the anonymous memory of this process and its children in MiB, without mapped files."""
    import psutil

    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):  # a loader worker may have just ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return total / 1024


def ours(storage: Storage, cache: Path, cores: int) -> Make:
    """Return a maker of this project's training stream, with one decoding thread per core."""

    def make(skip: int) -> Iterator[Any]:
        settings = StreamSettings(lanes=8, window=4, seed=0, cache_dir=cache, cache_bytes=20 << 30, threads=cores)
        dataset = read_dataset(URI, storage)
        reader, order = open_stream(dataset, "train", storage, settings)
        end = dataset.samples("train")
        stream = TrainingStream(
            reader, order, batch_size=BATCH, rank=0, world_size=1, start=skip, stop=end, threads=cores
        )
        for batch in stream:
            yield batch.images, batch.labels

    return make


def webdataset_(storage: Storage, cache: Path, cores: int) -> Make:
    """Return a maker of WebDataset's README pipeline, with boto3 for S3 and loader workers if there are two cores."""
    import webdataset as wds

    def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
        import io

        return io.BufferedReader(_Body(storage, url), 1 << 20)

    wds.gopen_schemes["s3"] = open_s3
    urls = [join(URI, shard.name) for shard in read_dataset(URI, storage).shards("train")]

    def make(skip: int) -> Iterator[Any]:
        raw = wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
        if skip:  # it cannot resume: samples already seen are read again and discarded
            raw = raw.slice(skip, 10**12)
        pipeline = raw.shuffle(1000).decode("torchrgb").to_tuple("png", "cls")
        if cores == 1:
            yield from pipeline.batched(BATCH)
        else:
            yield from wds.WebLoader(pipeline.batched(BATCH), batch_size=None, num_workers=cores)

    return make


@lru_cache(maxsize=2)
def _s3_client(storage: Storage, process: int) -> Any:
    """Return the client of a process: a forked loader worker must not share its parent's connections."""
    from pipelines.storage.s3 import S3Client

    return S3Client(storage)


class _Body:
    """A raw stream of a tar's bytes from one GET request."""

    def __new__(cls, storage: Storage, url: str) -> Any:
        import io

        from pipelines.storage.s3 import split_s3

        bucket, key = split_s3(url)
        with _s3_client(storage, os.getpid()).calls(url, "read") as client:
            body = client.get_object(Bucket=bucket, Key=key)["Body"]

        class Raw(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                data = body.read(len(buffer))
                buffer[: len(data)] = data
                return len(data)

        return Raw()


def mosaicml(storage: Storage, cache: Path, cores: int) -> Make:
    """Return a maker of MosaicML's stream over its own shards of the same images."""
    import io

    from PIL import Image
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    os.environ["S3_ENDPOINT_URL"] = storage.endpoint_url or ""
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = storage.credentials_file or ""

    class Decoded(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            pixels = np.asarray(Image.open(io.BytesIO(sample["image"])).convert("RGB"))
            return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255), sample["label"]

    def make(skip: int) -> Iterator[Any]:
        data = Decoded(remote=f"{URI}-mds", local=str(cache), shuffle=True, batch_size=BATCH)
        if skip:
            data.load_state_dict({"epoch": 0, "sample_in_epoch": skip, "num_canonical_nodes": 1, "shuffle_seed": 9176})
        yield from DataLoader(data, batch_size=BATCH, num_workers=0 if cores == 1 else cores)

    return make


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
