"""A network that is sharded over Ray's workers, whose checkpoints are in parts on S3."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from ddpm.tensor_files import read_weights
from pipelines.checkpoints import CheckpointState, complete_checkpoints, load_checkpoint, publish, published
from pipelines.checkpoints.parts import joined_stream
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.networks import TINY_UNET

pytestmark = pytest.mark.integration
RUN = "s3://ddpm/runs/sharded"
SETTINGS = [
    "+experiment=digits", "name=sharded", "data.uri=s3://ddpm/datasets/sharded", *TINY_UNET, "batch_size=64",
    "optim.decay=constant", "checkpoint.every=640", "tracking.grid_every=null", "sampler.steps=2",
]  # fmt: skip


def newest(s3: Storage) -> tuple[str, CheckpointState]:
    listed, state = complete_checkpoints(s3, RUN)[0]
    return f"{RUN}/{listed.name}", state


def test_a_sharded_run_stores_parts_goes_on_from_them_and_its_model_is_drawn_from(shell, s3, tmp_path, monkeypatch):
    ingest("digits", "s3://ddpm/datasets/sharded", s3, image_size=8, channels=1, shard_samples=600)
    # One worker begins with the whole network, and two go on with parts.
    shell.ok("train", *SETTINGS, "cluster.num_workers=1", "images=640", "--json")
    assert "training.safetensors" in newest(s3)[1].files
    sharded = ["cluster.parallel=hsdp", "cluster.shard_size=2", "cluster.num_workers=2"]
    done = shell.ok("train", *SETTINGS, *sharded, "images=1280", "--json").answer
    uri, state = newest(s3)
    assert {"part-00000.safetensors", "part-00001.safetensors", "parts.json", "model.json"} <= state.files.keys()
    assert (state.images_seen, state.optimizer_steps) == (1280, 20)
    assert abs(state.sizes["part-00000.safetensors"] / state.sizes["part-00001.safetensors"] - 1) < 0.2

    # The published copy has the averages, whole; the model that is drawn from is the same.
    s3.download_folder(uri, tmp_path / "parts")
    average = {n.removeprefix("ema."): t for n, t in load_checkpoint(tmp_path / "parts")[1].items() if n[:4] == "ema."}
    s3.download_folder(f"{RUN}/published/{uri.rsplit('/', 1)[1].removeprefix('checkpoint_')}", tmp_path / "published")
    whole = load_file(tmp_path / "published" / "model.safetensors")
    assert whole.keys() == average.keys()
    assert all((whole[name] == tensor).all() for name, tensor in average.items())
    drawn = []
    for model, folder in ((f"runs:/{done['run_id']}", "run"), (str(tmp_path / "published"), "folder")):
        shell.ok("sample", model, "--count", "4", "--seed", "1", "--out", str(tmp_path / folder), "--json")
        (grid,) = (tmp_path / folder).glob("grid*.png")
        drawn.append(np.asarray(Image.open(grid)))
    assert np.array_equal(*drawn)

    # A large one is in several files.
    monkeypatch.setattr(published, "LARGEST_FILE", 100_000)
    publish(s3, uri, "s3://ddpm/several", state)
    s3.download_folder("s3://ddpm/several", tmp_path / "several")
    assert (tmp_path / "several" / "model.safetensors.index.json").is_file()
    found = read_weights(tmp_path / "several", "model.safetensors")
    assert found.keys() == average.keys()
    assert all((found[name] == tensor).all() for name, tensor in average.items())


def test_a_stream_is_stored_on_s3_in_pieces_that_make_up_the_whole(s3: Storage):
    data = os.urandom(20 * 2**20 + 1)
    buffers = [data[at : at + 700_001] for at in range(0, len(data), 700_001)]
    s3.upload_stream(lambda: joined_stream(buffers), "s3://ddpm/streams/x")
    assert s3.read("s3://ddpm/streams/x") == data
