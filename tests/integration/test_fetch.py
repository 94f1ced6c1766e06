"""Shards from the real store over connections that break, and from a store that is asked too much."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import Dataset, Member, ShardInfo
from pipelines.shards.ingest.write import ingest
from pipelines.shards.source import ShardShortError
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import ShortObjectError, Storage, StorageError, rate
from pipelines.training.goodput import measure
from pipelines.training.ledger import read_sessions
from tests.chaos.fault_proxy import Fault, FaultProxy
from tests.integration.conftest import Shell

pytestmark = pytest.mark.integration

DATA = random.Random(1).randbytes(6 << 20)
SHARD = ShardInfo("a.tar", 1, len(DATA), hashlib.sha256(DATA).hexdigest())
URI = "s3://ddpm/tests/fetch"


@pytest.fixture(scope="module")
def stored(s3: Storage) -> Storage:
    s3.write(f"{URI}/a.tar", DATA)
    return s3


@pytest.fixture(scope="module")
def pictures(s3: Storage, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """200 pictures of two classes in shards of 20, all of them different."""
    folder, random_ = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(200):
        path = folder / f"{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    uri = "s3://ddpm/datasets/pictures"
    return ingest(str(folder), uri, s3, image_size=8, channels=1, shard_samples=20, test_fraction=0.1).dataset


def get(fetcher: ShardFetcher, start: int, stop: int) -> bytes:
    member = Member(start, stop - start, zlib.crc32(DATA[start:stop]))
    return bytes(fetcher.read([(SHARD, [member])])[0][0])


def through(proxy: FaultProxy, storage: Storage) -> Storage:
    return replace(storage, endpoint_url=proxy.url)


def test_a_shard_arrives_over_connections_that_are_cut_and_no_byte_is_asked_for_twice(stored, tmp_path: Path):
    assert stored.endpoint_url is not None
    with FaultProxy(stored.endpoint_url) as proxy:
        proxy.start(Fault("short_body", after=1 << 20))
        cache = ShardCache(tmp_path, 1 << 30)
        fetcher = ShardFetcher(URI, through(proxy, stored), cache)
        fetcher.require([SHARD])
        assert cache.path(SHARD).read_bytes() == DATA
        assert fetcher.stats.requests >= 6
        # What was on its way when a connection broke is lost with it, and no more.
        assert proxy.relayed < 1.3 * len(DATA)


def test_blocks_come_through_an_outage_of_seconds(stored):
    assert stored.endpoint_url is not None
    with FaultProxy(stored.endpoint_url) as proxy:
        fetcher = ShardFetcher(URI, through(proxy, stored), None)
        assert get(fetcher, 0, 10) == DATA[:10]
        proxy.start(Fault("refuse", seconds=4))
        began = time.monotonic()
        assert get(fetcher, 3 << 20, 5 << 20) == DATA[3 << 20 : 5 << 20]
        assert 3 < time.monotonic() - began < 60


def test_a_shard_that_is_cut_short_is_named(stored, tmp_path):
    """The store answers InvalidRange, or with fewer bytes than were asked for."""
    uri = "s3://ddpm/tests/cut"
    stored.write(f"{uri}/a.tar", DATA[: 3 << 20])
    began = time.monotonic()
    for start, stop in [(4 << 20, 5 << 20), ((3 << 20) - 10, (3 << 20) + 10)]:
        for cache in (None, ShardCache(tmp_path / f"{start}", 1 << 30)):
            with pytest.raises(ShardShortError, match=r"a\.tar is cut short: it has 3,145,728 bytes, the index"):
                get(ShardFetcher(uri, stored, cache), start, stop)
    with pytest.raises(ShortObjectError):
        stored.read(f"{uri}/a.tar", 4 << 20, 5 << 20)
    assert time.monotonic() - began < 10


def test_a_training_on_a_shard_that_is_cut_short_ends_at_once_and_names_it(shell: Shell, s3: Storage):
    uri = "s3://ddpm/datasets/cut"
    shell.ok("ingest", "digits", "--to", uri, "data.shard_bytes=100000", "--json")
    names = sorted(e.uri for e in s3.list(uri) if e.uri.endswith(".tar") and "/train-" in e.uri)
    data = s3.read(names[1])
    s3.write(names[1], data[: len(data) // 2])
    arguments = [f"data.uri={uri}", "name=cut", "tracking.grid_every=null", "checkpoint.every=640"]
    done = shell("train", "+experiment=digits", "images=12800", *arguments, "--json")
    assert done.code == 1
    found = f"{names[1]} is cut short: it has {len(data) // 2:,} bytes, the index says {len(data):,}: write it again; "
    assert f"{found}`ddpm check {uri}`" in " ".join(done.err.split())
    assert measure(read_sessions(s3, "s3://ddpm/runs/cut")).attempts == 1  # the workers were not started again
    checked = shell("check", uri, "--quarantine", "--json")
    assert {(p["shard"], p["kind"]) for p in checked.answer["problems"] if p["sample"] is None} == {
        (names[1].rpartition("/")[2], "truncated")
    }


def test_a_mistake_is_not_waited_for(stored):
    began = time.monotonic()
    with pytest.raises(StorageError, match="nothing is stored there"):
        get(ShardFetcher(f"{URI}/nowhere", stored, None), 0, 10)
    with pytest.raises(StorageError, match="the bucket does not exist"):
        get(ShardFetcher("s3://no-such-bucket-here", stored, None), 0, 10)
    assert time.monotonic() - began < 5


def test_a_storm_of_slow_down_lowers_the_rate_of_reads_which_recovers_and_no_sample_is_lost(
    s3, pictures, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(rate, "RAISE", 0.4)  # as after more seconds
    settings = StreamSettings(lanes=4, window=2, seed=0, cache_dir=tmp_path / "cache", cache_bytes=1)
    assert s3.endpoint_url is not None
    with FaultProxy(s3.endpoint_url) as proxy:
        reader, order = open_stream(pictures, "train", through(proxy, s3), settings)
        stream = TrainingStream(reader, order, batch_size=20, rank=0, world_size=1, stop=None)
        storage = reader.fetcher.source.storage
        ordinals: list[int] = []
        times: Counter[bytes] = Counter()
        deadline = time.monotonic() + 40
        limits: list[float | None] = []
        ending = threading.Event()

        def watch() -> None:
            while not ending.wait(0.02):
                limits.append(storage.throttling().limit)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        for batch in stream:
            ordinals += batch.ordinals.tolist()
            times.update(image.numpy().tobytes() for image in batch.images)
            if len(ordinals) == 200:
                assert storage.throttling().limit is None
                storm = proxy.start(Fault("slow_down", seconds=2.5, path="train-.*tar"))
            now = storage.throttling()
            if now.slow_downs and now.limit is None and len(ordinals) % order.total == 0:
                break
            assert time.monotonic() < deadline, now
        ending.set()
        watcher.join()
        reader.close()
    limited = [limit for limit in limits if limit is not None]
    lowest = limited.index(min(limited))
    assert limits[0] is None  # at first there is no limit,
    assert limited[lowest] <= limited[0] / 2  # then it falls,
    assert max(limited[lowest:]) > limited[0]  # and rises,
    assert limits[-1] is None  # until there is none
    assert sorted(ordinals) == list(range(len(ordinals)))
    assert len(times) == order.total
    assert set(times.values()) == {len(ordinals) // order.total}  # each picture once in every epoch
    slow_downs, throttled_s, waited_s = stream.throttled()
    assert slow_downs == len(storm.hits)
    assert throttled_s > 2
    assert 1 < waited_s <= throttled_s + 1
    said = [record.getMessage() for record in caplog.records if record.name == "pipelines.storage.rate"]
    assert [proxy.url in line for line in said] == [True, True]
    assert "answers that it is asked too much (SlowDown)" in said[0]
    assert f"after {slow_downs:,} answers of SlowDown" in said[1]


def test_the_ledger_of_a_training_tells_for_how_long_the_store_has_throttled_its_reads(
    shell: Shell, s3: Storage, pictures: Dataset
):
    assert s3.endpoint_url is not None
    with FaultProxy(s3.endpoint_url) as proxy:
        storm = proxy.start(Fault("slow_down", seconds=2, waits=True, methods=("GET",), path="train-.*tar"))
        arguments = [f"data.uri={pictures.uri}", "data.num_classes=2", "data.cache_gib=0.00001", "data.memory_mib=0"]
        arguments += [
            "name=throttled",
            "tracking.grid_every=null",
            "checkpoint.every=640",
            f"storage.endpoint_url={proxy.url}",
        ]
        arguments += [f"storage.credentials_file={s3.credentials_file}", f"storage.region={s3.region}"]
        done = shell.ok("train", "+experiment=digits", "images=256", *arguments, "--json")
    assert storm.hits
    recorded = measure(read_sessions(s3, "s3://ddpm/runs/throttled"))
    assert recorded.images_seen == 256
    assert 0 < recorded.slow_downs == done.answer["goodput"]["slow_downs"] <= len(storm.hits)  # of rank 0
    assert recorded.throttled_s >= recorded.throttled_wait_s > 0.5
    assert "reads throttled by the store: " in done.err
    said = " ".join(done.err.split())
    assert "answers that it is asked too much (SlowDown)" in said
    assert "rank 0: shards are read by ranges" in said
