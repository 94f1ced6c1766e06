import json
import math
from collections import Counter

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.checkpoints import parts
from pipelines.config import compose
from pipelines.shards.read import Batch
from pipelines.training.loop.collectives import (
    all_gather_pieces,
    broadcast,
    copies_on_cpu,
    held_rows,
    on_whole,
    written_rows,
)
from pipelines.training.loop.parallel import micro_batches, shard_size
from pipelines.training.loop.state import make_network, make_state
from tests.forked import start_ranks
from tests.pipelines.training.loop.ranks import TINY, process_group, tiny_config, train_here


def piece(count):
    return Batch(torch.arange(count), torch.arange(count * 4.0).reshape(count, 1, 2, 2), torch.arange(count) % 3)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("at_most", [None, 1, 2, 5, 100])
def test_every_rank_has_as_many_parts_which_hold_its_samples_once(world, at_most):
    size = 25
    counts = set()
    for rank in range(world):
        count = size // world + (rank < size % world)
        parts = list(micro_batches(piece(count), size, world, at_most))
        counts.add(len(parts))
        kept = [part.ordinals for part, weight, _ in parts if weight == 1]
        assert torch.equal(torch.cat(kept), torch.arange(count))
        assert all(len(part) > 0 and weight in (0, 1) for part, weight, _ in parts)
        assert max(map(len, kept)) - min(map(len, kept)) <= 1
        assert max(map(len, kept)) <= (at_most or size)
        assert [last for *_, last in parts] == [False] * (len(parts) - 1) + [True]
    assert len(counts) == 1


@pytest.mark.parametrize(
    "world, wanted, size", [(8, 4, 4), (8, 1, 1), (8, 3, 4), (6, 4, 6), (7, 2, 7), (4, 8, 4), (12, 5, 6)]
)
def test_a_copy_is_sharded_over_as_many_ranks_as_wanted_or_the_fewest_more_that_divide_all(world, wanted, size):
    assert shard_size(world, wanted) == size


def test_copies_for_a_checkpoint_are_contiguous_and_broadcast_ones_overwrite_in_place():
    live = {"a": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), "b": torch.tensor(3.0)}
    copies = copies_on_cpu(live)
    assert all(torch.equal(copies[name], tensor) and copies[name].is_contiguous() for name, tensor in live.items())
    live["a"].zero_()
    assert copies["a"].abs().sum() > 0
    a = live["a"]
    broadcast(copies, live, torch.device("cpu"))
    assert torch.equal(a, copies["a"])


@pytest.mark.parametrize("choice", [["task=denoiser"], ["task=classifier"], *TINY.values()])
def test_every_network_names_units_for_fsdp_that_it_has(choice):
    network = make_network(compose(["+experiment=digits", *choice, "model.text_dim=0"]))
    units = [module for module in network.modules() if isinstance(module, network.fsdp_units)]
    covered = {id(p) for unit in units for p in unit.parameters()}
    assert len(covered) > len(list(network.parameters())) / 2


MESHES = [(2,), (3,), (2, 2)]


def mesh_of(shape):
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names), [*[Replicate()] * (len(shape) - 1), Shard(0)]


def write_rows(rank, world, rendezvous, shape, folder):
    whole = {str(s): torch.arange(1.0, 1 + torch.Size(s).numel()).reshape(s) for s in [(3,), (1, 4), (4, 2), (7, 2, 3)]}
    with process_group(rank, world, rendezvous):
        mesh, placements = mesh_of(shape)
        parts = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}
        state = parts | {"scalar": torch.tensor(2.0), "replicated": torch.arange(5)}
        written = written_rows(state)
        for rows in written:
            of = whole.get(rows.name, state[rows.name])
            assert torch.equal(rows.values, of[rows.first : rows.first + len(rows)] if rows.shape else of)
        torch.save([(rows.name, rows.first, len(rows)) for rows in written], folder / f"{rank}.pt")
        for rows in held_rows(parts):  # views: what is written there is in the tensor
            rows.values.zero_()
        assert all(not part.to_local().any() for part in parts.values())


@pytest.mark.integration
@pytest.mark.parametrize("shape", MESHES)
def test_every_row_is_written_by_one_rank_and_replicas_share_the_writing(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 8)
    world = math.prod(shape)
    start_ranks(write_rows, (world, tmp_path / "rendezvous", shape, tmp_path), world)
    written = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    counts = Counter(
        (name, row) for rank in written for name, first, rows in rank for row in range(first, first + rows)
    )
    assert set(counts.values()) == {1}
    assert len(counts) == 3 + 1 + 4 + 7 + 1 + 5
    assert all(written)


def divide_wholes(rank, world, rendezvous, shape):
    whole = {s: torch.arange(1.0, 1 + torch.Size(s).numel()).reshape(s) for s in [(1, 4), (7, 2, 3)]}
    with process_group(rank, world, rendezvous):
        mesh, placements = mesh_of(shape)
        for tensor in whole.values():
            found = on_whole(lambda x: x / x.sum(), distribute_tensor(tensor, mesh, placements))
            assert torch.equal(found.to_local(), distribute_tensor(tensor / tensor.sum(), mesh, placements).to_local())  # type: ignore[attr-defined]
            assert found.shape == tensor.shape
            assert torch.equal(on_whole(lambda x: x / x.sum(), tensor), tensor / tensor.sum())


@pytest.mark.integration
@pytest.mark.parametrize("shape", MESHES)
def test_every_rank_keeps_its_part_of_a_function_of_the_whole(tmp_path, shape):
    world = math.prod(shape)
    start_ranks(divide_wholes, (world, tmp_path / "rendezvous", shape), world)


def gather_pieces(rank, world, rendezvous):
    with process_group(rank, world, rendezvous):
        for total in (world, 7):
            rows = torch.arange(2.0 * total).reshape(total, 2)
            assert torch.equal(all_gather_pieces(rows.tensor_split(world)[rank], total), rows)


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gathers_pieces_that_differ_by_a_row(tmp_path, world):
    start_ranks(gather_pieces, (world, tmp_path / "rendezvous"), world)


class Collectives(TorchDispatchMode):
    """Collects the names of the collectives that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(of, DTensor) for of in types):
            return NotImplemented  # comes back as what it does with the parts
        if function.namespace in ("c10d", "_c10d_functional"):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def collect_collectives(rank, rendezvous, dataset, folder, config):
    with process_group(rank, 2, rendezvous), Collectives() as collectives:
        train_here(folder, dataset, config, rank, 2)
    (folder / f"collectives-{rank}.json").write_text(json.dumps(sorted(collectives.names)))


@pytest.mark.integration
def test_a_sharded_run_uses_no_collective_whose_name_gloos_threads_would_write_at_once(digits, tmp_path):
    config = tiny_config(tmp_path, 3 * 10, 10, "cluster.parallel=fsdp", "checkpoint.every=10", "optim.power_ema=[0.1]")
    start_ranks(collect_collectives, (tmp_path / "rendezvous", digits, tmp_path, config), 2)
    for rank in range(2):
        names = json.loads((tmp_path / f"collectives-{rank}.json").read_text())
        assert "c10d._allgather_base_.default" in names
        assert not any(name.startswith("_c10d_functional.all_gather") or "coalesced" in name for name in names)


def keep_first_weights(rank, world, rendezvous, folder):
    with process_group(rank, world, rendezvous):
        for parallel in ("ddp", "fsdp", "hsdp"):
            chosen = [f"cluster.parallel={parallel}", *(["cluster.shard_size=2"] if parallel == "hsdp" else [])]
            state = make_state(tiny_config(folder, 25, 25, *chosen, network="dit"), torch.device("cpu"), "fp32")
            rows = [(rows.name, rows.first, rows.values.clone()) for rows in held_rows(state.tensors())]
            torch.save(rows, folder / f"{parallel}-{rank}.pt")


@pytest.mark.integration
def test_first_weights_and_averages_are_equal_to_the_bit_on_every_mesh(tmp_path):
    start_ranks(keep_first_weights, (4, tmp_path / "rendezvous", tmp_path), 4)
    whole = make_state(tiny_config(tmp_path, 25, 25, network="dit"), torch.device("cpu"), "fp32").tensors()
    for parallel, share in (("ddp", 4), ("fsdp", 1), ("hsdp", 2)):
        held = 0
        for rank in range(4):
            for name, first, values in torch.load(tmp_path / f"{parallel}-{rank}.pt"):
                expected = whole[name] if whole[name].dim() == 0 else whole[name][first : first + len(values)]
                assert torch.equal(values, expected)
                held += values.numel() if name.startswith("network.") else 0
        assert held == share * sum(t.numel() for name, t in whole.items() if name.startswith("network."))
