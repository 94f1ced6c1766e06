import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import DatasetError, ShardIndex, index_tar, read_dataset
from pipelines.shards.ingest.write import ingest, source_digest
from pipelines.shards.order import SampleOrder
from pipelines.shards.read import ShardReader, read_split
from pipelines.shards.source import ShardCorruptError
from pipelines.shards.stream import TrainingStream
from pipelines.storage import Storage, layout

STORAGE = Storage()


@pytest.fixture
def folder(tmp_path):
    """Three classes of distinguishable pictures of several sizes and kinds, one of them damaged, one class empty."""
    root = tmp_path / "photos"
    for c, name in enumerate(["cat", "dog", "owl"]):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.full((20 + i, 24, 3), 60 * c + i, dtype=np.uint8)
            suffix = ["png", "jpg", "webp"][i % 3]
            Image.fromarray(pixels).save(root / name / f"{i:02d}.{suffix}")
    (root / "empty").mkdir()
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG not really")
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def write(source, uri, **options):
    return ingest(str(source), uri, STORAGE, **{"image_size": 16, "channels": 3, "shard_samples": 8, **options})


def reader(dataset, split, tmp_path):
    return ShardReader(dataset, split, ShardFetcher(dataset.uri, STORAGE, ShardCache(tmp_path / "cache", 10**8)))


def test_a_folder_becomes_shards_and_bad_images_are_named(folder, tmp_path):
    done = write(folder, f"file://{tmp_path}/ds")
    assert [bad.origin for bad in done.bad] == ["cat/broken.png"]
    assert done.empty_classes == ("empty",)
    assert done.dataset.classes == ("cat", "dog", "empty", "owl")
    assert done.dataset.samples("train") + done.dataset.samples("test") == 60
    assert read_dataset(f"file://{tmp_path}/ds", STORAGE) == done.dataset
    report = json.loads((tmp_path / "ds" / "ingest-report.json").read_text())
    assert report["bad"][0]["origin"] == "cat/broken.png"


@pytest.mark.parametrize(("cores", "threads"), [(1, "1 thread"), (2, "1 thread"), (8, "4 threads")])
def test_two_cores_write_by_one_thread(folder, tmp_path, monkeypatch, cores, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    said = []
    write(folder, f"file://{tmp_path}/ds", notice=said.append)
    assert said[0].endswith(f" images by {threads} of this process")


def test_the_same_input_gives_the_same_digest_and_another_input_another(folder, tmp_path):
    first = write(folder, f"file://{tmp_path}/a").dataset
    assert write(folder, f"file://{tmp_path}/b").dataset.digest == first.digest
    before = source_digest(str(folder))
    (folder / "owl" / "00.png").unlink()
    assert source_digest(str(folder)) != before
    assert write(folder, f"file://{tmp_path}/c").dataset.digest != first.digest


def test_dataset_json_follows_the_documented_schema(folder, tmp_path):
    import jsonschema

    write(folder, f"file://{tmp_path}/ds")
    schema = json.loads((Path(__file__).parents[4] / "docs" / "dataset.schema.json").read_text())
    described = json.loads((tmp_path / "ds" / "dataset.json").read_text())
    jsonschema.validate(described, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**described, "schema_version": 2}, schema)


def test_writing_again_leaves_no_stale_shard(folder, tmp_path):
    write(folder, f"file://{tmp_path}/ds", shard_samples=4)
    dataset = write(folder, f"file://{tmp_path}/ds", shard_samples=30).dataset
    assert {p.name for p in (tmp_path / "ds").glob("*.tar")} == {s.name for ss in dataset.splits.values() for s in ss}


def test_given_splits_are_kept(folder, tmp_path):
    divided = tmp_path / "divided"
    divided.mkdir()
    folder.rename(divided / "train")
    (divided / "test" / "cat").mkdir(parents=True)
    Image.new("L", (8, 8)).save(divided / "test" / "cat" / "only.png")
    assert write(divided, f"file://{tmp_path}/ds").dataset.samples("test") == 1


def test_sidecars_give_the_bytes_that_webdataset_reads(folder, tmp_path):
    dataset = write(folder, f"file://{tmp_path}/ds").dataset
    for shard in dataset.shards("train"):
        path = tmp_path / "ds" / shard.name
        index = ShardIndex.from_json((tmp_path / "ds" / layout.index_name(shard.name)).read_text())
        assert index == index_tar(path)
        data = path.read_bytes()
        for i, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
            assert sample["__key__"] == index.keys[i]
            for extension, member in index.members(i).items():
                assert data[member.offset : member.offset + member.size] == sample[extension]


def test_pixels_and_labels_come_back(folder, tmp_path):
    dataset = write(folder, f"file://{tmp_path}/ds").dataset
    batch = read_split(reader(dataset, "train", tmp_path))
    assert batch.images.shape == (dataset.samples("train"), 3, 16, 16)
    grey = ((batch.images.mean((1, 2, 3)) + 1) * 127.5).round()
    label = torch.tensor([0, 1, 3])[(grey / 60).long().clamp(max=2)]
    assert batch.labels is not None
    assert (label == batch.labels).float().mean() > 0.95  # JPEG and WebP may round a grey level over
    torch.testing.assert_close(batch.images.mean((0, 2, 3)), torch.tensor(dataset.mean), rtol=0, atol=1e-4)


def test_streams_of_any_number_of_ranks_carry_the_same_samples(folder, tmp_path):
    dataset = write(folder, f"file://{tmp_path}/ds").dataset
    order = SampleOrder([s.samples for s in dataset.shards("train")], lanes=4, window=2, seed=0, digest=dataset.digest)

    def run(world, start, stop):
        options = {"batch_size": 8, "world_size": world, "start": start, "stop": stop}
        streams = [TrainingStream(reader(dataset, "train", tmp_path), order, rank=r, **options) for r in range(world)]
        found = {}
        for batches in zip(*streams, strict=True):
            for batch in batches:
                found |= {int(n): image for n, image in zip(batch.ordinals, batch.images, strict=True)}
        return found

    one = run(1, 0, 120)
    assert sorted(one) == list(range(120))
    resumed = run(2, 0, 40) | run(3, 40, 120)
    assert sorted(resumed) == list(range(120))
    assert all(torch.equal(one[n], resumed[n]) for n in one)


def test_damaged_shards_and_images_stop_the_reader_by_name(folder, tmp_path):
    dataset = write(folder, f"file://{tmp_path}/ds").dataset
    name = dataset.shards("train")[0].name
    path = tmp_path / "ds" / name
    good = path.read_bytes()
    path.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    with pytest.raises(ShardCorruptError, match=f"{name} has SHA-256"):
        read_split(reader(dataset, "train", tmp_path))
    path.write_bytes(good)
    assert len(read_split(reader(dataset, "train", tmp_path)).images) == dataset.samples("train")


def test_the_cache_stays_within_its_bound_and_serves_without_the_store(folder, tmp_path):
    dataset = write(folder, f"file://{tmp_path}/ds").dataset
    shards = dataset.shards("train")
    cache = ShardCache(tmp_path / "small", 2 * max(s.bytes for s in shards))
    fetcher = ShardFetcher(dataset.uri, STORAGE, cache)
    for shard in shards:
        fetcher.require([shard])
    left = list((tmp_path / "small").glob("*.tar"))
    assert sum(p.stat().st_size for p in left) <= cache.limit_bytes
    assert cache.path(shards[-1]) in left
    (tmp_path / "ds" / shards[-1].name).unlink()
    fetcher.require([shards[-1]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: {**d, "schema_version": 9}, "version 9, this release reads 1"),
        (lambda d: {**d, "image_size": 99}, "does not match its own digest"),
    ],
)
def test_unknown_versions_and_edited_descriptions_are_refused(folder, tmp_path, change, message):
    write(folder, f"file://{tmp_path}/ds")
    path = tmp_path / "ds" / "dataset.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DatasetError, match=message):
        read_dataset(f"file://{tmp_path}/ds", STORAGE)


def test_sources_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "flat").mkdir()
    with pytest.raises(DatasetError, match="has no images"):
        write(tmp_path / "flat", f"file://{tmp_path}/ds")
    (tmp_path / "flat" / "cat").mkdir()
    with pytest.raises(DatasetError, match="no readable image"):
        write(tmp_path / "flat", f"file://{tmp_path}/ds")
    with pytest.raises(DatasetError, match="is not a folder"):
        write(tmp_path / "none", f"file://{tmp_path}/ds")
    with pytest.raises(DatasetError, match="digits are 8x8 grey"):
        write("digits", f"file://{tmp_path}/ds")
    with pytest.raises(DatasetError, match="no dataset at"):
        read_dataset(f"file://{tmp_path}/nothing", STORAGE)
