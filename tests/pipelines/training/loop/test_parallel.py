import pytest
import torch

from pipelines.config import compose
from pipelines.shards.read import Batch
from pipelines.training.loop.collectives import broadcast, gather
from pipelines.training.loop.parallel import micro_batches
from pipelines.training.loop.state import make_network
from tests.pipelines.training.loop.ranks import TINY


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
