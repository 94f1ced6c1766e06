"""Tensors in parts: what some ranks have written, any others read by ranges, and nothing damaged is taken."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm.diffusers import export_diffusers, import_diffusers
from ddpm.model import load_model, save_model
from ddpm.tensor_files import read_weights
from pipelines.checkpoints import (
    ModelError,
    fetch_published,
    load_checkpoint,
    parts,
    publish,
    published,
    reconstruct_average,
    record_published,
    sharded,
    verify_checkpoint,
)
from pipelines.checkpoints.parts import Part, PartsIndex, TensorRows
from pipelines.checkpoints.sharded import Assembled, read_index, read_rows, read_tensors
from pipelines.config import compose
from pipelines.served_model import DiffusionModel
from pipelines.storage import Storage, layout
from tests.pipelines.checkpoints import tiny
from tests.pipelines.checkpoints.tiny import a_checkpoint
from tests.pipelines.training.loop.ranks import MemoryTracker

STORAGE = Storage()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 96)


def some_tensors(seed: int) -> dict[str, Tensor]:
    """Tensors of all kinds of shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)
    found: dict[str, Tensor] = {"scalar": torch.tensor(float(seed)), "none": torch.zeros(0, 3)}
    for i in range(12):
        shape = [choose.randint(1, 9) for _ in range(choose.randint(1, 3))]
        dtype = choose.choice([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
        found[f"t{i}"] = (100 * torch.rand(shape, generator=generator)).to(dtype)
    return found


def pieces(tensors: dict[str, Tensor], world: int, rank: int) -> list[TensorRows]:
    """The rows of a rank of FSDP2; what cannot be cut belongs to rank 0."""
    found = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not shape or not shape[0]:
            found += [TensorRows(name, shape, 0, tensor)] if rank == 0 else []
            continue
        each = -(-shape[0] // world)
        first = min(rank * each, shape[0])
        if first < shape[0]:
            found.append(TensorRows(name, shape, first, tensor[first : first + each].clone()))
    return found


def store(folder: Path, tensors: dict[str, Tensor], world: int) -> tuple[PartsIndex, dict[str, str], dict[str, int]]:
    """Write the parts of so many ranks and their index; return it with the digests and sizes of all files."""
    folder.mkdir(parents=True, exist_ok=True)
    indices = []
    for rank in range(world):
        chunks = [chunk for rows in pieces(tensors, world, rank) for chunk in rows.chunks()]
        part = Part.of(rank, chunks)
        STORAGE.upload_stream(part.stream, f"file://{folder}/{layout.part_file(rank)}")
        assert (folder / layout.part_file(rank)).stat().st_size == part.size
        indices.append(PartsIndex.from_json(part.index.to_json(), "here"))
    index = PartsIndex.joined(indices, "here")
    (folder / layout.PARTS_INDEX).write_bytes(index.to_json())
    paths = list(folder.iterdir())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return index, digests, {path.name: path.stat().st_size for path in paths}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_any_number_of_ranks_has_written_any_other_number_reads(tmp_path, seed, world):
    tensors = some_tensors(seed)
    index, digests, _ = store(tmp_path, tensors, world)
    assert read_index(STORAGE, f"file://{tmp_path}", digests) == index
    assert equal(read_tensors(STORAGE, f"file://{tmp_path}", index), tensors)
    for readers in (1, 2, 4, 5):
        for rank in range(readers):
            wanted = pieces(tensors, readers, rank)
            held = [replace(rows, values=torch.full_like(rows.values, 7)) for rows in wanted]
            read_rows(STORAGE, f"file://{tmp_path}", index, held)
            assert all(torch.equal(a.values, b.values) for a, b in zip(held, wanted, strict=True))


def test_every_part_is_a_safetensors_file_of_its_chunks(tmp_path):
    tensors = some_tensors(3)
    store(tmp_path, tensors, 3)
    for rank in range(3):
        there = load_file(tmp_path / layout.part_file(rank))
        chunks = [chunk for rows in pieces(tensors, 3, rank) for chunk in rows.chunks()]
        assert equal(there, {f"{chunk.name}@{chunk.first}": chunk.values for chunk in chunks})


def test_a_reader_fetches_the_chunks_that_it_needs_and_neighbours_together(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(100, 8), "b": torch.randn(100, 8)}  # 3 rows of 32 bytes a chunk
    index, *_ = store(tmp_path, tensors, 1)
    fetched = []
    fetch = Storage.fetch

    def noted(self, uri, start, stop, sink):
        fetched.append((start, stop))
        return fetch(self, uri, start, stop, sink)

    monkeypatch.setattr(Storage, "fetch", noted)
    rows = TensorRows("a", (100, 8), 10, torch.zeros(7, 8))  # rows 10 to 16 are in the chunks of 9 to 17
    assert read_rows(STORAGE, f"file://{tmp_path}", index, [rows]) == 9 * 32
    assert len(fetched) == 1
    assert torch.equal(rows.values, tensors["a"][10:17])
    fetched.clear()
    monkeypatch.setattr(sharded, "REQUEST_BYTES", 10 * 96)
    assert read_rows(STORAGE, f"file://{tmp_path}", index, [TensorRows("a", (100, 8), 0, torch.zeros(100, 8))]) == 3200
    assert len(fetched) == 4


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "swapped"])
def test_a_damaged_part_is_refused_by_name(tmp_path, harm):
    tensors, other = some_tensors(1), some_tensors(1)
    other["t0"] = other["t0"] + 1
    index, *_ = store(tmp_path / "c", tensors, 2)
    store(tmp_path / "other", other, 2)
    chunk = index.tensors["t0"].chunks[0]
    path = tmp_path / "c" / layout.part_file(chunk.part)
    data = bytearray(path.read_bytes())
    if harm == "bit":
        data[chunk.start] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[: chunk.stop - 1])
    elif harm == "swapped":
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    else:
        path.unlink()
    said = f"{path.name} is (damaged: the SHA-256 of rows .* of t0|missing or cut short)"
    with pytest.raises(ModelError, match=said):
        read_tensors(STORAGE, f"file://{tmp_path}/c", index)


def test_parts_that_do_not_make_up_a_whole_are_refused():
    one, two = (Part.of(0, [TensorRows("a", (4, 2), first, torch.zeros(2, 2))]).index for first in (0, 2))
    assert PartsIndex.joined([two, one], "here").tensors["a"].is_whole()
    for indices in ([one], [two], [one, one], [one, two, two]):
        with pytest.raises(ModelError, match="do not hold every row of a exactly once"):
            PartsIndex.joined(indices, "here")
    with pytest.raises(ModelError, match="disagree on the shape of a"):
        PartsIndex.joined([one, Part.of(1, [TensorRows("a", (4, 3), 2, torch.zeros(2, 3))]).index], "here")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"index_version": 1}', b'{"index_version": 2, "tensors": {}}'])
def test_a_damaged_index_or_one_of_another_version_is_refused(text):
    with pytest.raises(ModelError, match=r"damaged|version 2 of the index"):
        PartsIndex.from_json(text, "here")


def test_an_index_that_is_another_than_recorded_or_names_foreign_parts_is_refused(tmp_path):
    _, digests, _ = store(tmp_path, some_tensors(0), 2)
    fewer = {name: digest for name, digest in digests.items() if name != layout.part_file(1)}
    with pytest.raises(ModelError, match=r"names part-00001\.safetensors, which state\.json does not"):
        read_index(STORAGE, f"file://{tmp_path}", fewer)
    path = tmp_path / layout.PARTS_INDEX
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"parts\.json is damaged"):
        read_index(STORAGE, f"file://{tmp_path}", digests)


def a_sharded_checkpoint(folder: Path, world: int, images_seen: int = 100):
    """Store a tiny checkpoint in parts, and return it with its state."""
    checkpoint = a_checkpoint(images_seen, power=True)
    _, digests, sizes = store(folder, dict(checkpoint.tensors), world)
    text = checkpoint.spec.to_json().encode()
    (folder / layout.MODEL).write_bytes(text)
    state = checkpoint.state(
        {**digests, layout.MODEL: hashlib.sha256(text).hexdigest()}, {**sizes, layout.MODEL: len(text)}
    )
    (folder / layout.TRAINING_STATE).write_text(state.to_json())
    return checkpoint, state


def test_a_sharded_checkpoint_is_loaded_like_any_other_and_earlier_releases_refuse_it(tmp_path):
    checkpoint, state = a_sharded_checkpoint(tmp_path, 3)
    found, tensors = load_checkpoint(tmp_path)
    assert found == state
    assert equal(tensors, dict(checkpoint.tensors))
    assert '"checkpoint_version": 3' in (tmp_path / layout.TRAINING_STATE).read_text()


def test_a_published_copy_has_the_averages_in_the_files_that_a_whole_network_is_saved_in(tmp_path):
    checkpoint, state = a_sharded_checkpoint(tmp_path / "c", 3)
    published = publish(STORAGE, f"file://{tmp_path}/c", f"file://{tmp_path}/p", state)
    weights = {n.removeprefix("ema."): t for n, t in checkpoint.tensors.items() if n.startswith("ema.")}
    save_model(tmp_path / "whole", checkpoint.spec, weights)
    for name in (layout.MODEL, layout.WEIGHTS):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    power = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("power.")}
    assert equal(load_file(tmp_path / "p" / layout.POWER_EMA), power)
    assert verify_checkpoint(tmp_path / "p").images_seen == published.images_seen == 100
    assert not any(path.name.startswith("part") for path in (tmp_path / "p").iterdir())


def test_a_file_that_is_assembled_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 2**20)
    tensors = {f"t{i}": torch.randn(1024, 1024) for i in range(8)}
    index, *_ = store(tmp_path, tensors, 2)
    alive, most = 0, 0
    fetch = sharded._Request.fetch

    def counted(self, storage, folder):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return fetch(self, storage, folder)

    def consumed(stream, target):
        nonlocal alive
        while data := stream.read(2**20):
            alive = max(0, alive - len(data) // 2**20)

    monkeypatch.setattr(sharded._Request, "fetch", counted)
    monkeypatch.setattr(Storage, "upload_stream", lambda self, start, uri: consumed(start(), uri))
    digest, size = Assembled(STORAGE, f"file://{tmp_path}", index, {name: name for name in tensors}).upload("file:///x")
    assert size > 32 * 2**20
    assert len(digest) == 64
    assert most <= sharded.REQUESTS_AT_ONCE + 3


def test_a_large_published_copy_is_in_several_files_and_is_the_same_model_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "CONFIG", compose(["+experiment=digits", "optim.power_ema=[0.05,0.1]"]))
    monkeypatch.setattr(published, "LARGEST_FILE", 2000)
    checkpoint, state = a_sharded_checkpoint(tmp_path / "c", 3)
    copy, tracker = publish(STORAGE, f"file://{tmp_path}/c", f"file://{tmp_path}/p", state), MemoryTracker()
    record_published(tracker, copy)

    # All files and both indexes are in the state, whose digest is that of the record.
    there = verify_checkpoint(tmp_path / "p")
    assert {p.name for p in (tmp_path / "p").iterdir()} == {*there.files, layout.TRAINING_STATE}
    assert {"model.safetensors.index.json", "power_ema.safetensors.index.json"} < there.files.keys()
    assert {name: (tmp_path / "p" / name).stat().st_size for name in there.sizes} == there.sizes
    average = {n.removeprefix("ema."): t for n, t in checkpoint.tensors.items() if n.startswith("ema.")}
    save_model(tmp_path / "whole", checkpoint.spec, average, 2000)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "p" / path.name).read_bytes() == path.read_bytes()

    # What is fetched is what the state names, checked; the averages of any width are in it.
    (tmp_path / "fetched").mkdir()
    state = fetch_published(copy, STORAGE, tmp_path / "fetched", layout.MODEL, layout.WEIGHTS)
    assert state == there
    assert {p.name for p in (tmp_path / "fetched").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert equal(read_weights(tmp_path / "fetched", layout.WEIGHTS), average)
    power = {n.removeprefix("power.1."): t for n, t in checkpoint.tensors.items() if n.startswith("power.1.")}
    found = reconstruct_average(tracker, STORAGE, checkpoint.identity["optim.power_ema"][1])
    assert all(torch.equal(found[name], tensor) for name, tensor in power.items())

    # It draws, serves and exports what the model in one file does.
    save_model(tmp_path / "one", checkpoint.spec, average)
    labels = torch.tensor([0, 7])
    drawn = [load_model(tmp_path / name).generate(labels, seed=3) for name in ("one", "fetched")]
    assert torch.equal(*drawn)
    pyfunc, served = DiffusionModel(), []
    for name in ("one", "fetched"):
        pyfunc.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / name)}))
        served.append(pyfunc.predict(None, pandas.DataFrame({"label": [1], "seed": [5]})))
    assert (served[0] == served[1]).all()
    export_diffusers(load_model(tmp_path / "fetched"), tmp_path / "d", 2000)
    assert (tmp_path / "d" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert equal(import_diffusers(tmp_path / "d").network.state_dict(), average)

    lost = min((tmp_path / "p").glob("model-*"))
    lost.write_bytes(b"")
    with pytest.raises(ModelError, match=rf"{lost.name} is not the file that was published"):
        fetch_published(copy, STORAGE, tmp_path / "fetched", layout.MODEL, layout.WEIGHTS)
