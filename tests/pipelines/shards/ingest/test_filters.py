"""Filters of an ingest: each leaves out the images that it names and no other, and the report counts them."""

from __future__ import annotations

import json
import tarfile

import pytest

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.collect import Filters
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import jsonl, picture, write_files
from tests.pipelines.shards.ingest.test_alike import encoded, photograph

STORAGE = Storage()
SIZES = {f"{width}x{height}.png": (width, height) for width in (8, 16, 40) for height in (8, 16, 40)}


def write(source, uri, filters=None, **options):
    options = {"image_size": 8, "channels": 3, "shard_samples": 4, "test_fraction": 0.4, **options}
    return ingest(str(source), f"file://{uri}", STORAGE, filters=filters or Filters(), **options)


def origins(uri) -> set[str]:
    """Paths in the source of all samples of a dataset."""
    found = set()
    for path in uri.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {json.load(tar.extractfile(m))["origin"] for m in tar if m.name.endswith(".json")}
    return found


@pytest.fixture
def sized(tmp_path):
    files = {name: picture(seed, size) for seed, (name, size) in enumerate(SIZES.items())}
    return write_files(tmp_path / "sized", files | {f"square-{i}.png": picture(50 + i, (16, 16)) for i in range(12)})


@pytest.fixture
def scored(tmp_path):
    files = {f"{i:02d}.png": picture(i) for i in range(24)}
    rows = [{"file_name": name, "text": "w" * i if i % 5 else None, "aesthetic": i / 4} for i, name in enumerate(files)]
    return write_files(tmp_path / "scored", {**files, "metadata.jsonl": jsonl(rows)})


@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        (Filters(min_side=16), lambda w, h: min(w, h) >= 16, "the shorter side has fewer than 16 pixels"),
        (
            Filters(max_aspect=2.5),
            lambda w, h: max(w, h) <= 2.5 * min(w, h),
            "the longer side is more than 2.5 times the shorter one",
        ),
    ],
)
def test_images_are_left_out_by_size_and_shape(sized, tmp_path, filters, kept, reason):
    whole = write(sized, tmp_path / "whole")
    done = write(sized, tmp_path / "ds", filters)
    out = {name for name, size in SIZES.items() if not kept(*size)}
    assert origins(tmp_path / "ds") == origins(tmp_path / "whole") - out
    assert done.report.filtered == {reason: len(out)}
    assert f"{len(out)} images left out: {reason}" in done.report.lines()
    assert json.loads((tmp_path / "ds/ingest-report.json").read_text())["filtered"] == {reason: len(out)}
    assert whole.report.filtered == {}
    again = write(sized, tmp_path / "ds", filters)
    assert (again.dataset, again.report.filtered) == (done.dataset, done.report.filtered)
    assert again.reused_shards > 0
    assert write(sized, tmp_path / "ds").dataset.digest == whole.dataset.digest


@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        (Filters(min_caption=7), lambda i: i % 5 and i >= 7, "the caption has fewer than 7 characters"),
        (Filters(min_score=("aesthetic", 2.5)), lambda i: i / 4 >= 2.5, "aesthetic is below 2.5"),
    ],
)
def test_images_are_left_out_by_what_their_table_says(scored, tmp_path, filters, kept, reason):
    done = write(scored, tmp_path / "ds", filters)
    names = {f"{i:02d}.png" for i in range(24) if kept(i)}
    assert origins(tmp_path / "ds") == names
    assert done.report.filtered == {reason: 24 - len(names)}
    assert not done.bad
    assert not any("not named by a good row" in line for line in done.report.lines())


def test_near_duplicates_are_removed_wherever_they_are(tmp_path):
    originals = [photograph(seed) for seed in range(12)]
    files = {}
    for seed, image in enumerate(originals):
        split = "train" if seed % 2 else "test"
        files |= {f"{split}/a/{seed}.png": encoded(image, "png"), f"train/a/{seed}-copy.jpg": encoded(image, "jpeg")}
    source = write_files(tmp_path / "photos", files)
    kept = write(source, tmp_path / "kept")
    done = write(source, tmp_path / "ds", Filters(near_duplicates="remove"))
    assert sum(kept.dataset.samples(split) for split in ("train", "test")) == 24
    left = origins(tmp_path / "ds")
    assert sorted(int(name.rpartition("/")[2].partition(".")[0].partition("-")[0]) for name in left) == [*range(12)]
    assert done.report.filtered == {"nearly the same as an earlier one": 12}
    assert done.report.alike.count == 12


def test_an_image_that_is_too_small_does_not_take_its_larger_copy_with_it(tmp_path):
    files = {}
    for seed in range(12):
        image = photograph(seed)
        files |= {f"{seed}-small.png": encoded(image.resize((32, 32)), "png"), f"{seed}.png": encoded(image, "png")}
    source = write_files(tmp_path / "photos", files)
    write(source, tmp_path / "ds", Filters(min_side=64, near_duplicates="remove"))
    assert origins(tmp_path / "ds") == {f"{seed}.png" for seed in range(12)}


def test_filters_that_leave_out_everything_say_so(sized, tmp_path):
    with pytest.raises(DatasetError, match=r"no readable image for the train split\n  .* left out: the shorter side"):
        write(sized, tmp_path / "ds", Filters(min_side=4000))


@pytest.mark.parametrize(
    ("filters", "match"),
    [
        (Filters(min_caption=3), "has no table, and data.min_caption leaves out images by what one says"),
        (Filters(min_score=("aesthetic", 1.0)), "has no table, and data.min_score leaves out"),
    ],
)
def test_filters_by_a_table_need_one(sized, tmp_path, filters, match):
    with pytest.raises(DatasetError, match=match):
        write(sized, tmp_path / "ds", filters)


def test_a_column_of_scores_has_to_be_there_and_hold_numbers(scored, tmp_path):
    with pytest.raises(DatasetError, match=r"metadata\.jsonl has no column beauty, by which data\.min_score"):
        write(scored, tmp_path / "ds", Filters(min_score=("beauty", 1.0)))
    rows = [json.loads(line) for line in (scored / "metadata.jsonl").read_text().splitlines()]
    rows[3]["aesthetic"] = "high"
    del rows[4]["aesthetic"]
    rows[5]["aesthetic"] = float("nan")
    (scored / "metadata.jsonl").write_text(jsonl(rows))
    done = write(scored, tmp_path / "ds", Filters(min_score=("aesthetic", 0.0)))
    assert [bad.reason for bad in done.bad] == [
        "03.png has the aesthetic 'high': images are filtered by numbers",
        "04.png has the aesthetic None: images are filtered by numbers",
    ]
    assert done.report.filtered == {"aesthetic is below 0": 1}
