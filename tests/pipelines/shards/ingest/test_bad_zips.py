"""Zips that are damaged, or made to do harm: good pictures are read, and what cannot be read of others is named."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.storage import Storage
from tests.pipelines.shards.ingest.sources import opened

STORAGE = Storage()
GOOD = {"cat/a.png": b"a" * 100, "dog/b.png": b"b" * 100}
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def changed(files: dict[str, bytes], at: int, value: bytes) -> bytes:
    """A zip whose directory says something else of its first entry, at a place of the format."""
    data = bytearray(packed(files))
    begin = data.find(CENTRAL) + at
    data[begin : begin + len(value)] = value
    return bytes(data)


def encrypted(files: dict[str, bytes]) -> bytes:
    data = bytearray(changed(files, 8, b"\x01"))
    data[data.find(LOCAL) + 6] |= 1
    return bytes(data)


def link(target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("cat/x.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, target)
        for name, data in GOOD.items():
            archive.writestr(name, data)
    return buffer.getvalue()


X = {"cat/x.png": b"x" * 100, **GOOD}
BOMB = {"cat/x.png": bytes(1 << 25), **GOOD}
LEFT_OUT: dict[str, tuple[bytes, str]] = {
    "a password": (encrypted(X), "is encrypted: make the zip without a password"),
    "4 GiB in a hundred bytes": (changed(X, 24, b"\xf0\xff\xff\xff"), "holds 4.0 GiB, where a picture has at most 1"),
    "2 GiB packed": (changed(X, 20, b"\xff\xff\xff\x7f"), "holds 2.0 GiB, where a picture has at most 1"),
    "32 MiB that are said to be 100 bytes": (
        changed(BOMB, 24, struct.pack("<I", 100)),
        "does not have the checksum that the zip records: the zip is damaged",
    ),
    "bytes that are said to be more": (
        changed(X, 24, struct.pack("<I", 10_000)),
        "does not have the checksum that the zip records: the zip is damaged",
    ),
    "another checksum": (changed(X, 16, b"\0\0\0\0"), "does not have the checksum that the zip records"),
    "a place behind the end": (changed(X, 42, b"\xf0\xff\xff\x7f"), "the zip's directory points to no file"),
    "a place within another file": (changed(X, 42, b"\x03\0\0\0"), "the zip's directory points to no file"),
    "LZMA": (changed(X, 10, b"\x0e\0"), "is compressed by method 14: make the zip again, stored or deflated"),
    "a method that is none": (changed(X, 10, b"\x63\0"), "is compressed by method 99: make the zip again, stored or"),
    "a stream that is none": (changed({"cat/x.png": b"", **GOOD}, 24, b"\x09\0\0\0"), "the zip is damaged"),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "is not a readable zip (File is not a zip file): make it again, or copy it whole"),
    "a text": (b"hello", "is not a readable zip (File is not a zip file): make it again, or copy it whole"),
    "half a zip": (packed(GOOD)[:200], "is not a readable zip (File is not a zip file): make it again, or copy it"),
    "nothing in it": (packed({}), "has no images; expected"),
    "only what leads out": (packed({"../a.png": b"", "../b.png": b""}), "has no images; expected"),
    "metadata behind a password": (encrypted({"metadata.jsonl": b"{}", **GOOD}), "metadata.jsonl: is encrypted"),
    "metadata of 4 GiB": (
        changed({"metadata.jsonl": b"{}", **GOOD}, 24, b"\xf0\xff\xff\xff"),
        "metadata.jsonl: holds 4.0 GiB",
    ),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_an_entry_that_cannot_be_read_is_named_and_the_others_are_read(tmp_path, kind):
    data, reason = LEFT_OUT[kind]
    (tmp_path / "in.zip").write_bytes(data)
    read = {image.origin: image.read for image in opened(str(tmp_path / "in.zip"), STORAGE).images}
    with pytest.raises(UnreadableError) as raised:
        read.pop("cat/x.png")(STORAGE)
    assert reason in str(raised.value)
    assert {name: read_one(STORAGE) for name, read_one in read.items()} == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["in.zip"]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_zip_without_anything_to_read_is_refused(tmp_path, kind):
    data, message = REFUSED[kind]
    (tmp_path / "in.zip").write_bytes(data)
    with pytest.raises(DatasetError) as raised:
        opened(str(tmp_path / "in.zip"), STORAGE)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_link_in_a_zip_is_the_text_that_it_holds_and_leads_nowhere(tmp_path):
    (tmp_path / "in.zip").write_bytes(link("/etc/passwd"))
    images = {image.origin: image for image in opened(str(tmp_path / "in.zip"), STORAGE).images}
    assert images["cat/x.png"].read(STORAGE) == b"/etc/passwd"
