"""Damage of every kind is found, named by shard and sample, and can be left out."""

import dataclasses
import gzip
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.shards.audit import check as checking
from pipelines.shards.audit.check import check, write_quarantine
from pipelines.shards.audit.foreign import index_tars
from pipelines.shards.audit.recorded import InThreads, TarReading
from pipelines.shards.index import DatasetError, ShardIndex, make_dataset, read_dataset
from pipelines.shards.quarantine import Quarantine, read_quarantine
from pipelines.storage import Storage
from tests.pipelines.shards.tars import tar_bytes

STORAGE = Storage()
SHARD = "train-1.tar"


def png(value, size=8, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 255 - value, 7)).save(buffer, "png")
    return buffer.getvalue()


def deep():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 999, np.uint16)).save(buffer, "png")
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sample(key, value=0, label=0):
    return [(f"{key}.png", png(value)), (f"{key}.cls", str(label).encode()), (f"{key}.json", b"{}")]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two training shards of four samples, a test shard of two; three classes. Each member fills one block."""
    folder = tmp_path_factory.mktemp("sound")
    for name, keys in {"train-0": "abcd", "train-1": "efgh", "test-0": "ij"}.items():
        entries = [e for i, key in enumerate(keys) for e in sample(key, ord(key), i % 3)]
        (folder / f"{name}.tar").write_bytes(tar_bytes(entries))
    index_tars(f"file://{folder}", STORAGE)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "ds")
    return tmp_path / "ds"


def address(folder):
    return f"file://{folder}"


def found(folder, **options):
    return [(p.shard, p.sample, p.kind) for p in check(address(folder), STORAGE, **options).problems]


def member(folder, key, extension):
    """(offset, size) of a member of the damaged shard."""
    index = ShardIndex.from_json((folder / "train-1.index.json").read_text())
    place = index.members(index.keys.index(key))[extension]
    return place.offset, place.size


def flip(folder, at, bit=1):
    data = bytearray((folder / SHARD).read_bytes())
    data[at] ^= bit
    (folder / SHARD).write_bytes(data)


def cut(folder, size):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:size])


def sidecar_text(change):
    def damage(folder):
        path = folder / "train-1.index.json"
        plain = json.loads(path.read_text())
        path.write_text(json.dumps(change(plain)))

    return damage


def one_offset_off(plain):
    plain["members"]["png"]["offset"][2] += 512
    return plain


def fewer_samples(plain):
    columns = {n: {p: v[:-1] for p, v in column.items()} for n, column in plain["members"].items()}
    return {**plain, "keys": plain["keys"][:-1], "members": columns}


def another_key(plain):
    plain["keys"][1] = "other"
    return plain


def add(path, data):
    path.write_bytes(data)


def grow(folder):
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")


STORED_DAMAGE = {
    "cut inside a member": (
        lambda f: cut(f, member(f, "g", "png")[0] + 20),
        {("shard", "truncated"), ("g", "lost"), ("h", "lost")},
        r"is cut short: 6,676 bytes, dataset.json says 20,480; write or copy it again",
    ),
    "cut exactly between two samples": (
        lambda f: cut(f, member(f, "g", "png")[0] - 512),
        {("shard", "truncated"), ("g", "lost"), ("h", "lost")},
        r"ends at byte 6,144 without the end-of-archive marker.*, after the entry 'f.json'",
    ),
    "cut between two members of a sample": (
        lambda f: cut(f, member(f, "h", "json")[0] - 512),
        {("shard", "truncated"), ("h", "lost")},
        r"is not in the tar as recorded, at bytes 9,728 to 11,778",
    ),
    "cut after the last sample": (
        lambda f: cut(f, 12 * 1024),
        {("shard", "truncated")},
        r"ends at byte 12,288 without the end-of-archive marker",
    ),
    "cut in the zeros at the end": (
        lambda f: cut(f, 12 * 1024 + 512),
        {("shard", "truncated")},
        r"is cut short: 12,800 bytes, dataset.json says 20,480",
    ),
    "emptied": (
        lambda f: cut(f, 0),
        {("shard", "truncated"), ("e", "lost"), ("f", "lost"), ("g", "lost"), ("h", "lost")},
        r"is empty, 0 bytes: write or copy it again",
    ),
    "a bit of an image flipped": (
        lambda f: flip(f, member(f, "f", "png")[0] + 50),
        {("shard", "bytes"), ("f", "decode"), ("f", "changed")},
        r"has other bytes than were indexed: SHA-256 [0-9a-f]{12}…, dataset.json says [0-9a-f]{12}…; write or copy",
    ),
    "a bit of a label flipped": (
        lambda f: flip(f, member(f, "f", "cls")[0], 8),
        {("shard", "bytes"), ("f", "label"), ("f", "changed")},
        r"f  has the label 9, but classes are counted from 0 and the dataset has 3",
    ),
    "a bit of a header flipped": (
        lambda f: flip(f, member(f, "g", "png")[0] - 500),
        {("shard", "bytes"), ("shard", "archive"), ("g", "lost"), ("h", "lost")},
        r"has a damaged header at byte 6,144, bad checksum, after the entry 'f.json'",
    ),
    "a bit of the padding flipped": (
        lambda f: flip(f, member(f, "g", "cls")[0] + 300),
        {("shard", "bytes")},
        r"has other bytes than were indexed",
    ),
    "bytes appended": (grow, {("shard", "bytes"), ("shard", "archive")}, r"is too long: 20,484 bytes, .* says 20,480"),
    "another shard in its place": (
        lambda f: shutil.copyfile(f / "train-0.tar", f / SHARD),
        {("shard", "bytes"), ("e", "lost"), ("f", "lost"), ("g", "lost"), ("h", "lost")},
        r"e  is not in the tar as recorded, at bytes 512 to 2,562",
    ),
    "compressed": (
        lambda f: add(f / SHARD, gzip.compress((f / SHARD).read_bytes())),
        {("shard", "truncated"), ("shard", "compressed"), *((k, "lost") for k in "efgh")},
        r"is compressed \(gzip\), so no member can be read in place: decompress it",
    ),
    "missing": (
        lambda f: (f / SHARD).unlink(),
        {("shard", "missing")},
        r"is not there: put it back, 20,480 bytes with SHA-256 [0-9a-f]{12}…",
    ),
    "without sidecar": (
        lambda f: (f / "train-1.index.json").unlink(),
        {("shard", "sidecar")},
        r"has no train-1.index.json: write it again with `ddpm index file:///.*/ds --replace`",
    ),
    "with a sidecar that is no JSON": (
        lambda f: add(f / "train-1.index.json", b'{"schema_version": 2, "sam'),
        {("shard", "sidecar")},
        r"has a train-1.index.json that cannot be read \(the shard index is damaged: ",
    ),
    "with a sidecar of another version": (
        sidecar_text(lambda plain: {**plain, "schema_version": 7}),
        {("shard", "sidecar")},
        r"cannot be read \(the shard index has version 7, this release reads 2\)",
    ),
    "with the sidecar of another shard": (
        lambda f: shutil.copyfile(f / "train-0.index.json", f / "train-1.index.json"),
        {("shard", "sidecar")},
        r"does not fit it: sample 0 is 'a' in it and 'e' in the tar; write it again with `ddpm index",
    ),
    "with an offset that is wrong": (
        sidecar_text(one_offset_off),
        {("shard", "sidecar")},
        r"does not fit it: members of sample 2 \('g'\) lie elsewhere in the tar",
    ),
    "with a key that is wrong": (
        sidecar_text(another_key),
        {("shard", "sidecar")},
        r"does not fit it: sample 1 is 'other' in it and 'f' in the tar",
    ),
    "with a sidecar that lists too few": (
        sidecar_text(fewer_samples),
        {("shard", "sidecar")},
        r"has a train-1.index.json with 3 samples, dataset.json says 4",
    ),
}


@pytest.mark.parametrize("kind", STORED_DAMAGE)
def test_damage_to_stored_files_is_named(folder, kind):
    damage, expected, message = STORED_DAMAGE[kind]
    damage(folder)
    report = check(address(folder), STORAGE)
    assert {(p.sample or "shard", p.kind) for p in report.problems} == expected
    assert {p.shard for p in report.problems} == {SHARD}
    printed(report, message)
    quarantine = write_quarantine(report, STORAGE).quarantine
    assert [(p.shard, p.index) for p in quarantine.excluded] == [(SHARD, None)]
    assert read_quarantine(address(folder), STORAGE) == quarantine


def printed(report, message):
    """The lines that a user gets."""
    import re

    lines = []
    checking.show(report, Console(file=io.StringIO()), lambda stage, text: lines.append(text))
    assert any(re.search(message, line) for line in lines), lines


WORSE = png(1)
SAMPLE_DAMAGE = {
    "no image at all": (
        [("x.png", b"\x89PNG")],
        "decode",
        r"x  png cannot be decoded: it is no PNG, JPEG or WebP image",
    ),
    "half an image": ([("x.png", WORSE[: len(WORSE) // 2])], "decode", r"x  png (cannot be decoded|is damaged)"),
    "a wrong checksum": (
        [("x.png", WORSE[:-20] + b"\0" + WORSE[-19:])],
        "decode",
        r"x  png (cannot be decoded|is damaged)",
    ),
    "another size": ([("x.png", png(1, size=9))], "shape", r"x  is 9x9 pixels, the dataset is 8x8"),
    "16 bits": ([("x.png", deep())], "channels", r"x  png has pixels of mode I;16: write 8 bits, grey or colour"),
    "two channels": (
        [("x.npy", npy(np.zeros((8, 8, 2), np.uint8)))],
        "channels",
        r"x  npy is uint8 \[8, 8, 2\]: write",
    ),
    "pickled": ([("x.npy", npy(np.array([{}], object)))], "decode", r"x  npy cannot be decoded: it holds objects of"),
    "no image member": ([("x.txt", b"words")], "no-image", r"x  has no image: .*; it has cls, txt"),
    "txt that is no text": ([("x.png", WORSE), ("x.txt", b"\xff\xfe")], "text", r"x  txt is not UTF-8: .* at byte 0"),
    "json that is none": ([("x.png", WORSE), ("x.json", b"{")], "json", r"x  json cannot be read"),
    "an embedding of NaN": (
        [("x.png", WORSE), ("x.emb.npy", npy(np.array([1.0, np.nan])))],
        "embedding",
        r"x  emb.npy \(float64\) holds values that are no finite floats",
    ),
    "a member twice": ([("x.png", WORSE), ("x.PNG", WORSE)], "duplicate", r"x  has the member png twice"),
}


@pytest.mark.parametrize("kind", SAMPLE_DAMAGE)
def test_samples_that_were_never_right_are_named(tmp_path, kind):
    entries, expected, message = SAMPLE_DAMAGE[kind]
    report = checked(tmp_path, [*sample("w"), *entries, ("x.cls", b"1"), *sample("y", 2, 2)])
    assert [(p.shard, p.index, p.sample, p.kind) for p in report.problems] == [(SHARD, 1, "x", expected)]
    printed(report, message)


def checked(tmp_path, entries, **changes):
    """The check of a set with such a shard, indexed all the same, its dataset.json changed."""
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "train-0.tar").write_bytes(tar_bytes(sample("first")))
    (folder / SHARD).write_bytes(tar_bytes(entries))
    uri = address(folder)
    redescribe(uri, index_tars(uri, STORAGE, quarantine=True, classes=["p", "q", "r"]).dataset, **changes)
    return check(uri, STORAGE)


def redescribe(uri, dataset, **changes):
    content = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)} | changes
    del content["uri"], content["digest"]
    STORAGE.write(f"{uri}/dataset.json", make_dataset(uri, **content).to_json().encode())


@pytest.mark.parametrize(
    "cls, message",
    [
        ([("x.cls", b"3")], r"x  has the label 3, but classes are counted from 0 and the dataset has 3"),
        ([("x.cls", b"-1")], r"x  cls is '-1': write a class index"),
        ([("x.cls", b"owl")], r"x  cls is 'owl': write a class index"),
        ([], r"x  has no cls member, other samples of the dataset do"),
    ],
)
def test_labels_must_be_classes(tmp_path, cls, message):
    report = checked(tmp_path, [("x.png", png(1)), *cls])
    assert [(p.sample, p.kind) for p in report.problems] == [("x", "label")]
    printed(report, message)


def test_labels_in_a_set_without_classes_and_colour_in_a_grey_one_are_named(tmp_path):
    report = checked(tmp_path, [("x.png", png(1, mode="L")), ("x.cls", b"0")], classes=(), channels=1, mean=(0.0,))
    by_kind = {(p.sample, p.kind): p.reason for p in report.problems}
    assert by_kind == {
        ("first", "channels"): "is in colour, the dataset is grey (1 channel)",
        ("first", "label"): "has the label 0, the dataset has no classes",
        ("x", "label"): "has the label 0, the dataset has no classes",
    }


def test_a_key_that_comes_twice_is_named_where_it_comes_again(tmp_path):
    report = checked(tmp_path, [*sample("x", 1), *sample("y", 2), *sample("x", 3)])
    assert [(p.index, p.sample, p.kind) for p in report.problems] == [(2, "x", "duplicate")]
    printed(report, r"x  has the key of sample 0: keys must be unique within a shard")


def test_tars_that_belong_to_nothing_are_named_and_need_no_quarantine(folder):
    shutil.copyfile(folder / SHARD, folder / "train-2.tar")
    report = write_quarantine(check(address(folder), STORAGE), STORAGE)
    assert [(p.shard, p.kind) for p in report.problems] == [("train-2.tar", "extra")]
    printed(report, r"train-2.tar  \(the shard\)  is not in dataset.json, so it is never read: remove it, or index it")
    assert report.quarantine is None
    assert not (folder / "quarantine.json").exists()


def test_a_shard_in_two_splits_is_named(folder):
    dataset = read_dataset(address(folder), STORAGE)
    redescribe(
        address(folder),
        dataset,
        splits={**dataset.splits, "test": (*dataset.shards("test"), dataset.shards("train")[0])},
    )
    report = check(address(folder), STORAGE)
    assert [(p.shard, p.kind) for p in report.problems] == [("train-0.tar", "duplicate")]
    printed(report, r"is listed 2 times in dataset.json, which lets splits overlap")


def test_a_sound_set_is_clean_and_read_to_its_last_byte(folder):
    seen = []
    report = check(
        address(folder), STORAGE, reading=TarReading(progress=lambda done, total: seen.append((done, total)))
    )
    assert report.problems == ()
    assert report.bytes == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert seen[-1][0] == seen[-1][1]
    printed(report, r"3 shards, 10 samples, 0.0 MiB read: every byte and every sample is as recorded")
    assert report.to_dict()["clean"] is True


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_found(folder, bit):
    """A property: wherever it is."""
    size = (folder / SHARD).stat().st_size
    for at in np.random.default_rng(bit).integers(0, size, 12).tolist():
        flip(folder, at, 1 << bit)
        assert (SHARD, None, "bytes") in found(folder), (at, bit)
        flip(folder, at, 1 << bit)
    assert found(folder) == []


def test_any_cut_is_found(folder):
    """A property: at whichever byte, and so at every border of a member."""
    whole = (folder / SHARD).read_bytes()
    for size in [*range(0, len(whole), 512), *np.random.default_rng(0).integers(0, len(whole), 20).tolist()]:
        (folder / SHARD).write_bytes(whole[:size])
        assert (SHARD, None, "truncated") in found(folder), size


def test_threads_do_not_change_the_findings(folder):
    cut(folder, 5000)
    (folder / "train-0.tar").unlink()
    one, eight = (TarReading(InThreads(threads)) for threads in (1, 8))
    assert found(folder, reading=one) == found(folder, reading=eight)


def test_a_quarantine_is_written_again_the_same_and_goes_when_all_is_well(folder):
    whole = (folder / SHARD).read_bytes()
    cut(folder, 5000)
    first = write_quarantine(check(address(folder), STORAGE), STORAGE)
    printed(first, r"quarantine.json covers them: 1 entry, digest [0-9a-f]{12}")
    again = check(address(folder), STORAGE)
    assert again.quarantine == first.quarantine
    assert again.problems == first.problems
    assert write_quarantine(again, STORAGE).quarantine.digest == first.quarantine.digest
    (folder / SHARD).write_bytes(whole)
    assert write_quarantine(check(address(folder), STORAGE), STORAGE).quarantine is None
    assert read_quarantine(address(folder), STORAGE) is None


def test_a_quarantine_that_readers_would_refuse_is_named_and_written_again(folder):
    for text, message in [
        ("{", r"quarantine.json  \(the shard\)  .*quarantine.json is damaged"),
        (Quarantine("f" * 64, ()).to_json(), r"is of dataset ffffffffffff, this one is [0-9a-f]{12}: write it again"),
    ]:
        (folder / "quarantine.json").write_text(text)
        report = check(address(folder), STORAGE)
        assert [p.kind for p in report.problems] == ["quarantine"]
        printed(report, message)
        assert write_quarantine(report, STORAGE).quarantine is None
        assert check(address(folder), STORAGE).problems == ()


def test_nothing_is_changed_without_the_option(folder):
    cut(folder, 5000)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    printed(check(address(folder), STORAGE), r"leave them out of training with `ddpm check file:///.*/ds --quarantine`")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_many_problems_are_shown_in_part_and_given_whole(folder):
    entries = [e for i in range(150) for e in sample(f"n{i:03d}")]
    (folder / SHARD).write_bytes(tar_bytes([e for e in entries if not e[0].endswith("cls")]))
    report = check(address(folder), STORAGE)
    printed(report, r"… and 55 more: --json has all of them")
    assert len(report.to_dict()["problems"]) == 155


def test_a_terminal_gets_a_table_and_keys_are_not_markup(folder):
    (folder / SHARD).write_bytes(tar_bytes([("[bold]x.png", b""), ("[bold]x.cls", b"0")]))
    screen = io.StringIO()
    checking.show(
        check(address(folder), STORAGE), Console(file=screen, force_terminal=True, width=200), lambda s, t: None
    )
    assert "[bold]x" in screen.getvalue()
    assert "┃" in screen.getvalue()


def test_without_a_description_there_is_nothing_to_check_against(tmp_path):
    with pytest.raises(
        DatasetError, match=r"dataset.json is missing\): write one with `ddpm ingest`, or .*`ddpm index"
    ):
        check(address(tmp_path), STORAGE)
