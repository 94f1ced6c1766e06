import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.config import compose
from pipelines.shards.read import Batch
from pipelines.training.loop.collectives import all_gather_pieces, broadcast, gather, on_whole
from pipelines.training.loop.parallel import micro_batches
from pipelines.training.loop.state import make_network
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


def test_gathered_tensors_are_copies_and_broadcast_ones_overwrite_in_place():
    live = {"a": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), "b": torch.tensor(3.0)}
    copies = gather(live)
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


def gather_parts(rank, world, rendezvous):
    shapes = [(3,), (1, 4), (4, 2), (7, 2, 3), (2,)]
    whole = {str(shape): torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) for shape in shapes}
    with process_group(rank, world, rendezvous):
        mesh = init_device_mesh("cpu", (world,))
        parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
        found = gather(parts | {"scalar": torch.tensor(2.0)})
        if rank == 0:
            assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
            assert found["scalar"] == 2
        else:
            assert not found


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
def test_rank_0_gathers_parts_of_any_number_of_rows(tmp_path, world):
    start_ranks(gather_parts, (world, tmp_path / "rendezvous"), world)


def divide_wholes(rank, world, rendezvous):
    whole = {shape: torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) for shape in [(1, 4), (7, 2, 3)]}
    with process_group(rank, world, rendezvous):
        mesh = init_device_mesh("cpu", (world,))
        for tensor in whole.values():
            found = on_whole(lambda x: x / x.sum(), distribute_tensor(tensor, mesh, [Shard(0)]))
            assert torch.equal(found.to_local(), distribute_tensor(tensor / tensor.sum(), mesh, [Shard(0)]).to_local())  # type: ignore[attr-defined]
            assert found.shape == tensor.shape
            assert torch.equal(on_whole(lambda x: x / x.sum(), tensor), tensor / tensor.sum())


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_keeps_its_part_of_a_function_of_the_whole(tmp_path, world):
    start_ranks(divide_wholes, (world, tmp_path / "rendezvous"), world)


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
        assert {"c10d.gather_.default", "c10d._allgather_base_.default"} <= set(names)
        assert not any(name.startswith("_c10d_functional.all_gather") or "coalesced" in name for name in names)
