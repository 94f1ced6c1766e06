"""An ingest as a stream: order by disk, few sources in memory, and nothing done twice after an interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.environment.scratch import temporary_folder
from pipelines.shards.ingest import manifest as parts
from pipelines.shards.ingest import spool as disk
from pipelines.shards.ingest.manifest import SourceImage, rank, write_manifest
from pipelines.shards.ingest.readers import InMemory, StoredFile, ZipMember
from pipelines.shards.ingest.spool import Spool, ahead
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.forked import FORKING
from tests.pipelines.shards.ingest.sources import Bucket, picture, write_files

STORAGE = Storage()


@given(st.lists(st.integers(0, 20), max_size=200), st.integers(1, 9), st.integers(2, 4))
def test_a_spool_sorts_by_key_and_keeps_the_order_of_equal_keys(keys, held, fan_in):
    with temporary_folder("spool") as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(disk, "HELD", held)
        patched.setattr(disk, "FAN_IN", fan_in)
        patched.setattr(disk, "BLOCK", 3)
        spool = Spool(folder)
        for place, key in enumerate(keys):
            spool.add(key, place)
        expected = sorted(((key, (place,)) for place, key in enumerate(keys)), key=lambda each: each[0])
        assert list(spool) == list(spool) == expected
        assert len(spool) == len(keys)
        assert [key for key, _ in spool.groups()] == sorted(set(keys))


def test_calls_ahead_come_in_order_and_take_few_items_before_they_are_wanted():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        results = ahead(pool, lambda number: -number, items(), 5)
        assert [next(results) for _ in range(10)] == [-number for number in range(10)]
        assert len(taken) <= 16
        assert list(results) == [-number for number in range(10, 100)]


def listed(count: int):
    names = sorted((rank(f"{number}.png"), f"{number}.png") for number in range(count))
    return (
        (key, SourceImage("train", 3, "a picture", name, "12 ab", StoredFile(f"s3://b/{name}"))) for key, name in names
    )


def test_a_manifest_gives_back_its_images_and_keeps_all_of_one_hash_in_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "IMAGES_IN_A_PART", 16)
    images = [image for _, image in listed(300)]
    written = write_manifest(listed(300), 300, f"file://{tmp_path}", STORAGE)
    assert list(written) == images
    assert (len(written), written.first(7)) == (300, tuple(images[:7]))
    assert 8 <= 300 / len(written.numbers) <= 16
    found = [written.place(position) for position in range(300)]
    assert [written.part(written.numbers[part])[within] for part, within in found] == images
    assert pickle.loads(pickle.dumps(written)) == written


@pytest.mark.parametrize(
    "read",
    [
        InMemory(b"\0\xff"),
        StoredFile("s3://bucket/a.png"),
        StoredFile(os.fsdecode(b"file:///zo\xe9/\xff.png")),
        ZipMember("file:///z.zip", 1 << 40, 3, 4, 8, 0xFFFFFFFF, True),
    ],
)
def test_every_reader_comes_back_from_a_manifest(tmp_path, read):
    image = SourceImage("test", None, None, "a.png", "", read)
    assert list(write_manifest(iter([(rank("a.png"), image)]), 1, f"file://{tmp_path}", STORAGE)) == [image]


def test_a_source_that_grows_by_an_image_changes_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "IMAGES_IN_A_PART", 16)
    for name, count in (("before", 300), ("after", 301)):
        write_manifest(listed(count), count, f"file://{tmp_path}/{name}", STORAGE)
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("before", "after"))
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1


def peak_of_a_manifest(folder: Path, count: int) -> int:
    """Most memory of Python in bytes while a manifest of so many sources is written and read, in this process."""
    disk.HELD, disk.BLOCK, disk.FAN_IN, parts.IMAGES_IN_A_PART = 256, 8, 8, 64
    spool = Spool(folder / f"spool-{count}")
    tracemalloc.start()
    for number in range(count):
        name = f"{number:08d}.png"
        spool.add(rank(name), SourceImage("train", 0, None, name, "1 a", StoredFile(f"s3://bucket/{name}")))
    images = ((key, image) for key, (image,) in spool)
    written = write_manifest(images, len(spool), f"file://{folder}/parts-{count}", STORAGE)
    assert sum(1 for _ in written) == count
    return tracemalloc.get_traced_memory()[1]


def test_memory_does_not_grow_with_the_number_of_sources(tmp_path):
    # Each in a process of its own, which ends while it still traces: threads that other tests have left allocate too,
    # and before Python 3.12.9 to stop tracing while a thread does is a segmentation fault (python/cpython#128679).
    with ProcessPoolExecutor(1, FORKING, max_tasks_per_child=1) as processes:
        few, many = processes.map(peak_of_a_manifest, [tmp_path, tmp_path], [2_000, 16_000])
    assert many - few < 500_000  # where all of them would take 8 MB more


@dataclass(frozen=True)
class Counted(Bucket):
    """Counts how often each file of the source is read, and fails at a given one."""

    reads: list[str] = field(default_factory=list, compare=False)
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)
    fails: list[int] = field(default_factory=list, compare=False)

    def __hash__(self) -> int:
        return hash(self.root)

    def read(self, uri, start=0, stop=None, **patience):
        if "/photos/" in uri:
            with self.lock:
                self.reads.append(uri)
                if self.fails and len(self.reads) == self.fails[0]:
                    self.fails.pop(0)
                    raise KeyboardInterrupt
        return super().read(uri, start, stop, **patience)


def test_an_ingest_that_is_interrupted_five_times_reads_again_only_what_no_record_had(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "IMAGES_IN_A_PART", 8)
    write_files(
        tmp_path / "store/photos",
        {f"{c}/{i:02d}.png": picture(i + 100 * j) for j, c in enumerate("ab") for i in range(60)},
    )
    options = {"image_size": 8, "channels": 3, "shard_samples": 10, "workers": 1}
    whole = ingest("s3://bucket/photos", f"file://{tmp_path}/whole", Counted(root=str(tmp_path / "store")), **options)
    storage = Counted(root=str(tmp_path / "store"), fails=[30, 75, 150, 190, 240])
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            ingest("s3://bucket/photos", f"file://{tmp_path}/ds", storage, **options)
    done = ingest("s3://bucket/photos", f"file://{tmp_path}/ds", storage, **options)
    assert done.dataset.digest == whole.dataset.digest
    assert not storage.fails
    # Each image is read for its fingerprint and for its shard, and again what was under way at an interruption.
    assert 240 <= len(storage.reads) <= 240 + 5 * (2 * 10 + 16)
    before = len(storage.reads)
    again = ingest("s3://bucket/photos", f"file://{tmp_path}/ds", storage, **options)
    assert again.dataset == done.dataset
    assert len(storage.reads) - before <= 8  # those by which the time of an image is estimated


@dataclass(frozen=True)
class CountedParts(Storage):
    """Counts how often each part of a manifest is read."""

    reads: Counter[str] = field(default_factory=Counter, compare=False)

    def read(self, uri, start=0, stop=None, **patience):
        if "/sources/" in uri:
            self.reads[uri] += 1
        return super().read(uri, start, stop, **patience)


def test_each_part_of_a_manifest_is_read_for_comparing_and_for_writing_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "IMAGES_IN_A_PART", 8)
    write_files(tmp_path / "photos", {f"{i:03d}.png": picture(i) for i in range(120)})
    storage = CountedParts()
    ingest(str(tmp_path / "photos"), f"file://{tmp_path}/ds", storage, image_size=8, channels=3, shard_samples=10)
    assert len(storage.reads) > 8
    # The first ones are read once more, to estimate the time that an image takes.
    assert sorted(storage.reads.values())[:-2] == [2] * (len(storage.reads) - 2)


MANY, KILLS = 100_000, 5


@dataclass(frozen=True)
class Tallied(Storage):
    """Adds a byte to a file for each picture that is read, so that another process knows how many were."""

    tally: str = ""

    def read(self, uri, start=0, stop=None, **patience):
        if uri.endswith(".png"):
            descriptor = os.open(self.tally, os.O_APPEND | os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b".")
            os.close(descriptor)
        return super().read(uri, start, stop, **patience)


def ingest_many(source: str, to: str, tally: str) -> None:
    ingest(source, to, Tallied(tally=tally), image_size=8, channels=1, workers=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_files_are_ingested_though_the_process_is_killed_five_times(tmp_path):
    random = np.random.default_rng(0)
    for number in range(MANY):
        path = tmp_path / f"photos/{number % 10}/{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    source, tally = str(tmp_path / "photos"), tmp_path / "tally"
    context, begun = multiprocessing.get_context("spawn"), []
    for kill in range(1, KILLS + 1):
        process = context.Process(target=ingest_many, args=(source, f"file://{tmp_path}/ds", str(tally)))
        process.start()
        while not tally.exists() or tally.stat().st_size < kill * 2 * MANY / (KILLS + 1):
            assert process.is_alive()
            time.sleep(0.05)
        process.kill()
        process.join()
        begun.append(tally.stat().st_size)
    ingest_many(source, f"file://{tmp_path}/ds", str(tally))
    reads = tally.stat().st_size
    ingest_many(source, f"file://{tmp_path}/whole", str(tmp_path / "other"))
    once = (tmp_path / "other").stat().st_size
    print(f"{MANY:,} files, killed after {begun} reads: {reads:,} reads, undisturbed {once:,}")
    described = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("ds", "whole")]
    assert described[0] == described[1]
    # A part of fingerprints or a shard that was being made is made again; a worker has two of a kind under way.
    assert reads - once <= KILLS * 2 * max(parts.IMAGES_IN_A_PART, 1000)
