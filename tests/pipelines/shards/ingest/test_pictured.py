"""Pictures inside Parquet files: all of them with labels, captions and splits, read a row group at a time."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest import pictured, readers
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.readers import ParquetImage, UnreadableError, picture_column
from pipelines.shards.ingest.sources import source_digest
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import Bucket, opened, picture

STORAGE = Storage()
NAMES = ("owl", "ant", "cat")
FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}


def table(numbers, **columns) -> pa.Table:
    """Pictures with these numbers as the library `datasets` writes them; the number decides picture and label."""
    images = [{"bytes": picture(n, (10 + n % 3, 10)), "path": f"{n}.png"} for n in numbers]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = {"image": pa.array(images, struct), "label": pa.array([n % 3 for n in numbers], pa.int64()), **columns}
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.table(found).replace_schema_metadata(metadata)


def write(path, rows: pa.Table, group: int = 10):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group)
    return path


def made(source, uri, storage=STORAGE, **options):
    options = {"image_size": 8, "channels": 3, "shard_samples": 16, "test_fraction": 0.25, **options}
    return ingest(str(source), uri, storage, **options)


def samples(folder) -> dict[str, list[dict]]:
    """What is recorded of the samples of each split."""
    found: dict[str, list[dict]] = {"train": [], "test": []}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            texts = {m.name.rpartition("/")[2]: tar.extractfile(m).read() for m in tar if not m.name.endswith(".png")}
        for name, text in texts.items():
            if name.endswith(".json"):
                caption = texts.get(name.replace(".json", ".txt"), b"").decode()
                found[path.name.partition("-")[0]].append({**json.loads(text), "caption": caption})
    return found


@pytest.fixture
def hub(tmp_path):
    """A repository of the Hub: two files of one split, one of the other, and a third split."""
    write(tmp_path / "hub/data/train-00000-of-00002.parquet", table(range(60)))
    write(tmp_path / "hub/data/train-00001-of-00002.parquet", table(range(60, 100)))
    write(tmp_path / "hub/data/test-00000-of-00001.parquet", table(range(100, 130)))
    write(tmp_path / "hub/data/unsupervised-00000-of-00001.parquet", table(range(130, 140)))
    (tmp_path / "hub/README.md").write_text("a card")
    return tmp_path / "hub"


def test_a_repository_of_the_hub_keeps_its_splits_and_the_names_of_its_classes(hub, tmp_path):
    done = made(hub, f"file://{tmp_path}/ds")
    assert done.dataset.classes == tuple(sorted(NAMES))
    assert {split: done.dataset.samples(split) for split in ("train", "test")} == {"train": 100, "test": 30}
    found = samples(tmp_path / "ds")
    for split, first, per_file in (("train", 0, 60), ("test", 100, 30)):
        numbers = []
        for sample in found[split]:
            name, group, row = sample["origin"].rsplit("/", 2)
            numbers.append(first + per_file * ("train-00001" in name) + 10 * int(group) + int(row))
            assert sample["class"] == NAMES[numbers[-1] % 3]
        assert sorted(numbers) == list(range(first, first + len(numbers)))
        assert numbers != sorted(numbers)
    assert done.report.unused["of another split than those that are used"].examples == (
        "data/unsupervised-00000-of-00001.parquet",
    )


def test_a_store_gives_the_same_dataset_and_each_row_group_is_read_a_few_times(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(pictured, "BLOCK_BYTES", 20_000)
    reads: Counter[tuple] = Counter()
    read = readers._pictures

    def counted(*key):
        reads[key[:3]] += 1
        return read(*key)

    here = made(hub, f"file://{tmp_path}/here")
    monkeypatch.setattr(readers, "_row_groups", readers._RowGroups(60_000))
    monkeypatch.setattr(readers, "_pictures", counted)
    there = made("s3://bucket/hub", f"file://{tmp_path}/there", Bucket(root=str(tmp_path)))
    assert there.dataset.digest == here.dataset.digest
    assert len(reads) == 13
    assert max(reads.values()) <= 3
    assert source_digest("s3://bucket/hub", Bucket(root=str(tmp_path))) != source_digest(str(hub))


def test_blocks_of_any_size_hold_each_picture_once(hub, tmp_path, monkeypatch):
    for size in (1, 10_000, 1 << 40):
        monkeypatch.setattr(pictured, "BLOCK_BYTES", size)
        origins = [image.origin for image in opened(str(hub), STORAGE).images]
        assert len(set(origins)) == len(origins) == 130
        changes = sum(a.rpartition("/")[0] != b.rpartition("/")[0] for a, b in pairwise(origins))
        assert changes == 12 if size == 1 else changes > 40


def test_one_file_has_its_test_split_drawn_and_captions_and_scores(tmp_path):
    rows = table(range(80), text=pa.array([f"picture {n}" for n in range(80)]), score=pa.array([*range(80)]))
    path = write(tmp_path / "one.parquet", rows.drop_columns("label"))
    done = made(path, f"file://{tmp_path}/ds", filters=Filters(min_score=("score", 20.0)))
    found = samples(tmp_path / "ds")
    numbers = sorted(int(s["caption"].removeprefix("picture ")) for split in found.values() for s in split)
    assert numbers == list(range(20, 80))
    assert found["test"]
    assert done.dataset.classes == ()
    assert done.report.filtered == {"score is below 20": 20}
    changed = source_digest(str(path))
    write(path, rows)
    assert source_digest(str(path)) != changed


def test_many_threads_read_a_row_group_once(hub, monkeypatch):
    reads = []
    read = readers._pictures
    monkeypatch.setattr(readers, "_row_groups", readers._RowGroups(1 << 20))

    def counted(*key):
        reads.append(key)
        return read(*key)

    monkeypatch.setattr(readers, "_pictures", counted)
    path = hub / "data/test-00000-of-00001.parquet"
    with ThreadPoolExecutor(8) as pool:
        images = [ParquetImage(f"file://{path}", path.stat().st_size, 1, row) for row in range(10)]
        found = list(pool.map(lambda image: image(STORAGE), images * 4))
    assert found == [picture(n, (10 + n % 3, 10)) for n in range(110, 120)] * 4
    assert len(reads) == 1


def test_the_column_of_pictures_is_found_by_its_type():
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert picture_column(pa.schema([("mask", struct), ("image", struct)])) == "image.bytes"
    assert picture_column(pa.schema([("label", pa.int64()), ("img", struct)])) == "img.bytes"
    assert picture_column(pa.schema([("image", pa.large_binary())])) == "image"
    assert picture_column(pa.schema([("path", pa.string()), ("hash", pa.binary())])) is None


def test_what_is_no_picture_is_named(tmp_path):
    rows = table(range(40)).to_pylist()
    rows[3]["image"]["bytes"] = None
    rows[4]["image"]["bytes"] = b"GIF8 no"
    rows[5]["label"] = -1
    path = write(tmp_path / "one.parquet", pa.Table.from_pylist(rows, table([0]).schema))
    done = made(path, f"file://{tmp_path}/ds")
    assert {bad.origin.rpartition("parquet/")[2]: bad.reason.partition(":")[0][:28] for bad in done.bad} == {
        "0/3": "has no bytes",
        "0/4": "is not an image of a known k",
        "0/5": "one.parquet/0/5 has the labe",
    }


def test_files_that_cannot_be_read_are_refused_before_anything_is_written(hub, tmp_path):
    write(hub / "data/train-00002.parquet", pa.table({"a": [1], "url": ["x"]}))
    with pytest.raises(DatasetError, match=r"train-00002\.parquet has the columns a, url; it needs one with the bytes"):
        made(hub, f"file://{tmp_path}/ds")
    with pytest.raises(DatasetError, match=r"train-00002\.parquet has the columns a, url; it needs `path`"):
        made(hub / "data/train-00002.parquet", f"file://{tmp_path}/ds")
    (hub / "data/train-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DatasetError, match=r"train-00002\.parquet is not a readable Parquet file .*: write it again"):
        made(hub, f"file://{tmp_path}/ds")
    (hub / "data/train-00002.parquet").unlink()
    with pytest.raises(DatasetError, match=r"has no column beauty, by which data\.min_score leaves out images"):
        made(hub, f"file://{tmp_path}/ds", filters=Filters(min_score=("beauty", 1.0)))
    assert not list((tmp_path / "ds").glob("*.tar"))


def test_a_file_that_was_cut_after_it_was_listed_is_named(hub):
    path = hub / "data/test-00000-of-00001.parquet"
    image = ParquetImage(f"file://{path}", path.stat().st_size + 1, 1, 3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableError, match="the Parquet file is damaged or gone"):
        image(STORAGE)
