import itertools
from dataclasses import replace

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from pipelines.shards import read
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.write import ingest
from pipelines.shards.members import decode_pixels
from pipelines.shards.quarantine import Problem, Quarantine, read_quarantine
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream, read_ahead
from pipelines.shards.torch_dataset import ShardDataset
from pipelines.storage import Storage
from tests.forked import FORKING


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    uri = f"file://{tmp_path_factory.mktemp('stream')}/digits"
    return ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=100).dataset


@pytest.fixture
def settings(tmp_path):
    return StreamSettings(lanes=5, window=2, seed=3, cache_dir=tmp_path / "cache", cache_bytes=10**8)


def source(dataset, settings, **options):
    return ShardDataset(dataset, "train", Storage(), settings, **{"batch_size": 30, **options})


def ordinals(samples, count):
    return [sample["__ordinal__"] for sample in itertools.islice(samples, count)]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_loader_workers_keep_the_order_of_one_process(dataset, settings, workers):
    alone = ordinals(source(dataset, settings, rank=1, world_size=2), 95)
    loader = DataLoader(
        source(dataset, settings, rank=1, world_size=2),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=FORKING,
    )
    assert ordinals(loader, 95) == alone
    assert len(set(alone)) == 95


def test_samples_are_those_of_the_training_stream(dataset, settings):
    reader, order = open_stream(dataset, "train", Storage(), settings)
    stream = TrainingStream(reader, order, batch_size=30, rank=0, world_size=1, start=60, stop=120)
    numbers, labels = zip(*[(batch.ordinals, batch.labels) for batch in stream], strict=True)
    samples = list(itertools.islice(source(dataset, settings, samples_seen=60), 60))
    assert [s["__ordinal__"] for s in samples] == torch.cat(numbers).tolist()
    assert [int(s["cls"]) for s in samples] == torch.cat(labels).tolist()


def test_pixels_that_are_kept_in_memory_are_the_same_and_decoded_once(dataset, settings, monkeypatch):
    decoded = []
    decode = decode_pixels

    def counted(*arguments):
        decoded.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(read, "decode_pixels", counted)
    excluded = Quarantine(dataset.digest, (Problem("train-000001.tar", 3, "train-00000103", "label", "is wrong"),))
    count = dataset.samples("train") - 1
    streams = []
    for memory_bytes in (0, count * 64 - 1, count * 64):
        given = replace(settings, memory_bytes=memory_bytes)
        reader, order = open_stream(dataset, "train", Storage(), given, excluded)
        stream = TrainingStream(reader, order, batch_size=50, rank=0, world_size=1, start=0, stop=3_000, threads=3)
        before = len(decoded)
        streams.append((list(stream), len(decoded) - before))
    (plain, all_of_them), (_, too_large), (kept, once) = streams
    assert all_of_them == too_large == 3_000
    assert count <= once < 1.1 * count  # threads that begin with the same sample each decode it
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.ordinals, b.ordinals)


def test_ordinary_webdataset_stages_follow_it(dataset, settings):
    stages = [webdataset.decode("torchl"), webdataset.to_tuple("png", "cls"), webdataset.batched(10)]
    images, labels = next(iter(webdataset.DataPipeline(source(dataset, settings), *stages)))
    assert images.shape == (10, 8, 8)
    reader, order = open_stream(dataset, "train", Storage(), settings)
    ours = reader.batch(order.batch(0, 30))
    assert labels.tolist() == ours.labels[:10].tolist()
    torch.testing.assert_close(images * 2 - 1, ours.images[:10, 0])


def test_the_state_is_one_number_and_the_digest(dataset, settings):
    first = source(dataset, settings)
    seen = ordinals(first, 75)
    state = first.state_dict()
    assert state["samples_seen"] == 60
    for saved in (state, {"samples_seen": 60, "digest": dataset.digest}):  # the other is one of an earlier release
        second = source(dataset, settings)
        second.load_state_dict(saved)
        assert ordinals(second, 15) == seen[60:]
    other = source(replace(dataset, digest="0" * 64), settings)
    with pytest.raises(DatasetError, match="the state is of a stream with digest"):
        other.load_state_dict(state)
    with pytest.raises(DatasetError, match="seed, lanes or window have changed"):
        source(dataset, replace(settings, seed=settings.seed + 1)).load_state_dict(state)


def test_a_quarantine_changes_the_stream_and_its_digest(dataset, settings):
    shard = dataset.shards("train")[0].name
    quarantine = Quarantine(dataset.digest, (Problem(shard, 0, "train-00000000", "decode", "damaged"),))
    reader, order = open_stream(dataset, "train", Storage(), settings, quarantine)
    assert order.total == dataset.samples("train") - 1
    keys = [s["__key__"] for s in reader.samples(order.batch(0, order.total))]
    assert "train-00000000" not in keys
    assert len(set(keys)) == order.total


def test_data_that_is_written_anew_loses_the_quarantine_of_the_old(tmp_path):
    uri, storage = f"file://{tmp_path}/digits", Storage()
    old = ingest("digits", uri, storage, image_size=8, channels=1, shard_samples=900).dataset
    problem = Problem(old.shards("train")[0].name, 0, "train-00000000", "decode", "damaged")
    storage.write(f"{uri}/quarantine.json", Quarantine(old.digest, (problem,)).to_json().encode())
    ingest("digits", uri, storage, image_size=8, channels=1, shard_samples=900)
    assert read_quarantine(uri, storage) is not None
    ingest("digits", uri, storage, image_size=8, channels=1, shard_samples=700)
    assert read_quarantine(uri, storage) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"world_size": 31, "rank": 30}, "a rank beyond the batch"),
    ],
)
def test_what_cannot_be_a_stream_is_refused(dataset, settings, options, message):
    with pytest.raises(ValueError, match=message):
        source(dataset, settings, **options)


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(read_ahead(lambda n: n * n, range(20), threads=3, prefetch=5)) == [n * n for n in range(20)]

    def load(n):
        if n == 3:
            raise OSError("gone")
        return n

    got = read_ahead(load, itertools.count(), threads=2, prefetch=4)
    assert [next(got) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(got)
