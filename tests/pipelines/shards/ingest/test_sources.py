import os
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.report import Names
from pipelines.shards.ingest.sources import absolute, source_digest
from pipelines.storage import Storage, StorageError
from tests.pipelines.shards.ingest.sources import (
    Bucket,
    every_kind,
    jsonl,
    opened,
    parse_table,
    pictures,
    write_files,
    write_zip,
)

STORAGE = Storage()
KINDS = [
    *(plain := ["class folders", "imagefolder", "imagefolder, csv", "zip", "zip, stored, with a top folder"]),
    *(others := ["zip of an imagefolder", "csv", "jsonl"]),
    *(f"s3, {kind}" for kind in [*plain, *others]),
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return every_kind(root, pictures()), Bucket(root=str(root))


def content(source, storage):
    return [(i.split, i.label, i.caption, i.origin, i.read(storage)) for i in source.images]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_lists_the_same_pictures_in_the_same_order(kinds, kind):
    sources, storage = kinds
    source = opened(sources[kind], storage)
    expected = opened(sources["class folders"], storage)
    assert content(source, storage) == content(expected, storage)
    assert source.classes == ("cat", "dog", "owl")
    assert {i.origin: i.read(storage) for i in source.images} == pictures()
    assert not source.bad
    assert pickle.loads(pickle.dumps(source)) == source


def test_the_shares_of_the_splits_follow_the_fraction_and_grow_with_it(kinds):
    sources, storage = kinds
    tested = [
        {i.origin for i in opened(sources["zip"], storage, fraction).images if i.split == "test"}
        for fraction in (0.1, 0.3, 0.6)
    ]
    assert tested[0] < tested[1] < tested[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_of_a_source_changes_with_its_files_and_not_else(tmp_path, kind):
    files = pictures(3)
    location = every_kind(tmp_path, files)[kind]
    storage = Bucket(root=str(tmp_path))
    before = source_digest(location, storage)
    assert source_digest(location, storage) == before
    changed = bytearray(files["cat/00.png"])
    changed[-20] ^= 1
    every_kind(tmp_path, {**files, "cat/00.png": bytes(changed)})  # as many bytes as before
    assert source_digest(location, storage) != before


def test_images_without_folders_have_no_labels(tmp_path):
    files = {"a.png": b"1", "b.jpg": b"2", "notes.txt": b"3"}
    source = opened(str(write_files(tmp_path / "loose", files)), STORAGE)
    assert (source.classes, {image.label for image in source.images}) == ((), {None})
    divided = {"train/a.png": b"1", "test/b.png": b"2"}
    source = opened(str(write_files(tmp_path / "divided", divided)), STORAGE)
    assert {(image.split, image.label) for image in source.images} == {("train", None), ("test", None)}


def test_class_folders_are_labels_beside_metadata_that_has_none(tmp_path):
    files = pictures(3)
    rows = [{"file_name": name, "text": f"number {i}"} for i, name in enumerate(files)]
    missing = {"file_name": "missing.png", "text": "x"}
    described = write_files(tmp_path / "described", {**files, "metadata.jsonl": jsonl([*rows, missing])})
    source = opened(str(described), STORAGE)
    assert source.classes == ("cat", "dog", "owl")
    assert {(image.origin.partition("/")[0], image.label) for image in source.images} == set(
        zip(source.classes, range(3), strict=True)
    )
    assert source.captioned
    assert [bad.reason for bad in source.bad] == ["missing.png: no such file"]
    for layout in ("{}", "images/{}", "a/b/{}"):
        flat = {layout.format(name.replace("/", "-")): data for name, data in files.items()}
        rows = [{"file_name": name, "text": "x"} for name in flat]
        other = write_files(tmp_path / layout[:2].strip("{"), {**flat, "metadata.jsonl": jsonl(rows)})
        assert opened(str(other), STORAGE).classes == ()


@pytest.mark.parametrize("test", ["test", "validation", "val"])
def test_given_splits_are_kept_whatever_the_second_is_called(tmp_path, test):
    files = {"train/cat/a.png": b"1", "train/dog/b.png": b"2", f"{test}/cat/c.png": b"3", "extra/x.png": b"4"}
    source = opened(str(write_files(tmp_path / "divided", files)), STORAGE)
    assert {(i.split, i.label, i.origin) for i in source.images} == {
        ("train", 0, "train/cat/a.png"),
        ("train", 1, "train/dog/b.png"),
        ("test", 0, f"{test}/cat/c.png"),
    }
    assert source.unused == {f"outside train/ and {test}/": Names.of("extra/x.png")}
    rows = [{"file_name": name.partition("/")[2], "text": "x"} for name in files if name[0] in "tv"]
    described = {"train/metadata.jsonl": jsonl(rows[:2]), f"{test}/metadata.jsonl": jsonl(rows[2:])}
    source = opened(str(write_files(tmp_path / "divided", described)), STORAGE)
    assert {(i.split, i.origin) for i in source.images} == {
        ("train" if n.startswith("train/") else "test", n) for n in list(files)[:3]
    }
    assert source.classes == ("cat", "dog")


def test_a_lone_train_folder_is_no_class(tmp_path):
    files = {f"train/{c}/{i}.png": b"" for c in ("cat", "dog") for i in range(30)}
    source = opened(str(write_files(tmp_path / "one", files)), STORAGE, 0.5)
    assert source.classes == ("cat", "dog")
    assert {i.split for i in source.images} == {"train", "test"}


def test_class_folders_that_are_links_are_followed_and_loops_are_not(tmp_path):
    root = write_files(tmp_path / "links", {"cat/a.png": b"1"})
    elsewhere = write_files(tmp_path / "elsewhere", {"b.png": b"2"})
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "again").symlink_to(root)
    source = opened(str(root), STORAGE)
    assert {i.origin for i in source.images} == {"cat/a.png", "dog/b.png"}


@pytest.mark.parametrize("described", [False, True])
def test_what_holds_no_bytes_is_counted_and_not_opened(tmp_path, described):
    root = write_files(tmp_path / "photos", {"cat/a.png": b"", "dog/b.png": b""})
    if described:
        write_files(root, {"metadata.jsonl": jsonl([{"path": "cat/a.png"}, {"path": "dog/b.png"}])})
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "cat" / "round.png").symlink_to(root / "cat" / "round.png")
    os.mkfifo(root / "dog" / "pipe.png")
    os.mkfifo(root / ".pipe")
    source = opened(str(root), STORAGE)
    assert sorted(i.origin for i in source.images) == ["cat/a.png", "dog/b.png"]
    assert source.unused == {
        "a link that leads nowhere, a pipe, a socket or a device": Names.of(
            "cat/gone.png", "cat/round.png", "dog/pipe.png"
        )
    }


@pytest.mark.parametrize("top", ["", "train/"])
def test_images_that_are_deeper_than_their_class_folder_are_told(tmp_path, top):
    names = ["cat/a.png", "cat/wild/b.png", "cat/wild/big/c.png", "dog/d.png", "dog/notes/e.txt"]
    root = write_files(tmp_path / "photos", {f"{top}{name}": b"" for name in names})
    source = opened(str(root), STORAGE)
    assert source.classes == ("cat", "dog")
    assert source.deeper == Names.of(f"{top}cat/wild/b.png", f"{top}cat/wild/big/c.png")


def test_images_without_classes_are_in_no_class_folder(tmp_path):
    described = {"metadata.jsonl": jsonl([{"path": "a/b/c.png"}, {"path": "a/b/d/e.png"}])}
    root = write_files(tmp_path / "photos", {"a/b/c.png": b"", "a/b/d/e.png": b"", **described})
    assert opened(str(root), STORAGE).deeper == Names()


def test_links_between_folders_end_where_they_lead_back(tmp_path):
    root = write_files(tmp_path / "links", {"a/1.png": b"1", "b/2.png": b"2"})
    (root / "a" / "more").symlink_to("../b")
    (root / "b" / "more").symlink_to("../a")
    elsewhere = write_files(tmp_path / "elsewhere", {"deep/3.png": b"3"})
    (root / "c").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(root)
    source = opened(str(root), STORAGE)
    assert sorted(i.origin for i in source.images) == [
        "a/1.png",
        "a/more/2.png",
        "b/2.png",
        "b/more/1.png",
        "c/deep/3.png",
    ]


def test_what_a_system_keeps_among_the_pictures_is_left_out_unread(tmp_path, monkeypatch):
    files = {
        "cat/a.png": b"1",
        "cat/@eaDir/a.png/small.png": b"2",
        "$RECYCLE.BIN/old.png": b"3",
        "lost+found/4.png": b"4",
    }
    root = write_files(tmp_path / "disk", files)
    listed, scandir = [], os.scandir

    def listing(path):
        if not isinstance(path, int):  # as for the deletion of temporary folders
            listed.append(os.path.basename(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    assert [i.origin for i in opened(str(root), STORAGE).images] == ["cat/a.png"]
    assert {name for name in listed if not name.startswith("ddpm-")} == {"disk", "cat"}


@pytest.mark.parametrize("closed", ["dog", "."])
def test_a_folder_that_cannot_be_listed_is_named_and_nothing_is_made_without_it(tmp_path, monkeypatch, closed):
    root = write_files(tmp_path / "photos", {"cat/a.png": b"1", "dog/b.png": b"2"})
    folder, listed = os.path.normpath(root / closed), os.scandir

    def scandir(path="."):
        if not isinstance(path, int) and os.fspath(path) == folder:
            raise PermissionError(13, "Permission denied", folder)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match=f"^{folder} cannot be read .Permission denied.*chmod u.rX"):
        opened(str(root), STORAGE)


def test_a_file_in_a_folder_that_can_be_listed_and_not_entered_is_not_left_out_silently(tmp_path, monkeypatch):
    root = write_files(tmp_path / "photos", {"cat/a.png": b"1", "dog/b.png": b"2"})
    (root / "dog" / "nowhere.png").symlink_to("missing.png")
    assert len(opened(str(root), STORAGE).images) == 2
    status = Path.stat

    def refused(path, **options):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    for source in (root, write_files(root, {"list.csv": "path\ncat/a.png\ndog/b.png\n"}) / "list.csv"):
        with pytest.raises(DatasetError, match=r"dog/b.png cannot be read .Permission denied"):
            opened(str(source), STORAGE)


def test_a_name_that_is_not_utf_8_is_shown_by_its_bytes_and_the_file_is_read(tmp_path):
    root = os.fsencode(write_files(tmp_path / "photos", {"cat/a.png": b"1"}))
    os.mkdir(root + b"/zo\xe9")
    with open(root + b"/zo\xe9/\xff.png", "wb") as file:
        file.write(b"2")
    source = opened(os.fsdecode(root), STORAGE)
    assert source.classes == ("cat", "zo\\xe9")
    assert {i.origin: i.read(STORAGE) for i in source.images} == {"cat/a.png": b"1", "zo\\xe9/\\xff.png": b"2"}
    below = os.fsdecode(root + b"/zo\xe9")
    assert [i.origin for i in opened(below, STORAGE).images] == ["\\xff.png"]
    assert source_digest(below) != source_digest(os.fsdecode(root))
    with pytest.raises(DatasetError, match=r"photos/zo\\xe9 is not UTF-8: rename it"):
        absolute(below)
    assert absolute(os.fsdecode(root)) == os.fsdecode(root)


def test_captions_labels_and_splits_come_from_the_columns(tmp_path):
    rows = [
        {"file_name": "a.png", "text": " a cat ", "label": 2, "split": "train"},
        {"file_name": "b.png", "caption": "a dog", "label": 0, "split": "test", "mood": "glad"},
        {"file_name": "./sub/../c.png", "label": 0, "split": "test", "text": None},
    ]
    root = write_files(
        tmp_path / "t", {"metadata.jsonl": jsonl(rows), "a.png": b"", "b.png": b"", "c.png": b"", "d.png": b""}
    )
    source = opened(str(root), STORAGE)
    assert source.classes == ("0", "1", "2")
    found = {i.origin: (i.split, i.label, i.caption) for i in source.images}
    assert found == {"a.png": ("train", 2, "a cat"), "b.png": ("test", 0, "a dog"), "c.png": ("test", 0, None)}
    assert source.captioned
    assert source.unused == {
        "columns that nothing reads": Names.of("mood"),
        "not named by a good row of the metadata": Names.of("d.png"),
    }


def test_a_table_may_name_files_anywhere(tmp_path):
    write_files(tmp_path, {"far/a.png": b"1", "here/near/b.png": b"2", "store/c.png": b"3"})
    table = f"path\n{tmp_path}/far/a.png\nnear/b.png\n../far/a.png\ns3://bucket/c.png\ns3://bucket/none.png\n"
    write_files(tmp_path / "here", {"list.csv": table})
    storage = Bucket(root=str(tmp_path / "store"))
    source = opened(str(tmp_path / "here" / "list.csv"), storage)
    images = {i.origin: i for i in source.images}
    assert images.pop("s3://bucket/none.png").stamp == ""
    assert sorted(i.read(storage) for i in images.values()) == [b"1", b"1", b"2", b"3"]


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1).filter(str.strip))
def test_any_caption_survives_both_kinds_of_table(text):
    import csv
    import io

    out = io.StringIO(newline="")
    csv.writer(out).writerows([["path", "caption"], ["a.png", text]])
    for name, data in (("m.csv", out.getvalue()), ("m.jsonl", jsonl([{"path": "a.png", "caption": text}]))):
        table = parse_table(name, data.encode())
        assert [row.caption for row in table.rows] == [text.strip()]
        assert not table.bad


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"file_name": "a.png"', "m.jsonl:2: is not JSON"),
        ('["a.png"]', "m.jsonl:2: is not a JSON object but"),
        ("[" * 100_000, "m.jsonl:2: is not JSON: maximum recursion depth exceeded"),
        ('{"a":' * 100_000, "m.jsonl:2: is not JSON: maximum recursion depth exceeded"),
        ('{"file_name": "a.png", "label": ' + "9" * 5_000 + "}", "m.jsonl:2: is not JSON: Exceeds the limit"),
        ('{"file_name": "a.png", "label": " "}', "a.png has an empty label: write the name of its class"),
        ('{"text": "x"}', "m.jsonl:2: has no path in file_name or path"),
        ('{"file_name": 7}', "m.jsonl:2: has no path"),
        ('{"file_name": "a.png", "text": ["x"]}', "which is not a text"),
        ('{"file_name": "a.png", "label": 1.5}', "labels are class names, or class indices from 0"),
        ('{"file_name": "a.png", "label": true}', "labels are class names"),
        ('{"file_name": "a.png", "label": -1}', "class indices start at 0"),
        ('{"file_name": "a.png", "split": "dev"}', "splits are train and test"),
        ('{"file_name": "\\ud800.png"}', r"has the path '\ud800.png', of which a part is no character"),
        ('{"file_name": "a.png", "text": "half \\udc9c"}', r"has the caption 'half \udc9c'"),
        ('{"file_name": "a.png", "label": "\\udfff"}', r"has the label '\udfff'"),
        ('{"file_name": "https://x/a.png"}', "addresses are s3://BUCKET/KEY or file:///PATH"),
    ],
)
def test_an_unreadable_row_is_named_with_its_reason_and_the_others_count(line, reason):
    table = parse_table("m.jsonl", b'{"file_name": "first.png"}\n' + line.encode() + b'\n\n{"file_name": "last.png"}\n')
    assert [row.path for row in table.rows] == ["first.png", "last.png"]
    assert [f"{bad.origin}: {bad.reason}".find(reason) >= 0 for bad in table.bad] == [True]


@pytest.mark.parametrize(
    "rows, reason",
    [
        (
            [{"path": "cat/00.png"}, {"path": "./cat/00.png"}],
            "metadata.jsonl:2: repeats cat/00.png of metadata.jsonl:1",
        ),
        ([{"path": "cat/00.png"}, {"path": "cat/99.png"}], "metadata.jsonl:2: cat/99.png: no such file"),
        ([{"path": "cat/00.png"}, {"path": "../out.png"}], "../out.png: no such file"),
        ([{"path": "cat/00.png", "label": "a"}, {"path": "dog/00.png"}], "dog/00.png has no label while other rows"),
    ],
)
def test_rows_that_do_not_fit_their_source_are_named(tmp_path, rows, reason):
    root = write_files(tmp_path / "photos", {**pictures(2), "metadata.jsonl": jsonl(rows)})
    write_files(tmp_path, {"out.png": b""})
    source = opened(str(root), STORAGE)
    assert [i.origin for i in source.images] == ["cat/00.png"]
    assert [reason in f"{bad.origin}: {bad.reason}" for bad in source.bad] == [True]


@pytest.mark.parametrize("labels", [[0, 1, "a"], ["a", 1, 0], ["cat", 3], ["1", 2, "b"]])
def test_numbers_and_names_as_labels_of_one_source_are_refused_by_one_of_each(tmp_path, labels):
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    root = write_files(tmp_path / "t", {"metadata.jsonl": jsonl(rows), **{row["file_name"]: b"" for row in rows}})
    message = r"jsonl:\d has the label \d, a class index, and metadata.jsonl:\d has '[a-z]+', a class name: write"
    with pytest.raises(DatasetError, match=message):
        opened(str(root), STORAGE)


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([0, "1", 2], ("0", "1", "2")),
        (["0", "1", "a"], ("0", "1", "a")),  # as texts they may be names, of handwritten letters and digits, say
        (["b", "a", "b"], ("a", "b")),
        (["cat", " cat", "dog "], ("cat", "dog")),
    ],
)
def test_labels_of_one_kind_are_taken(tmp_path, labels, classes):
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    root = write_files(tmp_path / "t", {"metadata.jsonl": jsonl(rows), **{row["file_name"]: b"" for row in rows}})
    assert opened(str(root), STORAGE).classes == classes


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_entries_of_a_zip_are_named(tmp_path):
    path = write_zip(tmp_path / "z.zip", {"cat/a.png": b"a" * 100, "dog/b.png": b"b" * 100, "dog/c.png": b"c" * 100})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("cat/a.png", b"again")
        archive.writestr("cat/bz.png", b"1")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    data[entries["dog/b.png"].header_offset + 30 + len("dog/b.png")] ^= 255
    data[entries["dog/c.png"].header_offset] ^= 255
    path.write_bytes(data)
    source = opened(str(path), STORAGE)
    assert [(b.origin, b.reason) for b in source.bad] == [("cat/a.png", "a second entry of this name in the zip")]
    reasons = {}
    for image in source.images:
        try:
            image.read(STORAGE)
        except UnreadableError as error:
            reasons[image.origin] = str(error)
    assert "the zip is damaged" in reasons.pop("dog/b.png")
    assert "directory points to no file" in reasons.pop("dog/c.png")
    assert "compressed by method 12" in reasons.pop("cat/bz.png")
    assert not reasons


def test_names_of_a_zip_that_begin_with_a_slash_are_those_without_it(tmp_path):
    files = {"/abs/cat/a.png": b"a", "/abs/dog/b.png": b"b"}
    source = opened(str(write_zip(tmp_path / "z.zip", files)), STORAGE)
    assert source.classes == ("cat", "dog")
    assert {image.origin: image.read(STORAGE) for image in source.images} == {"cat/a.png": b"a", "dog/b.png": b"b"}


def test_names_of_a_zip_that_lead_out_of_it_or_nowhere_are_left_out(tmp_path):
    out = {"../a.png": b"1", "cat/../../b.png": b"2", "/../c.png": b"3"}
    path = write_zip(tmp_path / "z.zip", {**out, "/": b"", "photos/cat/a.png": b"5", "photos/dog/b.png": b"6"})
    source = opened(str(path), STORAGE)
    assert [bad.origin for bad in source.bad] == list(out)
    assert all("has .. in its name" in bad.reason for bad in source.bad)
    assert {image.origin: image.read(STORAGE) for image in source.images} == {"cat/a.png": b"5", "dog/b.png": b"6"}


@pytest.mark.parametrize("system, classes", [(0, ("cat", "dog")), (3, ())])
def test_backslashes_are_slashes_in_a_zip_of_windows_and_letters_in_others(tmp_path, system, classes):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("photos\\cat\\a.png", "photos\\dog\\b.png"):
            entry = zipfile.ZipInfo(name)
            entry.create_system = system
            archive.writestr(entry, b"")
    source = opened(str(tmp_path / "z.zip"), STORAGE)
    assert source.classes == classes
    assert len(source.images) == 2


def test_what_is_larger_than_any_picture_is_not_unpacked(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "z.zip", {"cat/a.png": b"\0" * 3_000_000, "cat/b.png": b"b"})
    monkeypatch.setattr("pipelines.shards.ingest.readers.LARGEST", 1 << 20)
    images = {image.origin: image for image in opened(str(path), STORAGE).images}
    with pytest.raises(UnreadableError, match=r"holds 0\.0 GiB, where a picture has at most"):
        images["cat/a.png"].read(STORAGE)
    assert images["cat/b.png"].read(STORAGE) == b"b"


def test_a_zip_with_anything_in_front_is_read(tmp_path):
    path = write_zip(tmp_path / "z.zip", {"cat/a.png": b"abc"})
    path.write_bytes(b"#!/bin/sh\nexec true\n" + path.read_bytes())
    assert [i.read(STORAGE) for i in opened(str(path), STORAGE).images] == [b"abc"]


@pytest.mark.parametrize(
    "files, name, message",
    [
        ({}, "nowhere", "nowhere is not a folder; a source is `digits`"),
        ({}, "nowhere.zip", "nowhere.zip does not exist; a source is"),
        ({}, "nowhere.csv", "nowhere.csv does not exist; a source is"),
        ({"photos.tar": b""}, "photos.tar", "photos.tar holds no sample: is empty, 0 bytes: write or copy it again"),
        ({"photos.rar": b""}, "photos.rar", "photos.rar is not a folder; a source is"),
        ({"z.zip": b"PK nothing"}, "z.zip", "z.zip is not a readable zip"),
        ({"p/notes.txt": b""}, "p", "p has no images; expected"),
        ({"l.csv": "file,label\na.png,1\n"}, "l.csv", "l.csv has the columns file, label; it needs `path`"),
        ({"l.csv": b""}, "l.csv", "l.csv has the columns nothing; it needs `path`"),
        ({"l.csv": "path\n"}, "l.csv", "l.csv has no row: give it a row with `path` for each image"),
        ({"l.jsonl": "\n\n"}, "l.jsonl", "l.jsonl has no row"),
        ({"l.csv": "path;label\na.png;cat\n"}, "l.csv", "l.csv has the columns path;label; it needs `path`"),
        ({"l.csv": "path,label,label\na.png,cat,dog\n"}, "l.csv", "l.csv has the column label 2 times: one is enough"),
        ({"l.csv": "path\na.png\n".encode("utf-16")}, "l.csv", "l.csv is not UTF-8 .byte 0.: save it as UTF-8"),
        ({"l.csv": "path,text\na.png," + "x" * 200_000}, "l.csv", "l.csv, after line 1: field larger than field limit"),
        ({"l.csv": b"path\n\xff\xfe\n"}, "l.csv", "l.csv is not UTF-8 .byte 5.: save it as UTF-8"),
        ({"l.csv": 'path\n"a"b.png\n'}, "l.csv", "l.csv, after line 1: .* correct the quotes"),
        (
            {"l.csv": "path,label\na,0\nb,5000000\n"},
            "l.csv",
            "class indices up to 5,000,000, but only 2 of them are used",
        ),
        ({"l.csv": f"path,label\na,0\nb,{'9' * 5000}\n"}, "l.csv", "the label 9{18}… is too long for a class index"),
    ],
)
def test_sources_that_cannot_be_are_refused_with_the_way_out(tmp_path, files, name, message):
    write_files(tmp_path, files)
    with pytest.raises(DatasetError, match=message):
        opened(str(tmp_path / name), STORAGE)


def test_addresses_and_fractions_are_checked(tmp_path):
    with pytest.raises(StorageError, match="addresses are s3://BUCKET/KEY or file:///PATH"):
        opened("https://host/photos.zip", STORAGE)
    with pytest.raises(DatasetError, match="nothing is stored under s3://bucket/none"):
        opened("s3://bucket/none", Bucket(root=str(tmp_path)))
    with pytest.raises(DatasetError, match="the test fraction must be between 0 and 1, got 1"):
        opened(str(tmp_path), STORAGE, 1.0)


def test_a_csv_row_with_another_number_of_fields_is_named(tmp_path):
    table = parse_table("l.csv", b"path,caption\na.png,hello, world\nb.png\nc.png,\n")
    assert [(row.path, row.caption) for row in table.rows] == [("c.png", None)]
    assert [(b.origin, b.reason[:19]) for b in table.bad] == [(f"l.csv:{n}", "has not 2 fields as") for n in (2, 3)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_left_out(tmp_path):
    root = write_files(tmp_path / "p", {"cat/a.png": b""})
    (root / "cat" / "a.png").chmod(0)
    with pytest.raises(UnreadableError, match="Permission denied"):
        opened(str(root), STORAGE).images.first(1)[0].read(STORAGE)
