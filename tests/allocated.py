"""What a training on the CPU takes of memory, counted by torch's allocator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipelines.config import Config
from pipelines.training.loop.collectives import copies_on_cpu
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.speed import made_up, made_up_job
from pipelines.training.loop.state import make_state
from pipelines.training.loop.train import step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Allocated:
    """The largest sum of all allocations, the bytes of the state after the last step, and the loss of each step."""

    most: int
    stored: int
    losses: list[float]


def allocated(config: Config, steps: int = 2) -> Allocated:
    """Train some steps on made-up images."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        context = RunContext.of(made_up_job(config), rank=0, world_size=1, device=CPU)
        state = make_state(config, CPU, context.precision)
        batch = made_up(config)
        losses = [
            step(context, state, replace(batch, ordinals=batch.ordinals + state.images_seen)).loss for _ in range(steps)
        ]
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    stored = sum(t.nbytes for t in copies_on_cpu(state.tensors()).values())
    return Allocated(int(used.cumsum(0).max()), stored, losses)
