"""What a training takes of memory, estimated from its configuration and counted by torch's allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines.config import compose
from pipelines.training.loop.collectives import copies_on_cpu
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import make_state
from pipelines.training.loop.train import step
from pipelines.training.memory import Placement, estimate

CPU = torch.device("cpu")
NETWORKS = {
    "unet": ("model=unet_small", "model.channels=[32,64]", "model.attention=[false,true]", "model.layers_per_block=1"),
    "dit": ("model=dit_small", "model.width=64", "model.depth=3", "model.heads=2"),
    "wide dit": ("model=dit_small", "model.width=192", "model.depth=2", "model.heads=2"),
}


def config_of(network, *overrides):
    plain = ["storage=file", "storage.root=file:///nowhere", "data.lanes=1", "data.image_size=16", "data.channels=3"]
    return compose([*plain, "optim.precision=fp32", "batch_size=8", *NETWORKS[network], *overrides])


def estimated(network, *overrides, ranks=1, per_node=None, device="cpu", precision="fp32"):
    return estimate(config_of(network, *overrides), Placement(ranks, per_node or ranks, device, precision))


def allocated(config):
    """Return the largest sum of all allocations of torch during two steps, and the bytes of the state after them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        context = RunContext.of(made_up_job(config), rank=0, world_size=1, device=CPU)
        state = make_state(config, CPU, context.precision)
        batch = made_up(config)
        for _ in range(2):
            step(context, state, replace(batch, ordinals=batch.ordinals + state.images_seen))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(used.cumsum(0).max()), sum(t.nbytes for t in copies_on_cpu(state.tensors()).values())


@pytest.mark.parametrize(
    "network, overrides",
    [
        ("unet", ["batch_size=16"]),
        ("unet", ["batch_size=16", "optim.precision=bf16"]),
        ("dit", ["batch_size=64"]),
        ("dit", ["batch_size=64", "optim.precision=bf16"]),
        ("dit", ["batch_size=64", "model.checkpointing=true"]),
        ("dit", ["batch_size=4"]),
        ("wide dit", ["batch_size=2", "optim.kind=muon", "optim.power_ema=[0.05,0.1]"]),
        ("dit", ["batch_size=32", "micro_batch_size=16"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_estimate_is_what_a_training_allocates(network, overrides):
    config = config_of(network, *overrides)
    expected = estimate(config, Placement(1, 1, "cpu", "bf16" if config.optim.precision == "bf16" else "fp32"))
    most, stored = allocated(config)
    assert most == pytest.approx(sum(expected.device.values()), rel=0.15)
    assert expected.host["staging"] == pytest.approx(stored, rel=0.001)
