"""What a dataset must not give again stays out, whoever writes its quarantine next."""

import numpy as np
import pytest

from pipelines.shards.audit.check import check, write_quarantine
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.erased import ImageFile
from pipelines.shards.forgotten import (
    FORGOTTEN,
    Forgetting,
    forgettings,
    forgotten_samples,
    quarantine_forgotten,
    record_forgetting,
)
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.write import ingest
from pipelines.shards.quarantine import Problem, make_quarantine, read_quarantine, store_quarantine
from pipelines.shards.read import read_split
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import picture as photograph
from tests.pipelines.shards.ingest.sources import write_files
from tests.pipelines.shards.tars import picture, reader, write_shard

STORAGE = Storage()


def entries(numbers):
    return [entry for n in numbers for entry in ((f"{n:03d}.png", picture(n)), (f"{n:03d}.cls", str(n).encode()))]


@pytest.fixture
def dataset(tmp_path):
    """Two shards of five flat pictures; pixel value = label = number of the sample."""
    for shard in range(2):
        write_shard(tmp_path / f"train-{shard}.tar", entries(range(shard * 5, shard * 5 + 5)))
    return index_tars(f"file://{tmp_path}", STORAGE).dataset


def asked(*numbers, at="2026-01-01T00:00:00+00:00"):
    return Forgetting(tuple(ImageFile.of(picture(n)) for n in numbers), at, "asked for")


def labels(dataset, folder):
    return sorted(read_split(reader(dataset, folder, read_quarantine(dataset.uri, STORAGE))).labels.tolist())


def test_nothing_is_read_or_written_where_nothing_was_forgotten(dataset):
    assert quarantine_forgotten(dataset, STORAGE) is None
    assert read_quarantine(dataset.uri, STORAGE) is None


def test_a_forgotten_image_is_in_quarantine_beside_what_else_is(dataset, tmp_path):
    damaged = Problem("train-0.tar", 1, "001", "decode", "for a test")
    store_quarantine(make_quarantine(dataset, [damaged]), dataset.uri, STORAGE)
    record_forgetting(asked(7), dataset.uri, STORAGE)
    quarantine = quarantine_forgotten(dataset, STORAGE)
    assert [(p.shard, p.index, p.sample, p.kind) for p in quarantine.excluded] == [
        ("train-0.tar", 1, "001", "decode"),
        ("train-1.tar", 2, "007", FORGOTTEN),
    ]
    assert labels(dataset, tmp_path) == [0, 2, 3, 4, 5, 6, 8, 9]
    assert quarantine_forgotten(dataset, STORAGE).digest == quarantine.digest


def test_it_stays_out_when_the_dataset_is_checked_again(dataset, tmp_path):
    record_forgetting(asked(7), dataset.uri, STORAGE)
    quarantine_forgotten(dataset, STORAGE)
    write_quarantine(check(dataset.uri, STORAGE), STORAGE)
    assert labels(dataset, tmp_path) == [n for n in range(10) if n != 7]


def test_it_stays_out_when_tars_are_indexed_again_in_which_it_lies_elsewhere(dataset, tmp_path):
    record_forgetting(asked(7), dataset.uri, STORAGE)
    quarantine_forgotten(dataset, STORAGE)
    write_shard(tmp_path / "train-0.tar", entries([7, 0, 1]))
    write_shard(tmp_path / "train-1.tar", entries([8, 7, 9]))
    again = index_tars(dataset.uri, STORAGE, replace=True).dataset
    assert labels(again, tmp_path) == [0, 1, 8, 9]


def test_it_stays_out_when_its_source_is_ingested_again(tmp_path):
    source = write_files(tmp_path / "photos", {f"{i:02d}.png": photograph(i) for i in range(30)})
    settings = {"image_size": 8, "channels": 3, "shard_samples": 10}
    uri = f"file://{tmp_path}/ds"
    first = ingest(str(source), uri, STORAGE, **settings).dataset
    kept = reader(first, tmp_path)
    member = kept.samples(kept.located(np.array([4])))[0]["png"]
    record_forgetting(Forgetting((ImageFile.of(member),), "2026-01-01", ""), uri, STORAGE)
    write_files(tmp_path / "photos", {"more.png": photograph(99)})
    again = ingest(str(source), uri, STORAGE, **settings).dataset
    assert again.digest != first.digest
    (problem,) = read_quarantine(uri, STORAGE).excluded
    assert problem.kind == FORGOTTEN
    left = reader(again, tmp_path, read_quarantine(uri, STORAGE))
    found = left.samples(left.located(np.arange(left.total)))
    assert len(found) == again.samples("train") - 1
    assert member not in [sample["png"] for sample in found]


def test_equal_requests_are_one_and_keep_the_first_time(dataset):
    for at in ("2026-01-01", "2026-02-02"):
        record_forgetting(asked(7, at=at), dataset.uri, STORAGE)
    record_forgetting(asked(3, 7, at="2026-03-03"), dataset.uri, STORAGE)
    assert [each.at for each in forgettings(dataset.uri, STORAGE)] == ["2026-01-01", "2026-03-03"]
    assert [p.sample for p in forgotten_samples(dataset, STORAGE)] == ["003", "007"]


def test_a_damaged_record_is_an_error_because_nobody_knows_what_must_stay_out(dataset, tmp_path):
    record_forgetting(asked(7), dataset.uri, STORAGE)
    (record,) = (tmp_path / "forgotten").glob("*.json")
    record.write_text("{")
    with pytest.raises(DatasetError, match="says what must stay out"):
        quarantine_forgotten(dataset, STORAGE)
