"""WebDataset tars as a source, as img2dataset writes them: pictures, captions and scores, and what is damaged."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.readers import TarMember, UnreadableError
from pipelines.shards.ingest.sources import source_digest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import Bucket, opened, picture, pictures, write_files
from tests.pipelines.shards.ingest.test_pictured import made, samples

STORAGE = Storage()


def write_tar(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for entry in entries:
            writer.write(entry)
    return path


def downloaded(number: int) -> dict:
    """A sample as img2dataset stores it."""
    key, caption = f"{number:09d}", f"picture {number}"
    record = {"key": key, "caption": caption, "url": f"https://host/{number}", "status": "success", "width": 12}
    return {
        "__key__": key,
        "jpg": picture(number, (12, 10), "jpeg"),
        "txt": caption.encode(),
        "json": json.dumps({**record, "aesthetic": number / 10}).encode(),
    }


@pytest.fixture
def crawl(tmp_path):
    """The output of img2dataset: tars, each with a Parquet file of what happened and a file of statistics."""
    for shard in range(3):
        numbers = range(20 * shard, 20 * shard + 20)
        write_tar(tmp_path / f"crawl/{shard:05d}.tar", map(downloaded, numbers))
        rows = {"url": [f"https://host/{n}" for n in numbers], "status": ["success"] * 20}
        pq.write_table(pa.table(rows), tmp_path / f"crawl/{shard:05d}.parquet")
        (tmp_path / f"crawl/{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "crawl"


def test_the_output_of_img2dataset_is_a_source_with_captions(crawl, tmp_path):
    done = made(crawl, f"file://{tmp_path}/ds")
    found = samples(tmp_path / "ds")
    every = [sample for split in found.values() for sample in split]
    assert sorted(int(sample["origin"][-13:-4]) for sample in every) == list(range(60))
    assert all(sample["caption"] == f"picture {int(sample['origin'][-13:-4])}" for sample in every)
    assert done.dataset.classes == ()
    assert found["test"]
    assert not done.bad
    there = made("s3://bucket/crawl", f"file://{tmp_path}/there", Bucket(root=str(tmp_path)))
    assert there.dataset.digest == done.dataset.digest


def test_one_tar_is_a_source_and_scores_are_read_from_its_json(crawl, tmp_path):
    done = made(crawl / "00001.tar", f"file://{tmp_path}/ds", filters=Filters(min_score=("aesthetic", 3.0)))
    numbers = [int(s["origin"][-13:-4]) for split in samples(tmp_path / "ds").values() for s in split]
    assert sorted(numbers) == list(range(30, 40))
    assert done.report.filtered == {"aesthetic is below 3": 10}
    before = source_digest(str(crawl / "00001.tar"))
    write_tar(crawl / "00001.tar", map(downloaded, range(5)))
    assert source_digest(str(crawl / "00001.tar")) != before
    with pytest.raises(DatasetError, match=r"no sample has a number beauty in its json, by which data\.min_score"):
        made(crawl, f"file://{tmp_path}/ds", filters=Filters(min_score=("beauty", 3.0)))


def test_a_dataset_of_this_project_can_be_ingested_again_in_another_size(tmp_path):
    source = write_files(tmp_path / "photos", pictures())
    first = made(source, f"file://{tmp_path}/first", image_size=16)
    again = made(tmp_path / "first", f"file://{tmp_path}/again", image_size=8)
    assert {s: again.dataset.samples(s) for s in ("train", "test")} == {
        s: first.dataset.samples(s) for s in ("train", "test")
    }
    assert again.dataset.classes == ("0", "1", "2")
    assert again.dataset.image_size == 8


def test_damage_and_what_is_no_picture_are_named_and_the_others_are_taken(crawl, tmp_path):
    data = (crawl / "00000.tar").read_bytes()
    (crawl / "00000.tar").write_bytes(data[: len(data) // 2])
    entries = [downloaded(100), {"__key__": "words", "txt": b"no picture"}, {**downloaded(101), "json": b"[1]"}]
    write_tar(crawl / "00003.tar", [*entries, {**downloaded(102), "txt": b"\xff"}, downloaded(103)])
    source = opened(str(crawl), STORAGE)
    reasons = {bad.origin: bad.reason for bad in source.bad}
    assert reasons.pop("00000.tar").startswith("ends ")
    assert reasons == {
        "00003.tar/words": "has no picture (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .heic, .heif, .avif)",
        "00003.tar/000000101.jpg": "000000101.json is not a JSON object",
        "00003.tar/000000102.jpg": "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    }
    origins = {image.origin for image in source.images}
    assert {"00003.tar/000000100.jpg", "00003.tar/000000103.jpg", "00000.tar/000000003.jpg"} < origins
    assert 40 < len(origins) < 60


def test_a_tar_that_changed_after_it_was_listed_is_named(crawl):
    image = next(iter(opened(str(crawl / "00000.tar"), STORAGE).images))
    assert isinstance(image.read, TarMember)
    assert image.read(STORAGE)[:2] == b"\xff\xd8"
    data = bytearray((crawl / "00000.tar").read_bytes())
    data[image.read.offset + 20] ^= 1
    (crawl / "00000.tar").write_bytes(data)
    with pytest.raises(UnreadableError, match="its tar has changed since it was listed"):
        image.read(STORAGE)
    (crawl / "00000.tar").unlink()
    with pytest.raises(UnreadableError, match="its tar is gone"):
        image.read(STORAGE)


def test_a_tar_without_an_end_is_no_source(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing of a tar")
    with pytest.raises(DatasetError, match=r"a\.tar holds no sample: .*write or copy it again"):
        made(tmp_path / "a.tar", f"file://{tmp_path}/ds")
