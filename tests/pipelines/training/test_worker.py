"""The rank loop under plain torch.distributed: the trace does not depend on who computes it."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ddpm.interop import load_model
from pipelines.config import Config, compose
from pipelines.shards.index import Dataset
from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from pipelines.training import worker
from pipelines.training.shell import Job
from pipelines.training.worker import learning_rate

STEPS, BATCH = 6, 25  # two ranks cannot share 25 images evenly


class MemoryTracker:
    """Stands where MLflow would: the loop's own numbers are what is tested here."""

    run_id = "test"

    def metric(self, key):
        return []

    def metrics(self, values, step):
        pass

    def image(self, key, pixels, step):
        pass

    def text(self, text, name):
        pass


class FolderShell:
    """Checkpoints in a folder, a loss trace in a file, a stop after so many steps."""

    def __init__(self, folder: Path, rank: int, stop_after: int | None) -> None:
        self.folder, self.rank, self.stop_after = folder, rank, stop_after
        self.losses: list[float] = []

    @contextmanager
    def restored(self):
        yield self.folder / "checkpoint" if (self.folder / "checkpoint").exists() else None

    def save(self, store, metrics):
        if store is not None:
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
            store(f"file://{self.folder}/checkpoint")
        if dist.is_initialized():
            dist.barrier()

    def flush(self):
        pass

    def progress(self, progress):
        self.losses.append(progress.loss)

    def checkpoint_requested(self):
        return False

    def stop_requested(self):
        return self.stop_after is not None and len(self.losses) >= self.stop_after - 1


def config_for(root: Path, *overrides: str) -> Config:
    tiny = ["model.channels=[32]", "model.attention=[true]", "model.layers_per_block=1", "optim.precision=fp32"]
    tiny += [
        f"images={STEPS * BATCH}",
        f"batch_size={BATCH}",
        "data.lanes=5",
        "checkpoint.every=100000",
        "tracking.grid_every=100000",
    ]
    tiny += ["storage=file", f"storage.root=file://{root}", f"data.cache_dir={root}/cache", "sampler.steps=2"]
    return compose(["+experiment=digits", *tiny, "tracking.grid_rows=1", *overrides])


def run_rank(rank: int, world: int, folder: Path, dataset: Dataset, config: Config, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    shell = FolderShell(folder, rank, stop_after)
    job = Job(config, dataset, Storage(), MemoryTracker(), {})  # type: ignore[arg-type]
    worker.train(job, shell, rank=rank, world_size=world, device=torch.device("cpu"))
    if rank == 0:
        path = folder / "losses.json"
        before = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps(before + shell.losses))
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    uri = f"file://{tmp_path_factory.mktemp('data')}/digits"
    return ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=128).dataset


def run(folder: Path, dataset: Dataset, *overrides: str, world: int = 1, stop_after: int | None = None):
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    arguments = (world, folder, dataset, config_for(folder, *overrides), stop_after)
    if world == 1:
        run_rank(0, *arguments)
    else:
        mp.spawn(run_rank, arguments, nprocs=world)
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.integration
def test_the_loss_trace_does_not_depend_on_the_number_of_workers_or_micro_batches(dataset, tmp_path):
    one = run(tmp_path / "one", dataset)
    accumulated = run(tmp_path / "micro", dataset, "micro_batch_size=7")
    two = run(tmp_path / "two", dataset, "micro_batch_size=4", world=2)
    assert len(one) == STEPS
    torch.testing.assert_close(torch.tensor(accumulated), torch.tensor(one), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "objective",
    [
        ["objective=hybrid", "model.learned_variance=true", "objective.timesteps=stratified"],
        ["objective=min_snr", "schedule.zero_terminal_snr=true"],
        ["objective.loss=vlb"],
    ],
    ids=["hybrid", "min_snr", "vlb"],
)
def test_every_objective_trains_with_a_trace_that_is_the_same_in_parts(dataset, tmp_path, objective):
    whole = run(tmp_path / "whole", dataset, *objective)
    parts = run(tmp_path / "micro", dataset, "micro_batch_size=7", *objective)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-3, atol=0)
    model = load_model(tmp_path / "whole" / "checkpoint")
    assert model.spec.shape == (1, 8, 8)
    assert model.generate(torch.tensor([3])).shape == (1, 1, 8, 8)


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(dataset, tmp_path):
    whole = run(tmp_path / "whole", dataset)
    first = run(tmp_path / "parts", dataset, stop_after=3)
    assert len(first) == 3
    both = run(tmp_path / "parts", dataset)
    assert both == whole
    for name in ("model.safetensors", "training.safetensors"):
        one, other = [(tmp_path / run_ / "checkpoint" / name).read_bytes() for run_ in ("whole", "parts")]
        assert one == other
    state = json.loads((tmp_path / "parts" / "checkpoint" / "state.json").read_text())
    assert (state["images_seen"], state["optimizer_steps"]) == (STEPS * BATCH, STEPS)
    assert (tmp_path / "parts" / "runs" / "digits" / "published" / f"{STEPS * BATCH:012d}" / "state.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(dataset, tmp_path):
    with pytest.raises(FloatingPointError, match=r"samples \d+\.\.\d+ of the stream"):
        run(tmp_path / "nan", dataset, "optim.lr=1e30", "optim.grad_clip=null", "optim.warmup_images=0")


def test_the_learning_rate_warms_up_and_decays_by_images_seen():
    optim = compose(["+experiment=digits", "optim.warmup_images=1000", "optim.lr=1.0"]).optim
    assert learning_rate(optim, 0, 10_000) == pytest.approx(0.001)
    assert learning_rate(optim, 499, 10_000) == pytest.approx(0.5 * (1 - 499 / 10_000))
    assert learning_rate(optim, 5_000, 10_000) == pytest.approx(0.5)
    assert learning_rate(optim, 10_000, 10_000) == pytest.approx(0.02)
    constant = optim.model_copy(update={"decay": "constant"})
    assert learning_rate(constant, 9_999, 10_000) == 1.0
    cosine = optim.model_copy(update={"decay": "cosine"})
    assert learning_rate(cosine, 5_000, 10_000) == pytest.approx(0.5)
