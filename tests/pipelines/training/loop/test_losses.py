"""The loss of each sample: what is flipped, dropped and given to the network is decided sample by sample."""

from __future__ import annotations

import pytest
import torch

from pipelines.shards.read import Batch
from pipelines.training.loop.context import Job, RunContext
from pipelines.training.loop.losses import conditions, losses
from tests.pipelines.training.loop.ranks import SMALL, MemoryTracker, tiny_config

N = 400


class Recorder(torch.nn.Module):
    """A network that outputs zeros, and keeps what it was given."""

    def forward(self, x_t, t, cond=None):
        self.x_t, self.t = x_t, t
        return torch.zeros_like(x_t)


def context_of(tmp_path, digits, *overrides) -> RunContext:
    config = tiny_config(tmp_path, 1_000, N, *SMALL, *overrides)
    job = Job(config, digits, MemoryTracker(), {})
    return RunContext.of(job, rank=0, world_size=1, device=torch.device("cpu"))


def a_batch() -> Batch:
    images = 2 * torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    return Batch(torch.arange(N), images, torch.arange(N) % 10)


def seen(context: RunContext, batch: Batch, t: int) -> Recorder:
    network = Recorder()
    losses(context, network, batch, torch.full((len(batch),), t))
    return network


def test_half_of_the_images_are_mirrored_left_to_right_and_the_others_are_as_they_were(digits, tmp_path):
    batch = a_batch()
    mirrored = Batch(batch.ordinals, batch.images.flip(-1), batch.labels)
    flipping, plain = (context_of(tmp_path / f"{flip}", digits, f"data.flip={flip}") for flip in ("true", "false"))
    found, same, other = seen(flipping, batch, 5).x_t, seen(plain, batch, 5).x_t, seen(plain, mirrored, 5).x_t
    is_other = (found == other).flatten(1).all(1)
    assert torch.equal(is_other, ~(found == same).flatten(1).all(1))
    assert 0.4 < is_other.float().mean() < 0.6


@pytest.mark.parametrize("t", [1, 7, 1000])
def test_the_network_is_told_the_index_of_the_table_one_below_the_timestep(digits, tmp_path, t):
    assert (seen(context_of(tmp_path, digits), a_batch(), t).t == t - 1).all()


def test_labels_are_dropped_sample_by_sample_and_as_often_as_asked(digits, tmp_path):
    context, batch = context_of(tmp_path, digits, "objective.label_drop=0.25"), a_batch()
    cond = conditions(context, batch, batch.images)
    assert cond is not None
    assert torch.equal(cond.label, batch.labels)
    assert 0.17 < cond.drop.float().mean() < 0.33
    half = slice(N // 2, N)
    part = Batch(batch.ordinals[half], batch.images[half], batch.labels[half])
    assert torch.equal(conditions(context, part, part.images).drop, cond.drop[half])
    never = conditions(context_of(tmp_path / "never", digits, "objective.label_drop=0"), batch, batch.images)
    assert not never.drop.any()
