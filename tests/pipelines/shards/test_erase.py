"""Samples are erased: their bytes are nowhere, all others are where they were, and it is known what was there."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipelines.config import RegistryConfig
from pipelines.shards.audit.check import check
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.erase import erase, finish_erasure
from pipelines.shards.erased import ImageFile, datasets_before, erasures
from pipelines.shards.forgotten import Forgetting, forgotten_samples, quarantine_forgotten, record_forgetting
from pipelines.shards.index import DatasetError, ShardIndex, read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.shards.members import SampleFormat, decode_pixels, examine
from pipelines.shards.quarantine import Problem, make_quarantine, read_quarantine, store_quarantine
from pipelines.shards.read import read_split
from pipelines.signing import Authority, Signer, Trust
from pipelines.storage import Storage, layout
from tests.pipelines.shards.ingest.sources import picture as photograph
from tests.pipelines.shards.ingest.sources import write_files
from tests.pipelines.shards.tars import reader, write_shard

STORAGE = Storage()
REGISTRY = RegistryConfig(model="digits")
AT = "2026-01-01T00:00:00+00:00"
SIZE = 16


def encoded(number: int, kind: str = "PNG") -> bytes:
    """Return a picture of noise that differs for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    file = io.BytesIO()
    if kind == "NPY":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def entries(numbers):
    for n in numbers:
        yield f"{n:03d}.png", encoded(n)
        yield f"{n:03d}.cls", str(n % 3).encode()
        yield f"{n:03d}.txt", f"the caption of number {n:03d}".encode()
        yield f"{n:03d}.json", json.dumps({"url": f"https://example.org/picture-{n:03d}"}).encode()


@pytest.fixture
def authority(home) -> Authority:
    return Authority.of(REGISTRY)


@pytest.fixture
def dataset(tmp_path):
    """Two shards of five pictures of noise, of which one sample was in quarantine before."""
    (tmp_path / "data").mkdir()
    for shard in range(2):
        write_shard(tmp_path / f"data/train-{shard}.tar", entries(range(shard * 5, shard * 5 + 5)))
    made = index_tars(f"file://{tmp_path}/data", STORAGE).dataset
    flawed = [Problem("train-1.tar", 0, "005", "decode", "for a test")]
    store_quarantine(make_quarantine(made, flawed), made.uri, STORAGE)
    return made


def taken_out(dataset, *numbers):
    """Put samples into quarantine as `ddpm forget` does; return what `erase` is given of them."""
    images = tuple(ImageFile.of(encoded(n)) for n in numbers)
    record_forgetting(Forgetting(images, AT, ""), dataset.uri, STORAGE)
    quarantine_forgotten(read_dataset(dataset.uri, STORAGE), STORAGE)
    return [(f"train-{n // 5}.tar", n % 5, f"{n:03d}") for n in numbers]


def erased(dataset, authority, *numbers, storage=STORAGE):
    return erase(dataset.uri, taken_out(dataset, *numbers), storage, authority, at=AT, notice=str)


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(dataset, folder):
    return read_split(reader(dataset, folder, read_quarantine(dataset.uri, STORAGE)))


def test_the_bytes_are_in_no_object_and_every_other_sample_is_as_it_was(dataset, authority, tmp_path):
    taken_out(dataset, 3, 7)
    before = read(dataset, tmp_path / "before")
    for folder in (layout.FEATURES, layout.FINGERPRINTS):  # which have small copies of pictures
        STORAGE.write(f"{dataset.uri}/{folder}/copies", encoded(3))
    erased(dataset, authority, 3, 7)
    for name, content in files(tmp_path / "data").items():
        for gone in (encoded(3)[-64:], encoded(7)[-64:], b"number 003", b"number 007", b"picture-003", b"picture-007"):
            assert gone not in content, name
        assert name.endswith("0.tar") <= (encoded(4) in content and b"the caption of number 004" in content)
    now = read_dataset(dataset.uri, STORAGE)
    assert now.digest != dataset.digest
    after = read(now, tmp_path / "after")
    assert np.array_equal(before.images, after.images)
    assert np.array_equal(before.labels, after.labels)
    assert len(after.labels) == 7  # of ten, without 5, which was out before
    assert check(dataset.uri, STORAGE).problems == ()


def test_the_record_says_what_was_there_and_leads_back_to_the_dataset_before(dataset, authority):
    (sample,) = erased(dataset, authority, 3)
    assert (sample.shard, sample.index, sample.key, sample.image) == ("train-0.tar", 3, "003", ImageFile.of(encoded(3)))
    erased(dataset, authority, 7)
    now = read_dataset(dataset.uri, STORAGE)
    chain = list(datasets_before(now, STORAGE))
    assert [each.digest for each in chain][::2] == [now.digest, dataset.digest]
    assert chain[-1] == dataset
    assert len(list(datasets_before(now, STORAGE, authority.trust))) == 3


def test_what_nobody_who_is_trusted_has_signed_leads_nowhere_for_those_who_ask(dataset, authority):
    erased(dataset, authority, 3)
    now = read_dataset(dataset.uri, STORAGE)
    assert [each.digest for each in datasets_before(now, STORAGE, Trust())] == [now.digest]


def test_another_call_for_the_same_changes_nothing(dataset, authority, tmp_path):
    erased(dataset, authority, 3, 7)
    before = files(tmp_path / "data")
    assert erased(dataset, authority, 3, 7) == []
    assert files(tmp_path / "data") == before


class Stopping(Storage):
    """A store that fails from some write on, as if the process had been killed."""

    left = 0

    def write_if(self, uri, data, tag, **options):
        self._count()
        return super().write_if(uri, data, tag, **options)

    def write(self, uri, data, **options):
        self._count()
        return super().write(uri, data, **options)

    def _count(self):
        if Stopping.left == 0:
            raise KeyboardInterrupt
        Stopping.left -= 1


def test_an_erasure_that_was_interrupted_anywhere_is_finished_by_the_next(dataset, authority, tmp_path):
    places = taken_out(dataset, 3, 7)
    start = files(tmp_path / "data")
    erase(dataset.uri, places, STORAGE, authority, at=AT, notice=str)
    whole = {name: text for name, text in files(tmp_path / "data").items() if "erasures" not in name}
    stopped = 0
    for writes in range(20):
        for name in files(tmp_path / "data").keys() - start.keys():
            (tmp_path / "data" / name).unlink()
        for name, content in start.items():
            (tmp_path / "data" / name).write_bytes(content)
        Stopping.left = writes
        try:
            erase(dataset.uri, places, Stopping(), authority, at=AT, notice=str)
        except KeyboardInterrupt:
            stopped += 1
        else:
            break
        erase(dataset.uri, places, STORAGE, authority, at=AT, notice=str)
        again = {name: text for name, text in files(tmp_path / "data").items() if "erasures" not in name}
        assert again == whole
    assert stopped == 8  # the record, two shards and their sidecars, both quarantines, dataset.json


def test_several_at_once_erase_all_that_was_asked_for(dataset, authority, tmp_path):
    wanted = [taken_out(dataset, n) for n in (1, 3, 7, 8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda places: erase(dataset.uri, places, STORAGE, authority, at=AT, notice=str), wanted))
    done = {each.key for erasure in erasures(dataset.uri, STORAGE) for each in erasure.samples}
    assert done == {"001", "003", "007", "008"}
    assert check(dataset.uri, STORAGE).problems == ()
    now = read_dataset(dataset.uri, STORAGE)
    assert list(datasets_before(now, STORAGE))[-1] == dataset
    assert {problem.sample for problem in read_quarantine(dataset.uri, STORAGE).excluded} == done | {"005"}


def test_it_stays_out_when_the_tars_are_indexed_again(dataset, authority):
    erased(dataset, authority, 3)
    index_tars(dataset.uri, STORAGE, replace=True)
    assert [each.sample for each in forgotten_samples(read_dataset(dataset.uri, STORAGE), STORAGE)] == ["003"]
    assert "003" in {problem.sample for problem in read_quarantine(dataset.uri, STORAGE).excluded}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "NPY"])
def test_a_black_picture_of_the_same_form_takes_the_place_of_one_of_every_kind(tmp_path, authority, kind):
    name = kind.lower()
    write_shard(tmp_path / "train-0.tar", [(f"{n}.{name}", encoded(n, kind)) for n in range(3)])
    dataset = index_tars(f"file://{tmp_path}", STORAGE).dataset
    (sample,) = erase(dataset.uri, [("train-0.tar", 1, "1")], STORAGE, authority, at=AT, notice=str)
    index = ShardIndex.from_json((tmp_path / "train-0.index.json").read_text())
    member = index.members(1)[name]
    data = (tmp_path / "train-0.tar").read_bytes()[member.offset : member.offset + member.size]
    assert ImageFile.of(data) == sample.blank
    assert not decode_pixels({name: data}, SIZE, 3).any()
    assert examine({name: data}, SampleFormat(SIZE, 3)).flaws == ()


def test_what_is_not_known_becomes_zeros_and_the_class_stays(tmp_path, authority):
    embedding = io.BytesIO()
    np.save(embedding, np.ones(64, np.float16))
    files = {"png": encoded(1), "cls": b"1", "url": b"https://example.org", "emb.npy": embedding.getvalue()}
    write_shard(tmp_path / "train-0.tar", [(f"0.{name}", data) for name, data in files.items()])
    dataset = index_tars(f"file://{tmp_path}", STORAGE).dataset
    erase(dataset.uri, [("train-0.tar", 0, "0")], STORAGE, authority, at=AT, notice=str)
    data = (tmp_path / "train-0.tar").read_bytes()
    index = ShardIndex.from_json((tmp_path / "train-0.index.json").read_text())
    now = {name: data[m.offset : m.offset + m.size] for name, m in index.members(0).items()}
    assert now["url"] == bytes(len(files["url"]))
    assert now["cls"] == b"1"
    assert not np.load(io.BytesIO(now["emb.npy"])).any()


def test_a_picture_that_is_smaller_than_any_blank_becomes_zeros(tmp_path, authority):
    write_shard(tmp_path / "train-0.tar", [("0.png", encoded(0)), ("1.png", b"none")])
    dataset = index_tars(f"file://{tmp_path}", STORAGE, quarantine=True).dataset
    erase(dataset.uri, [("train-0.tar", 1, "1")], STORAGE, authority, at=AT, notice=str)
    assert b"none" not in (tmp_path / "train-0.tar").read_bytes()


def test_a_shard_with_other_bytes_than_were_indexed_is_left_as_it_is(dataset, authority, tmp_path):
    places = taken_out(dataset, 3)
    path = tmp_path / "data/train-0.tar"
    path.write_bytes(path.read_bytes().replace(b"number 004", b"NUMBER 004"))
    before = files(tmp_path / "data")
    with pytest.raises(DatasetError, match="has other bytes than were indexed, so nothing is erased"):
        erase(dataset.uri, places, STORAGE, authority, at=AT, notice=str)
    assert files(tmp_path / "data") == before


def test_a_plan_of_somebody_else_is_not_followed(dataset, authority, tmp_path):
    places = taken_out(dataset, 3)
    erase(dataset.uri, places, STORAGE, authority, at=AT, notice=str)
    (record,) = (tmp_path / "data/erasures").glob("*.json")
    (tmp_path / "data/dataset.json").write_text(dataset.to_json())  # as if it had not been finished
    with pytest.raises(DatasetError, match=r"cannot be believed .* trust its signer"):
        finish_erasure(dataset.uri, STORAGE, Trust(), str)
    assert Signer.of(REGISTRY) == authority.signer
    assert finish_erasure(dataset.uri, STORAGE, authority.trust, str).digest != dataset.digest
    assert record.exists()


def test_it_stays_out_when_its_source_is_ingested_again(tmp_path, authority):
    source, target = tmp_path / "photos", f"file://{tmp_path}/data"
    settings = {"image_size": 8, "channels": 3, "shard_samples": 10}
    write_files(source, {f"{n:02d}.png": photograph(n) for n in range(30)})
    dataset = ingest(str(source), target, STORAGE, **settings).dataset
    shard = dataset.shards("train")[0]
    index = ShardIndex.from_json(STORAGE.read(layout.index_name(shard.address(target))))
    member = index.members(1)["png"]
    data = STORAGE.read(shard.address(target), member.offset, member.offset + member.size)
    record_forgetting(Forgetting((ImageFile.of(data),), AT, ""), target, STORAGE)
    quarantine_forgotten(dataset, STORAGE)
    erase(target, [(shard.name, 1, index.keys[1])], STORAGE, authority, at=AT, notice=str)
    assert data not in STORAGE.read(shard.address(target))
    write_files(source, {"more.png": photograph(99)})
    again = ingest(str(source), target, STORAGE, **settings).dataset
    assert again.digest != dataset.digest
    assert [problem.kind for problem in read_quarantine(target, STORAGE).excluded] == ["forgotten"]
