"""Where the time of a training step goes: convolutions, attention and matrix products, and everything else.

    python -m benchmarks.step_profile [--quick] [--json] [--threads N] [--channels-last] [--name FILE]

It profiles the step of `benchmarks.train_step` by the fastest method that is not compiled, for what is compiled is
fused and has no names, and sums the time of each operation without that of those that it calls.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from typing import Any

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import commit, make_parser, publish
from benchmarks.train_step import UNETS, UPDATE, best_method, machine, models, ours, prepared, say
from ddpm.models import UNetConfig

KINDS = {
    "convolutions": ("conv",),
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "matmul"),
    "group norm": ("group_norm",),
    "SiLU": ("silu",),
    "copies and casts": ("copy", "_to", "cat", "clone", "contiguous", "fill", "zero"),
}
"""Kinds of operations by parts of their names: the first that fits."""
PARAMETERS, REST = "optimizer, averages, clipping", "the rest"
"""Kinds beside these: whatever a step does with parameters alone, and what fits none of the names."""
HEAVY = ("convolutions", "attention", "matrix products")
"""What a step consists of by arithmetic."""


def main(arguments: list[str] | None = None) -> None:
    """Profile the step of every model, and publish the shares."""
    parser = make_parser("step_profile", __doc__, quick="small batches, one step")
    parser.add_argument("--threads", type=int, default=1, help="of the process")
    parser.add_argument("--channels-last", action="store_true", help="on a CPU too, where it is slower")
    parser.add_argument("--name", default="step_profile", help="of the result's file, where machines have one each")
    parser.add_argument("--models", default=",".join(UNETS), help="of those of benchmarks.train_step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU channels-last pays for a compiled network alone.
    last = device.type == "cuda" or options.channels_last
    # What is compiled changes no method's arithmetic, so that every network has the same.
    method = dataclasses.replace(best_method(device, options.size, UNetConfig()), compile=False, channels_last=last)
    result: dict[str, Any] = {
        "benchmark": "step_profile",
        "commit": commit(),
        "machine": machine(device),
        "threads": options.threads,
        "torch": torch.__version__,
        "method": method.title,
        "models": {},
    }
    for name, model in models(options.size, options.models.split(",")).items():
        network, x_0 = prepared(model, device, options.size)
        step = ours(network, x_0, method)
        step()  # what is set up at the first step is no part of the others
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        steps = options.size.of(3, 1, 1)
        began = time.perf_counter()
        with profile(activities=activities) as profiled:
            for _ in range(steps):
                step()
        seconds = (time.perf_counter() - began) / steps
        shares = by_kind(profiled.events() or (), device)
        result["models"][name] = {
            "batch": len(x_0),
            "step_s": seconds,
            "shares": shares,
            "others": 1 - sum(shares[k] for k in HEAVY),
        }
        say(f"{name}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    publish(result, options.name, options)


def by_kind(events: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Return the share of each kind of operation in the time of the events of a profile."""
    on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = dict.fromkeys([*KINDS, PARAMETERS, REST], 0.0)
    for event in events:
        found[kind_of(event)] += getattr(event, on)
    total = sum(found.values())
    return {kind: time / total for kind, time in found.items()}


def kind_of(event: Any) -> str:
    """Return the kind of an operation, by the name of its own and of those that called it."""
    caller = event
    while caller is not None:
        if caller.name == UPDATE:
            return PARAMETERS
        caller = caller.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), REST)


if __name__ == "__main__":
    main()
