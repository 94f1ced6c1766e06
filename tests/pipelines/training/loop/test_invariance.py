"""The trace and the weights do not depend on who computes them, nor on what was killed in between."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ddpm.model import load_model
from pipelines.checkpoints import load_checkpoint
from tests.forked import FORKING, start_ranks
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    SMALL,
    last_checkpoint,
    process_group,
    run_ranks,
    tiny_config,
    trace,
    train_here,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]  # two cores, four ranks

BATCH = 25  # neither two ranks nor four can share it evenly
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3}
CELLS = [("fp64", parallel, parts) for parallel in ("ddp", "fsdp") for parts in (1, 4)]
CELLS += [("fp32", "ddp", 1), ("fp32", "fsdp", 4)]
AT_ONCE = [*SMALL, "optim.warmup_images=0"]


def cell_config(
    root: Path,
    world: int,
    steps: int,
    precision: str,
    parallel: str,
    parts: int,
    *overrides: str,
    network: str = "unet",
):
    """A run whose ranks go through their pieces in so many micro-batches."""
    piece = -(-BATCH // world)
    cut = [f"micro_batch_size={-(-piece // parts)}", f"cluster.parallel={parallel}", f"optim.precision={precision}"]
    return tiny_config(root, steps * BATCH, BATCH, *cut, "objective.timesteps=stratified", *overrides, network=network)


def run_group(world: int, tmp_path: Path, digits, runs) -> None:
    """The same runs one after the other on `world` processes, which are started once."""
    rendezvous = tmp_path / f"rendezvous-{world}-{time.monotonic_ns()}"
    start_ranks(run_ranks, (world, rendezvous, digits, runs), world)


def assert_same_traces(tmp_path: Path, digits, steps: int, on_four, *overrides: str) -> None:
    runs = {}
    cells = {1: [("fp64", "ddp", 1), ("fp64", "ddp", 4), ("fp32", "ddp", 1)], 2: CELLS, 4: on_four}
    for world in cells:
        for cell in cells[world]:
            folder = tmp_path / "-".join(map(str, (world, *cell)))
            runs[world, *cell] = (folder, cell_config(folder, world, steps, *cell, *overrides))
    for folder, config in (run for (world, *_), run in runs.items() if world == 1):
        train_here(folder, digits, config)
    for world in (2, 4):
        run_group(world, tmp_path, digits, [run for key, run in runs.items() if key[0] == world])
    for (world, precision, parallel, parts), (folder, _) in runs.items():
        reference = trace(runs[1, precision, "ddp", 1][0])
        found = trace(folder)
        assert len(found) == steps
        worst = max(abs(found[seen] / loss - 1) for seen, loss in reference.items())
        assert worst <= TOLERANCE[precision], (world, precision, parallel, parts, worst)


def test_every_step_has_the_same_loss_on_any_number_of_workers_ddp_or_fsdp_in_any_parts(digits, tmp_path):
    # On four ranks, which share two cores here, each way to share the work once; the long form has all of them.
    on_four = [("fp64", "ddp", 4), ("fp64", "fsdp", 1), ("fp32", "fsdp", 4)]
    assert_same_traces(tmp_path, digits, 6, on_four, *AT_ONCE)


METHODS = ["objective.timesteps=log_normal", "objective.weight=edm", "objective.learned_weight=true"]
METHODS += ["objective.noise_candidates=3", "optim.kind=muon", "optim.weight_decay=0.1", "objective.prediction=v"]


def test_a_learned_weight_chosen_noise_and_muon_have_the_same_losses_and_state_on_two_workers(digits, tmp_path):
    configs = {}
    for world, parallel, parts in ((1, "ddp", 1), (2, "ddp", 3), (2, "fsdp", 2)):
        folder = tmp_path / f"{world}-{parallel}"
        configs[folder] = cell_config(folder, world, 10, "fp64", parallel, parts, *AT_ONCE, *METHODS)
    one, *others = configs
    train_here(one, digits, configs[one])
    run_group(2, tmp_path, digits, [(folder, configs[folder]) for folder in others])
    reference, learned = trace(one), load_checkpoint(last_checkpoint(one))[1]
    assert learned["learned_weight.updates"] == 10
    assert any("momentum_buffer" in name for name in learned)
    for folder in others:
        found, same = trace(folder), load_checkpoint(last_checkpoint(folder))[1]
        assert max(abs(found[seen] / loss - 1) for seen, loss in reference.items()) <= TOLERANCE["fp64"]
        for name, tensor in learned.items():
            torch.testing.assert_close(same[name], tensor, rtol=1e-6, atol=1e-9, msg=f"{folder.name} {name}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_steps_on_digits_have_the_same_losses(digits, tmp_path):
    assert_same_traces(tmp_path, digits, 200, CELLS, "model.channels=[32,64]", "model.attention=[false,true]")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_compiled_network_on_two_ranks_has_the_same_losses(digits, tmp_path, parallel):
    config = cell_config(tmp_path / "one", 1, 6, "fp32", "ddp", 1, *AT_ONCE)
    train_here(tmp_path / "one", digits, config)
    compiled = cell_config(tmp_path / "two", 2, 6, "fp32", parallel, 2, *AT_ONCE, "cluster.compile=true")
    run_group(2, tmp_path, digits, [(tmp_path / "two", compiled)])
    reference, found = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert max(abs(found[seen] / loss - 1) for seen, loss in reference.items()) <= TOLERANCE["fp32"]


def killed_at_random(world: int, tmp_path: Path, folder: Path, digits, config) -> None:
    """Start a group, and end all of it by SIGKILL at a random step after its first checkpoint."""
    rendezvous = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    group = [
        FORKING.Process(target=run_ranks, args=(rank, world, rendezvous, digits, [(folder, config)]))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    stop_at = random.Random(os.getpid()).randint(5, 12)
    deadline = time.monotonic() + 120
    lines = 0
    while lines < stop_at and time.monotonic() < deadline:
        path = folder / "trace.jsonl"
        lines = path.read_text().count("\n") if path.exists() else 0
        assert all(process.is_alive() for process in group)
        time.sleep(0.002)
    for process in group:
        os.kill(process.pid, signal.SIGKILL)
    for process in group:
        process.join()
    assert 0 < lines < 20


FLOW = ["schedule=flow", "objective=jit", "sampler=heun", "sampler.time=flow", "optim.warmup_images=0", NO_GRIDS]
"""The training of a pixel transformer by flow matching."""


@pytest.mark.parametrize(
    "parallel, network, overrides", [("ddp", "unet", AT_ONCE), ("fsdp", "unet", AT_ONCE), ("fsdp", "jit", FLOW)]
)
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit_and_elsewhere_to_the_same_trace(
    digits, tmp_path, parallel, network, overrides
):
    cell = ("fp32", parallel, 1)
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    extra = [*overrides, "checkpoint.every=50", "optim.power_ema=[0.1]"]
    configs = {folder: cell_config(folder, 2, 20, *cell, *extra, network=network) for folder in (whole, same, other)}
    killed_at_random(2, tmp_path, same, digits, configs[same])
    killed_at_random(2, tmp_path, other, digits, configs[other])
    run_group(2, tmp_path, digits, [(whole, configs[whole]), (same, configs[same])])
    train_here(other, digits, configs[other])  # what two ranks had, perhaps in parts, one has now

    undisturbed, resumed = (load_checkpoint(last_checkpoint(folder))[1] for folder in (whole, same))
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in undisturbed.items())
    reference = trace(whole)
    assert trace(same) == reference
    found = trace(other)
    assert max(abs(found[seen] / loss - 1) for seen, loss in reference.items()) <= TOLERANCE["fp32"]


def until_step(rank: int, world: int, rendezvous: Path, digits, folder: Path, config, steps: int | None) -> None:
    with process_group(rank, world, rendezvous):
        train_here(folder, digits, config, rank, world, **({} if steps is None else {"stop_after": steps}))


MESHES: list[tuple[int, list[str]]] = [
    (4, ["cluster.parallel=hsdp", "cluster.shard_size=2"]),
    (3, ["cluster.parallel=fsdp"]),
    (1, []),
    (2, ["cluster.parallel=fsdp"]),
    (2, ["cluster.parallel=hsdp", "cluster.shard_size=1"]),
    (2, ["cluster.parallel=ddp"]),
]
"""Numbers of ranks and what the network is on them, in an order in which a checkpoint of each is read by the next."""


def goes_through(tmp_path: Path, digits, meshes, precision: str, *overrides: str, network: str = "unet"):
    """Train a few steps on each mesh, which goes on from the checkpoint of the one before, and the same on one rank.

    Returns:
        The folders of both, and by how much their losses differ at most.
    """
    each = 4
    folder, one = tmp_path / "many", tmp_path / "one"
    for at, (world, mesh) in enumerate(meshes):
        chosen = [precision, "ddp", 1, *overrides, *mesh]
        config = cell_config(folder, world, each * len(meshes), *chosen, network=network)
        steps = None if at == len(meshes) - 1 else each
        start_ranks(until_step, (world, tmp_path / f"rendezvous-{at}", digits, folder, config, steps), world)
    alone = cell_config(one, 1, each * len(meshes), precision, "ddp", 1, *overrides, network=network)
    train_here(one, digits, alone)
    return folder, one, difference(folder, one)


def difference(folder: Path, one: Path) -> float:
    """The largest relative difference of two traces."""
    reference, found = trace(one), trace(folder)
    assert found.keys() == reference.keys()
    return max(abs(found[seen] / loss - 1) for seen, loss in reference.items())


def assert_goes_through(tmp_path: Path, digits, meshes, precision: str, *overrides: str) -> None:
    folder, one, worst = goes_through(tmp_path, digits, meshes, precision, *overrides)
    print(f"{precision}: losses differ by at most {worst:.1e}")
    assert worst <= TOLERANCE[precision]
    if precision != "fp64":  # an optimizer divides by moments, which are rounding alone where a gradient is 0
        return
    tensors, same = (load_checkpoint(last_checkpoint(place))[1] for place in (one, folder))
    for name, tensor in tensors.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "meshes", [MESHES[:3], [MESHES[5], MESHES[1]]], ids=["replicated and sharded to fewer", "whole to sharded"]
)
def test_a_checkpoint_of_any_mesh_goes_on_on_any_other(digits, tmp_path, meshes):
    assert_goes_through(tmp_path, digits, meshes, "fp64", *AT_ONCE, "optim.power_ema=[0.1]")


def test_a_pixel_transformer_by_flow_matching_has_the_same_losses_on_any_mesh(digits, tmp_path):
    meshes = [MESHES[0], MESHES[1], MESHES[5], MESHES[2]]
    *_, worst = goes_through(tmp_path, digits, meshes, "fp32", *FLOW, "optim.lr=1e-4", network="jit")
    print(f"fp32: losses differ by at most {worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("harm", ["a bit is turned", "a part of another step is in its place"])
def test_of_a_sharded_checkpoint_that_is_damaged_the_one_before_is_taken(digits, tmp_path, harm):
    folder, overrides = (
        tmp_path / "r",
        [*AT_ONCE, f"checkpoint.every={4 * BATCH}", "checkpoint.keep=3", "batch_size=25"],
    )
    sharded = cell_config(folder, 2, 20, "fp64", "fsdp", 1, *overrides)
    start_ranks(until_step, (2, tmp_path / "rendezvous-0", digits, folder, sharded, 12), 2)
    older, before, newest = sorted((folder / "runs" / "digits").glob("checkpoint_*"))
    part = newest / "part-00001.safetensors"
    data = bytearray(part.read_bytes())
    if harm == "a bit is turned":
        data[-1] ^= 1
    else:
        data = bytearray((before / part.name).read_bytes())
    assert len(data) == part.stat().st_size  # nothing shows but the digests
    part.write_bytes(data)
    start_ranks(until_step, (2, tmp_path / "rendezvous-1", digits, folder, sharded, None), 2)
    lines = [json.loads(line)[0] for line in (folder / "trace.jsonl").read_text().splitlines()]
    first, second = range(BATCH, 13 * BATCH, BATCH), range(9 * BATCH, 21 * BATCH, BATCH)
    assert lines == [*first, first[-1], *second, second[-1]]  # an attempt says at its end where it is
    assert len(trace(folder)) == 20  # steps that were computed twice have the same losses
    assert not newest.exists()
    assert older.name < before.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("kind", [["optim.power_ema=[0.1]"], METHODS], ids=["adamw", "muon"])
def test_a_run_goes_through_all_meshes_with_all_that_a_state_can_have(digits, tmp_path, kind, precision):
    assert_goes_through(tmp_path, digits, [*MESHES, *reversed(MESHES)], precision, *AT_ONCE, *kind)


def draw(folder: Path) -> torch.Tensor:
    (published,) = (folder / "runs" / "digits" / "published").iterdir()
    return load_model(published).generate(torch.arange(8), seed=1)


LARGE = ["model.width=512", "model.depth=8", "model.heads=8", "model.checkpointing=true"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [["optim.power_ema=[0.1]"], METHODS], ids=["adamw", "muon"])
def test_38_million_parameters_go_through_all_meshes_to_the_same_losses_averages_and_samples(digits, tmp_path, kind):
    small_steps = [*LARGE, "optim.warmup_images=0", "optim.lr=1e-4", NO_GRIDS, *kind]
    folder, one, worst = goes_through(tmp_path, digits, MESHES, "fp32", *small_steps, network="dit")
    averages, same = (load_checkpoint(last_checkpoint(place))[1] for place in (one, folder))
    ema = max((same[n] - t).abs().max().item() for n, t in averages.items() if n.startswith("ema."))
    images = (draw(folder) - draw(one)).abs().max().item()
    print(f"fp32: losses differ by at most {worst:.1e}, averages by {ema:.1e}, samples by {images:.1e}")
    assert worst <= 1e-6
    assert ema <= 1e-4
    assert images <= 1e-3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_in_bf16_meshes_differ_as_much_as_the_order_of_sums_does_on_one_rank(digits, tmp_path):
    small_steps = [*LARGE, "optim.warmup_images=0", "optim.lr=1e-4", NO_GRIDS]
    _, one, worst = goes_through(tmp_path, digits, MESHES, "bf16", *small_steps, network="dit")
    parts = tmp_path / "parts"
    train_here(parts, digits, cell_config(parts, 1, 24, "bf16", "ddp", 4, *small_steps, network="dit"))
    order = difference(parts, one)
    print(f"bf16: losses differ by at most {worst:.1e} on other meshes, by {order:.1e} in four micro-batches")
    assert worst <= 3 * order
    assert worst <= 2e-2
