"""A picture is found in datasets of any origin, and it is said by what."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.presentation.errors import ConfigError
from pipelines.provenance import prints
from pipelines.provenance.find import Query, find
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.audit.recorded import IN_THREADS, read_sidecar
from pipelines.shards.index import read_dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import write_files
from tests.pipelines.shards.tars import write_shard

STORAGE = Storage()


def photograph(number: int, size: int = 48) -> Image.Image:
    """Smooth noise, as different from another one as photographs are."""
    grains = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """Forty photographs, ingested at 32 pixels."""
    folder = tmp_path_factory.mktemp("find")
    write_files(folder / "photos", {f"{i:02d}.png": encoded(photograph(i)) for i in range(40)})
    ingest(str(folder / "photos"), f"file://{folder}/ds", STORAGE, image_size=32, channels=3, shard_samples=8)
    return read_dataset(f"file://{folder}/ds", STORAGE)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Photographs in tars of another tool, as JPEG, with labels."""
    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(2):
        entries = []
        for i in range(shard * 5, shard * 5 + 5):
            entries += [(f"p{i}.jpg", encoded(photograph(i, 32), "JPEG", quality=90)), (f"p{i}.cls", b"0")]
        write_shard(folder / f"train-{shard}.tar", entries)
    return index_tars(f"file://{folder}", STORAGE).dataset


def found(picture: bytes, dataset, **options):
    return find(Query.of_picture(picture, "a test"), dataset, STORAGE, IN_THREADS, **options)


def test_the_source_of_an_ingest_is_found_by_the_file_that_the_ingest_makes_of_it(ingested):
    for number in (0, 17, 39):
        (match,) = found(encoded(photograph(number)), ingested)
        assert match.how == "ingested"
        (again,) = find(Query(match.sha256, digest=bytes.fromhex(match.sha256)), ingested, STORAGE, IN_THREADS)
        assert (again.how, again.key, again.shard, again.index) == ("file", match.key, match.shard, match.index)


def test_a_picture_of_other_bytes_is_found_by_its_pixels(ingested):
    (match,) = found(encoded(photograph(3), "WEBP", lossless=True), ingested)
    assert match.how == "ingested"
    (stored,) = found(encoded(photograph(3)), ingested)
    pixels = next(data for key, data in images(ingested) if key == stored.key)
    (match,) = found(encoded(Image.open(io.BytesIO(pixels)), "BMP"), ingested)
    assert (match.how, match.key) in {("ingested", stored.key), ("pixels", stored.key)}


def images(dataset):
    for split in dataset.splits:
        for shard in dataset.shards(split):
            index = read_sidecar(shard, dataset.uri, STORAGE)
            for i, _, data in prints.read_images(index, shard.address(dataset.uri), STORAGE):
                yield index.keys[i], bytes(data)


def test_changed_copies_are_found_as_nearly_the_same_and_others_are_not(ingested):
    changed = {
        "near": encoded(photograph(5), "JPEG", quality=75),
        "near, mirrored": encoded(ImageOps.mirror(photograph(5)), "JPEG", quality=75),
        "pixels, mirrored": encoded(ImageOps.mirror(photograph(5))),
    }
    (original,) = found(encoded(photograph(5)), ingested)
    for how, picture in changed.items():
        (match,) = found(picture, ingested)
        assert (match.how, match.key) == (how, original.key)
        assert match.similarity > 0.99
        assert len(found(picture, ingested, near=False)) == how.startswith("pixels")
    assert [found(encoded(photograph(number)), ingested) for number in range(100, 160)] == [[]] * 60


def test_pictures_are_found_in_tars_of_other_tools(indexed):
    file = encoded(photograph(7, 32), "JPEG", quality=90)
    (match,) = found(file, indexed)
    assert (match.how, match.key, match.shard, match.index) == ("file", "p7", "train-1.tar", 2)
    assert match.sha256 == hashlib.sha256(file).hexdigest()
    decoded = encoded(Image.open(io.BytesIO(file)))
    (match,) = found(decoded, indexed)
    assert (match.how, match.key) == ("pixels", "p7")


def test_a_key_names_a_sample_with_or_without_its_shard(indexed):
    for key in ("p7", "train-1.tar/p7"):
        (match,) = find(Query(key, key=key), indexed, STORAGE, IN_THREADS)
        assert (match.how, match.shard, match.index) == ("key", "train-1.tar", 2)
    assert find(Query("p77", key="p77"), indexed, STORAGE, IN_THREADS) == []


def test_what_is_recorded_of_a_tar_is_used_until_the_tar_changes(tmp_path, monkeypatch):
    entries = [(f"{i}.png", encoded(photograph(i, 32))) for i in range(4)]
    write_shard(tmp_path / "train-0.tar", entries)
    dataset = index_tars(f"file://{tmp_path}", STORAGE).dataset
    assert len(found(entries[1][1], dataset)) == 1
    read = []
    real = prints.PrintTar.__call__

    def counted(self, tar, advance):
        read.append(tar.name)
        return real(self, tar, advance)

    monkeypatch.setattr(prints.PrintTar, "__call__", counted)
    assert len(found(entries[2][1], dataset)) == 1
    assert read == []
    write_shard(tmp_path / "train-0.tar", [(f"{i}.png", encoded(photograph(i + 50, 32))) for i in range(4)])
    dataset = index_tars(f"file://{tmp_path}", STORAGE, replace=True).dataset
    assert found(entries[1][1], dataset) == []
    assert read == ["train-0.tar"]


@pytest.mark.parametrize(("text", "says"), [("nothing.png", "there is no such file"), ("text.jpg", "is no image")])
def test_what_is_no_picture_is_refused(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigError) as refused:
        Query.parse(text, STORAGE)
    assert text in str(refused.value)


def test_words_are_keys_and_64_digits_are_a_digest():
    assert Query.parse("train-00000012", STORAGE).key == "train-00000012"
    assert Query.parse("AB" * 32, STORAGE).digest == b"\xab" * 32


def listed(folder, *lines) -> Query:
    (folder / "list.txt").write_text("\n".join(str(line) for line in lines))
    return Query.parse(str(folder / "list.txt"), STORAGE)


def test_a_list_finds_what_each_of_its_lines_finds_and_says_which_line_it_was(ingested, tmp_path):
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for path, number in zip(pictures, (4, 9, 900), strict=True):
        path.write_bytes(encoded(photograph(number)))
    (tmp_path / "again.jpg").write_bytes(encoded(photograph(9), "JPEG", quality=100))
    (nine,) = found(encoded(photograph(9)), ingested)
    query = listed(tmp_path, *pictures, "", tmp_path / "again.jpg", nine.key, nine.sha256, "no-such-key")
    together = find(query, ingested, STORAGE, IN_THREADS)
    one_by_one = {
        (match.shard, match.index) for one in query.each for match in find(one, ingested, STORAGE, IN_THREADS)
    }
    assert [(match.shard, match.index) for match in together] == sorted(one_by_one)
    assert len(together) == 2
    names = {one.named for one in query.each}
    assert {name for match in together for name in match.asked} == names - {query.each[2].named, "no-such-key"}
    assert (
        query.named
        == listed(tmp_path, "no-such-key", nine.sha256, nine.key, *reversed(pictures), tmp_path / "again.jpg").named
    )


def test_a_list_that_cannot_be_used_says_where(tmp_path):
    for lines, told in ((["", " "], "is empty"), (["key", "gone.png"], r"line 2 of .*gone.png: there is no such file")):
        with pytest.raises(ConfigError, match=told):
            listed(tmp_path, *lines)
    (tmp_path / "other.txt").write_text("key")
    with pytest.raises(ConfigError, match=r"line 1 of .* is a list again"):
        listed(tmp_path, tmp_path / "other.txt")
    with pytest.raises(ConfigError, match="there is no such list"):
        Query.parse(f"file://{tmp_path}/gone.txt", STORAGE)
