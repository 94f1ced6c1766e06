"""The fast way to pixels gives the pixels of the thorough one, whatever the file."""

import gc
import hashlib
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.conditioning import Conditioning
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.index import ShardInfo, index_tar, make_dataset
from pipelines.shards.ingest.encode import npy, pack_embeddings
from pipelines.shards.members import FlawError, decode_image, decode_pixels, unpack_embedding
from pipelines.shards.order import Located
from pipelines.shards.read import ShardReader
from pipelines.storage import Storage, layout
from tests.pipelines.shards.tars import tar_bytes

SIZE = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def file(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


ALPHA = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE), dtype=np.uint8))


def seen_through(kind, mode="RGB", **options):
    """A file with as many kinds of pixels as there are, from transparent to opaque."""
    image = Image.fromarray(PIXELS).convert(mode)
    image.putalpha(ALPHA)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return file("JPEG", exif=exif)


FILES = {
    "grey PNG": ("png", file("PNG", "L")),
    "RGB PNG": ("png", file("PNG")),
    "PNG with transparency": ("png", file("PNG", "RGBA")),
    "grey PNG with transparency": ("png", file("PNG", "LA")),
    "PNG with a palette": ("png", file("PNG", "P")),
    "PNG of one bit": ("png", file("PNG", "1")),
    "JPEG": ("jpg", file("JPEG", quality=95)),
    "JPEG with chroma subsampling": ("jpg", file("JPEG", quality=75, subsampling=2)),
    "progressive JPEG": ("jpg", file("JPEG", progressive=True)),
    "grey JPEG": ("jpg", file("JPEG", "L")),
    "JPEG in CMYK": ("jpg", file("JPEG", "CMYK")),
    "JPEG that EXIF says is turned": ("jpeg", turned()),
    "WebP without loss": ("webp", file("WEBP", lossless=True)),
    "WebP with transparency": ("webp", file("WEBP", "RGBA", lossless=True)),
    "PNG that is seen through": ("png", seen_through("PNG")),
    "grey PNG that is seen through": ("png", seen_through("PNG", "L")),
    "PNG with a transparent colour": ("png", file("PNG", transparency=tuple(PIXELS[0, 0].tolist()))),
    "PNG with a transparent grey": ("png", file("PNG", "L", transparency=200)),
    "PNG with a palette that is seen through": ("png", file("PNG", "P", transparency=bytes(range(256)))),
    "WebP that is seen through": ("webp", seen_through("WEBP", lossless=True, exact=True)),
    "WebP with loss that is seen through": ("webp", seen_through("WEBP")),
    "WebP with loss": ("webp", file("WEBP")),
    "array": ("npy", npy(PIXELS)),
    "grey array": ("npy", npy(PIXELS[..., 0])),
    "grey array with an axis": ("npy", npy(PIXELS[..., :1])),
    "array by columns": ("npy", npy(np.asfortranarray(PIXELS))),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_the_thorough_decoder(kind, channels):
    name, data = FILES[kind]
    expected = decode_image({name: data}, channels)
    found = decode_pixels({name: memoryview(data)}, SIZE, channels)
    assert found.shape == (SIZE, SIZE, channels)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_what_is_transparent_is_white_as_on_a_page(kind):
    name, data = FILES[f"{kind} that is seen through"]
    share = np.asarray(ALPHA, np.float64)[..., None] / 255
    expected = share * PIXELS + (1 - share) * 255
    assert np.abs(decode_image({name: data}) - expected).max() <= 1


def test_one_transparent_colour_is_white_and_all_others_stay():
    found = decode_image({"png": FILES["PNG with a transparent colour"][1]})
    assert (found[0, 0] == 255).all()
    np.testing.assert_array_equal(found.reshape(-1, 3)[1:], PIXELS.reshape(-1, 3)[1:])


@pytest.mark.parametrize(
    "members, message",
    [
        ({"png": FILES["RGB PNG"][1][:-30]}, "png cannot be decoded"),
        ({"png": b"\x89PNG"}, "is no PNG, JPEG or WebP"),
        ({"jpg": b"no image at all"}, "is no PNG, JPEG or WebP"),
        ({"npy": FILES["array"][1][:-5]}, "npy cannot be decoded"),
        ({"npy": npy(PIXELS.astype(np.float32))}, r"npy is float32 \[12, 12, 3\]: write uint8"),
        ({"txt": b"words"}, "has no image: a sample needs one of png"),
        ({"png": file("PNG"), "cls": b"1"}, "is 12x12, dataset.json says 9x9"),
    ],
)
def test_what_cannot_be_decoded_says_why(members, message):
    with pytest.raises(FlawError, match=message):
        decode_pixels(members, 9 if "cls" in members else SIZE, 3)


def test_an_embedding_comes_back_as_it_was_packed():
    cond = Conditioning(
        text=torch.randn(2, 3, 4), text_mask=torch.tensor([[True, True, False], [True] * 3]), pooled=torch.randn(2, 5)
    )
    pooled, text = unpack_embedding(memoryview(pack_embeddings(cond)[0]))
    np.testing.assert_array_equal(pooled, cond.pooled[0].half().numpy())
    np.testing.assert_array_equal(text, cond.text[0, :2].half().numpy())
    with pytest.raises(FlawError, match="has neither `pooled` nor `text`"):
        unpack_embedding(npy(np.zeros(3, np.float16)))
    with pytest.raises(FlawError, match=r"emb\.npy cannot be read"):
        unpack_embedding(b"")


def test_a_batch_has_the_text_where_it_is_asked_for(tmp_path):
    cond = Conditioning(
        text=torch.randn(2, 3, 4), text_mask=torch.tensor([[True, False, False], [True] * 3]), pooled=torch.randn(2, 5)
    )
    image = file("PNG")
    entries = [
        entry
        for i, packed in enumerate(pack_embeddings(cond))
        for entry in ((f"{i}.png", image), (f"{i}.txt", b"words"), (f"{i}.emb.npy", packed))
    ]
    data = tar_bytes(entries)
    shard = ShardInfo("train-0.tar", 2, len(data), hashlib.sha256(data).hexdigest())
    (tmp_path / shard.name).write_bytes(data)
    (tmp_path / layout.index_name(shard.name)).write_text(index_tar(tmp_path / shard.name).to_json())
    dataset = make_dataset(
        f"file://{tmp_path}", splits={"train": (shard,)}, classes=(), channels=3, image_size=SIZE, mean=(), std=()
    )
    located = Located(np.arange(2), np.zeros(2, np.int64), np.array([1, 0]))
    fetcher = ShardFetcher(dataset.uri, Storage(), None)
    batch = ShardReader(dataset, "train", fetcher, text=True).batch(located)
    assert batch.labels is None
    assert batch.text_mask.tolist() == [[True, True, True], [True, False, False]]
    torch.testing.assert_close(batch.pooled, cond.pooled[[1, 0]].half().float())
    torch.testing.assert_close(batch.text[0], cond.text[1].half().float())
    assert batch.text[1, 1:].abs().max() == 0
    plain = ShardReader(dataset, "train", fetcher).batch(located)
    assert (plain.text, plain.text_mask, plain.pooled) == (None, None, None)
    assert len(batch[:1]) == len(batch[:1].text) == 1


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (3, 5, 2)])
def test_arrays_come_back_as_they_were_written(order, shape):
    record = np.zeros((), [("pooled", "<f2", shape)])
    record["pooled"] = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(unpack_embedding(npy(record))[0], record["pooled"])
    buffer = io.BytesIO()
    pixels = np.asarray(PIXELS, order=order)
    np.save(buffer, pixels)
    assert np.array_equal(decode_image({"npy": buffer.getvalue()}), pixels)


def test_threads_read_arrays_while_garbage_is_collected():
    """CPython 3.11 counts how deep it parses for all threads together (see `_parse_npy_header`)."""

    def give_way(phase, info):
        time.sleep(1e-5)

    files = [npy(np.zeros((1, width, 1), np.uint8)) for width in range(1, 8001)]
    threshold = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            shapes = [image.shape for image in pool.map(lambda data: decode_image({"npy": data}), files)]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(give_way)
    assert shapes == [(1, width, 1) for width in range(1, 8001)]
