"""Tars as nobody should make them: each is refused by name, or read, and nothing is written elsewhere."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipelines.shards.audit.foreign import IndexRefusedError, index_tars
from pipelines.storage import Storage
from tests.pipelines.shards.tars import picture

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", **fields: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def sample(key: str, value: int = 0) -> list[Entry]:
    return [entry(f"{key}.png", picture(value)), entry(f"{key}.cls", b"0")]


def tar(entries: Iterable[Entry], kind: int = tarfile.USTAR_FORMAT, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, **options) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


def without_end(entries: Iterable[Entry]) -> bytes:
    """The members alone, behind which other bytes can follow."""
    buffer = io.BytesIO()
    for info, data in entries:
        buffer.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    return buffer.getvalue()


def promised(size: int, **fields: object) -> bytes:
    """A header whose member would have such a size."""
    info, _ = entry("b.png", **fields)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative() -> bytes:
    header = bytearray(promised(4))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


A = sample("a")
LINK, SYMLINK, PAX, GNU = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT
FILES = ["dataset.json", "s", "train-1.index.json", "train-1.tar"]
NO_IMAGE = "b: has no image: a sample needs one of png, jpg, jpeg, webp, npy; it has cls"
REFUSED: dict[str, tuple[bytes, str]] = {
    "a hard link": (
        tar([*A, entry("b.png", type=LINK, linkname="a.png"), entry("b.cls", b"0")]),
        "has only a link to 'a.png' as 'b.png', which readers skip, after the entry 'a.cls': write it with `tar",
    ),
    "a hard link that leads out": (
        tar([*A, entry("b.png", type=LINK, linkname="../../etc/passwd"), entry("b.cls", b"0")]),
        "has only a link to '../../etc/passwd' as 'b.png'",
    ),
    "a link that leads out": (
        tar([*A, entry("b.png", type=SYMLINK, linkname="/etc/passwd"), entry("b.cls", b"0")]),
        "has only a link to '/etc/passwd' as 'b.png', which readers skip, after the entry 'a.cls': write it with `tar",
    ),
    "a device": (tar([*A, entry("b.png", type=tarfile.CHRTYPE), entry("b.cls", b"0")]), NO_IMAGE),
    "a pipe": (tar([*A, entry("b.png", type=tarfile.FIFOTYPE), entry("b.cls", b"0")]), NO_IMAGE),
    "a member of 8 GiB in a file of 4 KiB": (
        without_end(A) + promised(8 << 30) + bytes(1024),
        "ends inside a member at byte 3,584, after the entry 'a.cls': write or copy it again",
    ),
    "a member of more bytes than there are": (
        without_end(A) + promised(10**20) + bytes(1024),
        "ends inside a member at byte 3,584, after the entry 'a.cls': write or copy it again",
    ),
    "a member of less than nothing": (without_end(A) + negative() + bytes(1024), "train-1.tar: "),
    "a long name of 8 GiB": (
        without_end(A) + promised(8 << 30, type=tarfile.GNUTYPE_LONGNAME) + bytes(1024),
        "train-1.tar: ends ",
    ),
    "a size of 99 GB in its extended header": (
        tar([*A, entry("b.png", picture(1), pax_headers={"size": "99999999999"}), entry("b.cls", b"0")], PAX),
        "ends inside a member at byte 10,240, after the entry 'a.cls'",
    ),
    "a size below nothing in its extended header": (
        tar([*A, entry("b.png", picture(1), pax_headers={"size": "-5"}), entry("b.cls", b"0")], PAX),
        "has a damaged header at byte 3,584, bad checksum, after the entry 'b.png': write or copy it again",
    ),
    "a size in words in its extended header": (
        tar([*A, entry("b.png", picture(1), pax_headers={"size": "many"}), entry("b.cls", b"0")], PAX),
        "has a damaged header at byte 3,584, bad checksum, after the entry 'b.png': write or copy it again",
    ),
    "another path in its extended header": (
        tar([*A, entry("b.png", picture(1), pax_headers={"path": "../../b.png"}), entry("b.cls", b"0")], PAX),
        "../../b: has no cls member, other samples of the dataset do",
    ),
    "a key twice": (tar([*A, *sample("b"), *A]), "a: has the key of sample 0: keys must be unique within a shard"),
    "a member twice": (tar([A[0], *A]), "a: has the member png twice, where WebDataset stops with an error"),
    "a member that is cut short": (without_end(A)[:700], "ends inside a member at byte 700"),
    "a header that is cut short": (without_end(A)[:1100], "ends inside a header that begins at byte 1,024"),
    "no bytes": (b"", "is empty, 0 bytes: write or copy it again"),
    "a zip": (b"PK\x03\x04" + bytes(600), "has a damaged header at byte 0, bad checksum: write or copy it again"),
    "a label of thousands of digits": (
        tar([*A, entry("b.png", picture(1)), entry("b.cls", b"9" * 5_000)]),
        "b: cls is '9999999999999999999999999999999999999999': write a class index, a whole number from 0 on",
    ),
    "a label that is half a class": (
        tar([*A, entry("b.png", picture(1)), entry("b.cls", b"1.5")]),
        "b: cls is '1.5': write a class index, a whole number from 0 on",
    ),
    "a text that is none": (tar([*A, entry("a.txt", b"\xff")]), "a: txt is not UTF-8: invalid start byte at byte 0"),
}
READ: dict[str, tuple[bytes, int]] = {
    "names from the root": (tar(sample("/etc/a")), 1),
    "names that lead out": (tar([*sample("../../a"), entry("..", b"x")]), 1),
    "folders": (tar([entry("x", type=tarfile.DIRTYPE), *sample("x/a")]), 1),
    "long names": (tar(sample("l" * 300), GNU), 1),
    "long names in extended headers": (tar(sample("é" * 90 + "/a"), PAX), 1),
    "a comment for all members": (tar(A, PAX, pax_headers={"comment": "made by hand"}), 1),
    "names that are not UTF-8": (tar(sample("zo\udce9"), encoding="utf-8", errors="surrogateescape"), 1),
    "a name of nothing": (tar([*A, entry("", b"x")]), 1),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tar_that_cannot_be_trained_on_is_refused_with_its_place(tmp_path, kind):
    data, message = REFUSED[kind]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "train-0.tar").write_bytes(tar(sample("z")))
    (tmp_path / "s" / "train-1.tar").write_bytes(data)
    with pytest.raises(IndexRefusedError) as refused:
        index_tars(f"file://{tmp_path}/s", Storage())
    assert message in str(refused.value)
    assert not (tmp_path / "s" / "dataset.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("kind", READ)
def test_odd_names_are_keys_and_no_places_on_the_disk(tmp_path, kind):
    data, count = READ[kind]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "train-1.tar").write_bytes(data)
    done = index_tars(f"file://{tmp_path}/s", Storage())
    assert done.dataset.samples("train") == count
    assert sorted(path.name for path in Path(tmp_path).rglob("*")) == FILES
