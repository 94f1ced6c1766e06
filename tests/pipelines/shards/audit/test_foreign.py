"""Tars that others wrote: the same samples as plain WebDataset, or a refusal that names what is wrong."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.shards.audit import scan
from pipelines.shards.audit.check import check
from pipelines.shards.audit.foreign import IndexRefusedError, SplitRule, assign_splits, index_tars
from pipelines.shards.audit.recorded import InThreads, TarReading, list_tars
from pipelines.shards.audit.scan import ObjectStream, TarFaultError, read_samples
from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import DatasetError, ShardIndex, read_dataset, split_name
from pipelines.shards.ingest.write import ingest
from pipelines.shards.order import Located, SampleOrder
from pipelines.shards.quarantine import kept_samples, read_quarantine
from pipelines.shards.read import ShardReader, read_split
from pipelines.storage import Storage, layout
from tests.pipelines.shards.tars import tar_bytes

STORAGE = Storage()


def png(value, size=8, mode="RGB"):
    """One flat picture; `value` tells it from the others."""
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 255 - value, 7)).save(buffer, "png")
    return buffer.getvalue()


def jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((8, 8), 50).convert("RGB").save(buffer, "jpeg")
    return buffer.getvalue()


def sample(key, value=0, label=0):
    return [(f"{key}.png", png(value)), (f"{key}.cls", str(label).encode())]


def write(folder, **shards):
    """Tars by name, without .tar, of entries or bytes; the address of their folder."""
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / f"{name}.tar").write_bytes(content if isinstance(content, bytes) else tar_bytes(content))
    return f"file://{folder}"


def foreign(paths):
    """What plain WebDataset yields: key and raw members of each sample in order."""
    stream = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False)
    added = ("__key__", "__url__", "__local_path__")
    return [(s["__key__"], {k: v for k, v in s.items() if k not in added}) for s in stream]


def open_reader(dataset, split, cache, quarantine=None):
    return ShardReader(dataset, split, ShardFetcher(dataset.uri, STORAGE, ShardCache(cache, 10**8)), quarantine)


def ours(dataset, split, cache, quarantine=None):
    """Key and raw members of each sample as training reads them, in order of shard."""
    reader = open_reader(dataset, split, cache, quarantine)
    found = []
    for s, shard in enumerate(reader.shards):
        index = ShardIndex.from_json(STORAGE.read(f"{dataset.uri}/{layout.index_name(shard.name)}"))
        keys = kept_samples(shard.name, index, quarantine).keys
        count = np.arange(len(keys))
        here = reader.samples(Located(count, np.full(len(keys), s), count))
        assert [sample["__key__"] for sample in here] == list(keys)
        assert len(keys) == shard.samples
        found += [(s["__key__"], {name: s[name] for name in s if not name.startswith("__")}) for s in here]
    return found


def paths(dataset, split):
    return [Path(dataset.uri.removeprefix("file://")) / shard.name for shard in dataset.shards(split)]


@pytest.fixture
def by_webdataset(tmp_path):
    """A set by plain `webdataset.ShardWriter`: JPEG, class, caption, an embedding and a member that nobody knows."""
    (tmp_path / "wds").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 21), ("test", 5)):
        with webdataset.ShardWriter(str(tmp_path / "wds" / f"{split}-%04d.tar"), maxcount=6, verbose=0) as writer:
            for i in range(count):
                writer.write(
                    {
                        "__key__": f"part.{i % 2}/{split}{i:05d}",
                        "jpg": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
                        "cls": i % 4,
                        "txt": f"picture {i}",
                        "json": {"i": i},
                        "emb.npy": rng.normal(size=5).astype(np.float32),
                        "seg.png": rng.integers(0, 256, (16, 16), dtype=np.uint8),
                    }
                )
    return f"file://{tmp_path}/wds"


def by_tar(tmp_path, form):
    """A set by GNU tar: folders as entries, names beyond 100 characters, dots in folders, capitals in extensions."""
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    files = tmp_path / "files"
    deep = "a.long.folder" * 6 if form != "ustar" else "a.folder"
    for i in range(9):
        folder = files / f"v1.{i % 2}" / deep
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{i:04d}-" + "x" * (80 if form != "ustar" else 20)
        (folder / f"{name}.PNG").write_bytes(png(i * 20))
        (folder / f"{name}.cls").write_text(f"{i % 3}\n")
    (files / "README").write_text("not a sample")
    (tmp_path / "tars").mkdir()
    for split in ("train", "test"):
        archive = str(tmp_path / "tars" / f"{split}.tar")
        command = ["tar", f"--format={form}", "--sort=name", "-cf", archive, "-C", str(files), "."]
        subprocess.run(command, check=True)
    return f"file://{tmp_path}/tars"


@pytest.mark.parametrize("made", ["webdataset", "gnu", "pax", "ustar"])
def test_a_foreign_set_reads_and_trains_with_the_samples_of_plain_webdataset(made, request, tmp_path):
    uri = request.getfixturevalue("by_webdataset") if made == "webdataset" else by_tar(tmp_path, made)
    dataset = index_tars(uri, STORAGE).dataset
    assert read_dataset(uri, STORAGE) == dataset
    for split in ("train", "test"):
        assert ours(dataset, split, tmp_path / "cache") == foreign(paths(dataset, split))

    reader = open_reader(dataset, "train", tmp_path / "cache")
    counts = [s.samples for s in reader.shards]
    order = SampleOrder(counts, lanes=2, window=2, seed=0, digest=dataset.digest)
    batch = reader.batch(order.piece(0, sum(counts), 0, 1))
    pixels = webdataset.WebDataset([str(p) for p in paths(dataset, "train")], shardshuffle=False).decode("rgb8")
    wanted = sorted((int(s["cls"]), s["jpg" if "jpg" in s else "png"].tobytes()) for s in pixels)
    images = ((batch.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = sorted((int(label), image.tobytes()) for label, image in zip(batch.labels, images, strict=True))
    assert found == wanted


NAMES = st.text(alphabet="ab./_P", min_size=1, max_size=9).filter(lambda n: n.strip("/") and "//" not in n)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, max_size=12))
def test_entries_are_grouped_as_webdataset_groups_them(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(tar_bytes([(name, f"{i}".encode()) for i, name in enumerate(names)]))
    stream = ObjectStream(f"file://{path}", path.stat().st_size, STORAGE)
    data = path.read_bytes()
    found = list(read_samples(stream))
    if any(s.flaws for s in found):
        with pytest.raises(ValueError, match="duplicate file name"):
            foreign([path])
    else:
        cut = [(s.key, {e: data[m.offset : m.offset + m.size] for e, m in s.members.items()}) for s in found]
        assert cut == foreign([path])


def test_names_are_divided_at_the_first_dot_after_the_folder():
    assert split_name("a.b/c.d/0001.Seg.PNG") == ("a.b/c.d/0001", "seg.png")
    assert split_name("./0001.jpg") == ("./0001", "jpg")
    assert split_name("README") is split_name(".hidden") is split_name("__meta__/x.json") is None


def test_reindexing_what_the_ingest_wrote_gives_the_same_description(tmp_path):
    for c, name in enumerate(["cat", "dog"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(c * 100 + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    uri = f"file://{tmp_path}/ds"
    first = ingest(str(tmp_path / "photos"), uri, STORAGE, image_size=16, channels=3, shard_samples=5).dataset
    sidecars = {p.name: p.read_bytes() for p in (tmp_path / "ds").glob("*.index.json")}
    with pytest.raises(DatasetError, match=r"has a dataset.json already: verify it with `ddpm check"):
        index_tars(uri, STORAGE)
    again = index_tars(uri, STORAGE, replace=True).dataset
    assert again == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "ds").glob("*.index.json")} == sidecars


def test_grey_images_in_a_set_of_colour_count_in_every_channel(tmp_path):
    entries = [("a.png", png(10)), ("b.png", png(200, mode="L")), ("c.npy", npy(np.full((8, 8), 50, np.uint8)))]
    dataset = index_tars(write(tmp_path / "s", train=entries), STORAGE).dataset
    assert (dataset.channels, dataset.image_size, dataset.classes) == (3, 8, ())
    batch = read_split(open_reader(dataset, "train", tmp_path / "c"))
    assert batch.labels is None
    np.testing.assert_allclose(batch.images.mean((0, 2, 3)), dataset.mean, atol=1e-5)
    np.testing.assert_allclose(batch.images.std((0, 2, 3), correction=0), dataset.std, atol=1e-5)


def test_a_set_of_grey_images_has_one_channel(tmp_path):
    entries = [("a.png", png(10, mode="L")), ("b.npy", npy(np.full((8, 8, 1), 90, np.uint8)))]
    dataset = index_tars(write(tmp_path / "s", train=entries), STORAGE).dataset
    assert (dataset.channels, len(dataset.mean)) == (1, 1)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_tars_are_read_in_ranges_and_never_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK_BYTES", 1000)
    asked = []
    whole = Storage.fetch

    def fetch(self, uri, start, stop, sink, **options):
        asked.append((uri, start, stop))
        return whole(self, uri, start, stop, sink, **options)

    monkeypatch.setattr(Storage, "fetch", fetch)
    uri = write(tmp_path / "s", train=[*sample("a"), ("a.mp4", bytes(50_000)), *sample("b", 1, 1)])
    dataset = index_tars(uri, STORAGE).dataset
    assert max(stop - start for _, start, stop in asked) <= 1000
    assert (
        sum(stop - start for _, start, stop in asked) <= 2 * dataset.shards("train")[0].bytes
    )  # its first sample is looked at before
    assert ours(dataset, "train", tmp_path / "c") == foreign(paths(dataset, "train"))


def test_any_number_of_threads_gives_the_same_description(by_webdataset, tmp_path):
    one = index_tars(by_webdataset, STORAGE, reading=TarReading(InThreads(1))).dataset
    assert index_tars(by_webdataset, STORAGE, reading=TarReading(InThreads(8)), replace=True).dataset == one


def test_splits_are_found_by_folder_or_name_and_else_named():
    names = ["train/b.tar", "train/a.tar", "test-1.tar", "train_0.tar", "train.tar", "test00.tar", "train/x/c.tar"]
    assert assign_splits(names) == {
        "train": ["train.tar", "train/a.tar", "train/b.tar", "train/x/c.tar", "train_0.tar"],
        "test": ["test-1.tar", "test00.tar"],
    }
    assert assign_splits(["b.tar", "a.tar"], [SplitRule.parse("train")]) == {"train": ["a.tar", "b.tar"]}
    rules = [SplitRule.parse("test=part-9*"), SplitRule.parse("train=part-*")]
    assert assign_splits(["part-1.tar", "part-91.tar"], rules) == {"train": ["part-1.tar"], "test": ["part-91.tar"]}
    with pytest.raises(DatasetError, match=r"2 of 3 tars belong to no split: training.tar, x-train.tar; .*--split"):
        assign_splits(["training.tar", "x-train.tar", "train-0.tar"])
    with pytest.raises(DatasetError, match=r"no tar is in the split train, only in test: name it with --split train="):
        assign_splits(["test-0.tar"])
    with pytest.raises(ValueError, match=r"'=x' is not a split: write NAME=PATTERN"):
        SplitRule.parse("=x")


def test_folders_are_splits_and_sidecars_lie_beside_the_tars(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, **{"000": [*sample("a"), *sample("b", 9, 1)], "001": sample("c", 3, 2)})
    dataset = index_tars(f"file://{tmp_path}", STORAGE, classes=["x", "y", "z"]).dataset
    assert [s.name for s in dataset.shards("train")] == ["train/000.tar", "train/001.tar"]
    assert {path.name for path in tmp_path.iterdir()} == {"train", "test", "dataset.json"}
    assert dataset.classes == ("x", "y", "z")
    assert ShardIndex.from_json((tmp_path / layout.index_name("train/000.tar")).read_text()).keys == ("a", "b")
    assert ours(dataset, "test", tmp_path / "cache") == foreign(paths(dataset, "test"))


def link(kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in sample("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "a.png"
        tar.addfile(info)
    return buffer.getvalue()


def flip(data, at, bit=1):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


GOOD = tar_bytes([*sample("a"), *sample("b", 5, 1), *sample("c", 9, 2)])
"""Members of one block each: a.png's header is at 0, its bytes at 512, a.cls's header at 1,024, …, the end at 6,144."""


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD[:4096], r"train-1.tar: ends at byte 4,096 without the end-of-archive marker: cut at the border"),
        (GOOD[:6144], r"ends at byte 6,144 without the end-of-archive marker.*, after the entry 'c.cls'"),
        (GOOD[:4640], r"ends inside a member at byte 4,640, after the entry 'b.cls': write or copy it again"),
        (GOOD[:4300], r"ends inside a header that begins at byte 4,096, after the entry 'b.cls'"),
        (b"", r"train-1.tar: is empty, 0 bytes: write or copy it again"),
        (flip(GOOD, 2048 + 3), r"has a damaged header at byte 2,048, bad checksum, after the entry 'a.cls'"),
        (flip(GOOD, 3), r"has a damaged header at byte 0, bad checksum: write or copy it again"),
        (GOOD + GOOD, r"goes on after its end-of-archive marker, where no reader looks"),
        (gzip.compress(GOOD), r"is compressed \(gzip\), so no member can be read in place: decompress it"),
        (b"<html>not found</html>" * 99, r"has a damaged header at byte 0"),
        (link(tarfile.LNKTYPE), r"has only a link to 'a.png' as 'b.png', .*`tar --hard-dereference`"),
        (link(tarfile.SYMTYPE), r"has only a link to 'a.png' as 'b.png', .*`tar --dereference`"),
        ([("a.png", png(1)), *sample("b"), ("a.cls", b"0")], r"a: has no cls member.*\n.*a: has no image.* it has cls"),
        ([*sample("a"), *sample("b"), *sample("a", 3)], r"a: has the key of sample 0: keys must be unique"),
        ([*sample("a"), ("a.PNG", png(4))], r"a: has the member png twice, where WebDataset stops"),
        ([*sample("a"), ("README.md", b"hello")], r"README: has no image: a sample needs one of png, .*; it has md"),
        ([("a.png", b"\x89PNG not really"), ("a.cls", b"0")], r"a: png cannot be decoded: it is no PNG, JPEG or WebP"),
        ([("a.png", png(1)[:60]), ("a.cls", b"0")], r"a: png is damaged: Truncated File Read"),
        ([("a.jpg", jpeg()[:-30]), ("a.cls", b"0")], r"a: jpg cannot be decoded: image file is truncated"),
        ([("a.png", png(1, size=9)), ("a.cls", b"0")], r"a: is 9x9 pixels, the dataset is 8x8"),
        ([("a.npy", npy(np.zeros((8, 8, 2), np.uint8))), ("a.cls", b"0")], r"npy is uint8 \[8, 8, 2\]: write uint8"),
        ([("a.npy", npy(np.zeros((8, 8, 3)))), ("a.cls", b"0")], r"npy is float64 \[8, 8, 3\]: write uint8"),
        ([("a.png", png(1)), ("a.cls", b"cat")], r"a: cls is 'cat': write a class index, a whole number from 0 on"),
        ([("a.png", png(1)), ("a.cls", b"-1")], r"a: cls is '-1'"),
        ([("a.png", png(1)), ("a.cls", b"123456789")], r"a: has the label 123456789, .* at most 100,000 can be"),
        ([("a.png", png(1))], r"a: has no cls member, other samples of the dataset do"),
    ],
)
def test_shards_that_training_could_not_use_are_refused_by_name(tmp_path, content, message):
    uri = write(tmp_path / "s", **{"train-0": sample("first"), "train-1": content})
    with pytest.raises(IndexRefusedError, match=message) as refused:
        index_tars(uri, STORAGE)
    assert "leave them out with --quarantine" in str(refused.value)
    assert {p.shard for p in refused.value.problems} == {"train-1.tar"}
    assert not (tmp_path / "s" / "dataset.json").exists()

    done = index_tars(uri, STORAGE, quarantine=True)
    assert done.quarantine == read_quarantine(uri, STORAGE)
    bad = {(p.index, p.sample) if p.index is not None else None for p in refused.value.problems}
    sound = ours_with(done, tmp_path)
    assert sound[0] == "first"
    assert None not in bad or sound == ["first"]
    assert not {key for _, key in bad - {None}} & set(sound[1:]) or "has the key of" in str(refused.value)  # type: ignore[misc]


def test_a_split_of_which_nothing_would_be_left_is_no_dataset(tmp_path):
    uri = write(tmp_path / "s", **{"train-0": [*sample("a"), *sample("b")], "test-0": sample("c")})
    tar = tmp_path / "s" / "train-0.tar"
    tar.write_bytes(tar.read_bytes()[:4096])  # without the end of the archive: the whole shard is left out
    with pytest.raises(DatasetError, match=r"the quarantine leaves no sample of .* split 'train'"):
        index_tars(uri, STORAGE, quarantine=True)
    assert not (tmp_path / "s" / "dataset.json").exists()


def ours_with(done, tmp_path):
    """Keys of what is left; all of it can be decoded."""
    found = ours(done.dataset, "train", tmp_path / "cache", done.quarantine)
    assert len(read_split(open_reader(done.dataset, "train", tmp_path / "cache", done.quarantine)).images) == len(found)
    return [key for key, _ in found]


def test_a_sparse_member_is_refused(tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"x")
        file.seek(10**6)
        file.write(b"y")
    archive = tmp_path / "x.tar"
    subprocess.run(["tar", "--sparse", "-cf", str(archive), "-C", str(tmp_path), "a.png"], check=True)
    with pytest.raises(TarFaultError, match=r"stores 'a.png' with holes: write it without --sparse"):
        list(read_samples(ObjectStream(f"file://{archive}", archive.stat().st_size, STORAGE)))


def test_images_that_are_not_square_are_indexed_read_and_checked(tmp_path):
    import jsonschema

    rng, entries, pixels = np.random.default_rng(0), [], []
    for key in "abc":
        pixels.append(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        Image.fromarray(pixels[-1]).save(buffer, "png")
        entries.append((f"{key}.png", buffer.getvalue()))
    done = index_tars(uri := write(tmp_path / "wide", train=entries), STORAGE)
    assert "data.image_size=6x8" in "".join(done.lines())
    dataset = read_dataset(uri, STORAGE)
    assert (dataset, dataset.shape) == (done.dataset, (3, 6, 8))
    images = open_reader(dataset, "train", tmp_path / "cache").at(np.arange(3)).images
    assert np.array_equal(((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), np.stack(pixels))
    assert not check(uri, STORAGE).problems
    schema = json.loads((Path(__file__).parents[4] / "docs" / "dataset.schema.json").read_text())
    jsonschema.validate(json.loads(STORAGE.read(f"{uri}/dataset.json")), schema)
    with pytest.raises(IndexRefusedError, match=r"d: is 8x8 pixels, the dataset is 6x8"):
        index_tars(write(tmp_path / "mixed", train=[*entries, ("d.png", png(1))]), STORAGE)


def test_sets_without_shape_or_samples_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"not one sample for the split train"):
        index_tars(write(tmp_path / "none", train=[]), STORAGE)
    with pytest.raises(DatasetError, match=r"test has no samples"):
        index_tars(write(tmp_path / "half", train=sample("a"), test=[]), STORAGE)
    with pytest.raises(DatasetError, match=r"no \*.tar at .*: give the folder that holds the shards"):
        index_tars(f"file://{tmp_path}/nothing", STORAGE)
    with pytest.raises(IndexRefusedError, match=r"train.tar: a: has no image"):
        index_tars(write(tmp_path / "text", train=[("a.txt", b"only words")]), STORAGE)
    with pytest.raises(IndexRefusedError, match=r"c: has the label 2, but classes are counted from 0 and .* has 2"):
        index_tars(write(tmp_path / "more", train=GOOD), STORAGE, classes=["x", "y"])


def test_image_size_names_the_rule_where_the_first_image_is_the_exception(tmp_path):
    uri = write(tmp_path / "s", train=[("a.png", png(1, size=4)), ("b.png", png(2)), ("c.png", png(3))])
    with pytest.raises(IndexRefusedError, match=r"2 problems.*\n.*b: is 8x8 pixels, the dataset is 4x4"):
        index_tars(uri, STORAGE)
    done = index_tars(uri, STORAGE, image_size=8, quarantine=True)
    assert (done.dataset.image_size, ours_with(done, tmp_path)) == (8, ["b", "c"])


def test_many_problems_are_counted_and_only_the_first_are_shown(tmp_path):
    entries = [("a.png", png(1)), *((f"b{i:03d}.png", b"") for i in range(50))]
    with pytest.raises(IndexRefusedError, match=r"50 problems") as refused:
        index_tars(write(tmp_path / "s", train=entries), STORAGE)
    assert len(refused.value.problems) == 50
    assert len(str(refused.value).splitlines()) == 23
    assert "… and 30 more" in str(refused.value)


def test_a_description_that_is_written_again_keeps_class_names_and_drops_an_old_quarantine(tmp_path):
    uri = write(tmp_path / "s", **{"train-0": [*sample("a"), *sample("b", 1, 1)], "train-1": [("c.cls", b"0")]})
    index_tars(uri, STORAGE, classes=["cat", "dog"], quarantine=True)
    assert read_quarantine(uri, STORAGE) is not None
    write(tmp_path / "s", **{"train-1": sample("c", 7, 1)})
    done = index_tars(uri, STORAGE, replace=True)
    assert done.dataset.classes == ("cat", "dog")
    assert read_quarantine(uri, STORAGE) is None
    assert Counter(list_tars(uri, STORAGE).keys()) == Counter(["train-0.tar", "train-1.tar"])
    (tmp_path / "s" / "dataset.json").write_text("{damaged")
    assert index_tars(uri, STORAGE, replace=True).dataset.classes == ("0", "1")


def test_written_files_follow_the_documented_schemas(tmp_path):
    import jsonschema

    uri = write(tmp_path / "s", **{"train-0": sample("a"), "train-1": [*sample("b"), ("c.cls", b"x")], "test-0": b""})
    with pytest.raises(DatasetError, match="is empty, 0 bytes"):  # a split must keep something
        index_tars(uri, STORAGE, quarantine=True)
    (tmp_path / "s" / "test-0.tar").unlink()
    index_tars(uri, STORAGE, quarantine=True)
    schema = json.loads((Path(__file__).parents[4] / "docs" / "dataset.schema.json").read_text())
    jsonschema.validate(json.loads((tmp_path / "s" / "dataset.json").read_text()), schema)
    left_out = json.loads((tmp_path / "s" / "quarantine.json").read_text())
    quarantine = {"$ref": "#/$defs/quarantine", "$defs": schema["$defs"]}
    jsonschema.validate(left_out, quarantine)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**left_out, "excluded": [{"shard": "x.tar"}]}, quarantine)
