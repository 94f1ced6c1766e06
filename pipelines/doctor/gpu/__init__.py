"""`ddpm doctor --gpu`: a selftest of this machine's GPUs, which needs neither Ray nor MLflow nor a store.

`tasks` has what devices compute, by the training's own step; `ranks` starts a process for each device; this module
judges what they found. Without GPUs the same is done by processes on the CPU, with gloo in place of NCCL.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ddpm.prediction import computes_bf16
from pipelines.config import Config
from pipelines.doctor.check import Check, failed, ok, skipped
from pipelines.doctor.gpu import facts, tasks
from pipelines.doctor.gpu.ranks import Place, Ranks, RanksError
from pipelines.doctor.gpu.tasks import GIB, MIB, NETWORKS, ForwardBackward, Links, Trace, made_up_config
from pipelines.training.memory import Placement, estimate, in_words

__all__ = ["ranks_of_machine", "selftest"]

BF16_ROUNDING = 2.0**-8
"""Largest relative error of one rounding to bfloat16, which has 8 significant bits."""
BF16_ROUNDINGS = {"output": 16, "loss": 4, "gradient": 16}
"""Largest relative distance between bfloat16 and float32, in roundings. An output has passed through some thirty
layers that each round once: errors of random sign add up to about sqrt(30) = 5. On CPUs 4 are measured for the output,
6 for the gradient and 0.1 for the loss, a mean over the batch; in float16, with 11 bits, an eighth of them."""
COMPILED = 1e-4
"""Largest relative distance between the compiled and the plain network in float32: only the order of sums differs.
One rounding is 6e-8; 2e-6 is measured on CPUs, and GPUs may choose other algorithms for convolutions."""
STEPS = {"losses": 1e-4, "gradient norms": 1e-3, "gradients": 1e-3}
"""Largest relative distance between the steps of all ranks and of one process in float32. On CPUs 3e-7, 2e-6 and 3e-5
are measured, in float64 1e-14, so that it is the order of sums alone."""
RESUMED = 1e-5
"""Largest relative distance between the losses after a restart and those of a training without one."""
SLOW_LINK = 4.0
"""How many times slower than the median of its kind a link may be."""
DEATH_S = tasks.STALLED_S + 10.0
"""Seconds within which all other ranks have to end after one was killed."""
MEMORY = (0.5, 1.25)
"""Bounds of the measured peak, in terms of the estimate; cuDNN's workspaces come on top, `WORKSPACE`."""
WORKSPACE = 256 * MIB
SIZES = {"cuda": (1, 16, 64, 256), "cpu": (1, 4, 16)}
"""Sizes of transfers in MiB."""
SAVED_AFTER, LENGTH = 2, 4
"""Steps of a training before its state is saved, and in all."""
MEASURED_NETWORK = ("model.channels=[128,256,256]", "model.attention=[false,true,false]", "batch_size=64")
REPORT = "report it with the lines below"


def ranks_of_machine(count: int | None) -> Ranks:
    """Return a rank for each GPU, or processes of the CPU where there is none.

    Args:
        count: number of ranks; None: all GPUs, or two processes of the CPU.

    Raises:
        ValueError: there are fewer GPUs.
    """
    # What the processes need is imported once, in the server that they are forked from.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipelines.doctor.gpu.tasks"])
    if not torch.cuda.is_available():
        return Ranks(count or 2, "cpu")
    there = torch.cuda.device_count()
    if count is not None and count > there:
        raise ValueError(f"{count} ranks need as many GPUs, and this machine has {there}")
    return Ranks(count or there, "cuda")


def selftest(ranks: Ranks) -> Iterator[Check]:
    """Yield the checks, each as soon as it is done: a failed one does not keep the others from being made."""
    groups: list[tuple[str, Callable[[Ranks], Iterator[Check]]]] = [
        ("bf16", check_bf16),
        ("compile", check_compile),
        ("memory", check_memory),
        ("links", check_links),
        ("ddp", lambda ranks: check_steps(ranks, "ddp")),
        ("fsdp", lambda ranks: check_steps(ranks, "fsdp")),
        ("kill and resume", check_resume),
    ]
    for name, group in groups:
        try:
            yield from group(ranks)
        except Exception as error:  # noqa: BLE001 - a fault of one check must not hide what the others find
            found = str(error) if isinstance(error, RanksError) else f"{type(error).__name__}: {error}"
            yield failed(name, found, REPORT)


# --- one device ---------------------------------------------------------------------------------------------


def check_bf16(ranks: Ranks) -> Iterator[Check]:
    """Yield, for each kind of network, how far bfloat16 on each device is from float32 on the CPU."""
    for network in NETWORKS:
        exact = tasks.evaluate(made_up_config(network), torch.device("cpu"))
        for place in ranks.places() if ranks.kind == "cuda" else ranks.places()[:1]:
            name = f"bf16 {network} on {place.device}"
            if place.kind == "cuda" and not computes_bf16(place.device):
                yield skipped(name, "this card has no bf16: optim.precision=auto takes fp16 or fp32")
                continue
            yield bf16_check(name, exact, tasks.evaluate(made_up_config(network, "optim.precision=bf16"), place.device))


def bf16_check(name: str, exact: ForwardBackward, rounded: ForwardBackward) -> Check:
    """Return the check of an evaluation in bfloat16 beside the exact one."""
    limits = {part: roundings * BF16_ROUNDING for part, roundings in BF16_ROUNDINGS.items()}
    return _within(name, distances(exact, rounded), limits, "optim.precision=fp32")


def distances(exact: ForwardBackward, other: ForwardBackward) -> dict[str, float]:
    """Return the relative distances of output, loss and gradient."""
    return {
        "output": _distance(exact.output, other.output),
        "loss": abs(other.loss / exact.loss - 1),
        "gradient": _distance(exact.gradient, other.gradient),
    }


def check_compile(ranks: Ranks) -> Iterator[Check]:
    """Yield whether a compiled network computes what the plain one does."""
    device = ranks.places()[0].device
    small = ("model.width=32", "model.depth=1")
    plain = tasks.evaluate(made_up_config("dit", *small), device)
    try:
        compiled = tasks.evaluate(made_up_config("dit", *small, "cluster.compile=true"), device)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises
        yield compile_failure(error)
        return
    limits = dict.fromkeys(("output", "loss", "gradient"), COMPILED)
    yield _within(f"compile on {device}", distances(plain, compiled), limits, "cluster.compile=false")


def compile_failure(error: Exception) -> Check:
    """Return the check for an error of `torch.compile`: without a compiler it is skipped, otherwise failed."""
    said = next((line for line in str(error).splitlines() if line.strip()), "no message").strip()
    kinds = {type(cause).__name__ for cause in (error, error.__cause__, getattr(error, "inner_exception", None))}
    if kinds & {"InvalidCxxCompiler", "TritonMissing"} or "C compiler" in str(error):
        return skipped("compile", f"no compiler: {said}")
    return failed("compile", f"{type(error).__name__}: {said}", "cluster.compile=false")


def check_memory(ranks: Ranks) -> Iterator[Check]:
    """Yield the peak memory of a step beside its estimate."""
    config = made_up_config("unet", *MEASURED_NETWORK)
    expected = estimate(config, Placement(1, 1, ranks.kind, "fp32"))
    if ranks.kind == "cpu":
        yield skipped("memory", f"the peak is not measured on a CPU; the estimate is {in_words(expected.device)}")
        return
    for place in ranks.places():
        yield memory_check(f"memory of {place.device}", expected.tensors, tasks.peak_memory(config, place.device))


def memory_check(name: str, estimate: int, peak: int) -> Check:
    """Return the check of a peak beside its estimate, both in bytes."""
    least, most = MEMORY[0] * estimate, MEMORY[1] * estimate + WORKSPACE
    found = f"{peak / GIB:.2f} GiB at the peak of a step, estimated {estimate / GIB:.2f}"
    limits = f"limits {least / GIB:.2f} to {most / GIB:.2f}"
    if least <= peak <= most:
        return ok(name, f"{found} ({limits})")
    return failed(name, f"{found} ({limits})", "a smaller micro_batch_size, and " + REPORT)


# --- between devices ----------------------------------------------------------------------------------------


def check_links(ranks: Ranks) -> Iterator[Check]:
    """Yield what all-reduce and all-gather move by size, and whether a link is slower than others."""
    if ranks.count == 1:
        yield skipped("links", "one device has none")
        return
    sizes = [size * MIB for size in SIZES[ranks.kind]]
    measured = ranks.run(tasks.measure_links, sizes)
    kinds = facts.link_kinds(facts.topology(), os.environ.get("CUDA_VISIBLE_DEVICES")) if ranks.kind == "cuda" else {}
    yield transfer_check(measured)
    yield link_check({pair: speed for links in measured for pair, speed in links.pairs.items()}, kinds)


def transfer_check(measured: list[Links]) -> Check:
    """Return the check of all-reduce and all-gather: what arrived, and the speed by size."""
    wrong = sorted({said for links in measured for said in links.wrong})
    fix = "NCCL_P2P_DISABLE=1 shows whether transfers between cards are to blame (IOMMU, ACS); " + REPORT
    if wrong:
        return failed("transfers", f"other values arrived than were sent: {', '.join(wrong)}", fix)
    speeds = []
    for name, found in (("all-reduce", measured[0].all_reduce), ("all-gather", measured[0].all_gather)):
        speeds.append(f"{name} {', '.join(f'{size // MIB} MiB {speed:.2f}' for size, speed in found.items())} GB/s")
    return ok("transfers", f"{'; '.join(speeds)} (every value arrived)")


def link_check(speeds: Mapping[tuple[int, int], float], kinds: Mapping[tuple[int, int], str]) -> Check:
    """Return the check of the links between any two ranks, in GB/s: one much slower than others of its kind has failed.

    A link is compared with the median of all others of its kind, so that one fault between two of many cards is found.
    Where most links of a kind are slow, as those of one slow card among three, the fastest tells.

    Args:
        kinds: how the cards are connected, because NVLink is rightly faster than PCIe; links without one are of a kind.
    """
    slow = []
    for pair, speed in speeds.items():
        alike = [s for other, s in speeds.items() if other != pair and kinds.get(other) == kinds.get(pair)]
        usual = max(statistics.median(alike), max(alike) / 2) if alike else speed
        if usual > SLOW_LINK * speed:
            kind = f", {kinds[pair]}" if pair in kinds else ""
            slow.append(f"{pair[0]}-{pair[1]} ({speed:.2f} GB/s{kind}; others {usual:.2f})")
    if len(speeds) == 1:
        return ok(
            "links", f"{next(iter(speeds.values())):.2f} GB/s between the two ranks (no other link to compare with)"
        )
    figures = f"{min(speeds.values()):.2f} to {max(speeds.values()):.2f} GB/s between {len(speeds)} pairs of ranks"
    limit = f"limit: 1/{SLOW_LINK:.0f} of others of the same kind"
    if not slow:
        return ok("links", f"{figures} ({limit})")
    fix = "look at `nvidia-smi topo -m`, `nvidia-smi nvlink --status` and the PCIe width; use other cards until then"
    return failed("links", f"slow: {', '.join(slow)} ({limit})", fix)


def check_steps(ranks: Ranks, parallel: str) -> Iterator[Check]:
    """Yield, for each kind of network, how far the steps of all ranks are from those of one process on the CPU."""
    if parallel == "fsdp" and ranks.count == 1:
        yield skipped(parallel, "one device has nothing to share")
        return
    for network in NETWORKS:
        config = _stepped(ranks, network, parallel)
        alone = tasks.train(Place(0, 1, "cpu"), config, LENGTH)
        yield steps_check(f"{parallel} {network}", alone, ranks.run(tasks.train, config, LENGTH))


def steps_check(name: str, alone: Trace, together: list[Trace]) -> Check:
    """Return the check of the steps of all ranks beside those of one process."""
    found = {
        "losses": _furthest(alone.losses, together[0].losses),
        "gradient norms": _furthest(alone.norms, together[0].norms),
        "gradients": _distance(_flat(alone.moments), _flat(whole_moments(alone, together))),
    }
    return _within(f"{name}, {len(alone.losses)} steps", found, STEPS, REPORT)


def whole_moments(alone: Trace, together: list[Trace]) -> dict[str, torch.Tensor]:
    """Return the moments of all ranks, joined along their rows where each rank holds some of them."""
    parts = {name: [trace.moments[name] for trace in together] for name in alone.moments}
    return {
        name: parts[name][0] if parts[name][0].shape == whole.shape else torch.cat(parts[name])
        for name, whole in alone.moments.items()
    }


def check_resume(ranks: Ranks) -> Iterator[Check]:
    """Yield whether the other ranks end when one is killed, and whether a restart goes on with the same losses."""
    config = _stepped(ranks, "dit", "fsdp")
    with tempfile.TemporaryDirectory(prefix="ddpm-doctor-") as name:
        folder = Path(name)
        whole = ranks.run(tasks.train, config, LENGTH)[0]
        seconds, _ = ranks.seconds_after_death(tasks.train_and_die, config, SAVED_AFTER, folder, within_s=DEATH_S)
        if seconds is None:
            yield failed("kill", f"ranks still run {DEATH_S:.0f} s after one was killed", REPORT)
        else:
            yield ok("kill", f"all ranks ended {seconds:.1f} s after one was killed (limit {DEATH_S:.0f})")
        resumed = ranks.run(tasks.resume, config, SAVED_AFTER, LENGTH - SAVED_AFTER, folder)[0]
        found = {"losses": _furthest(whole.losses[SAVED_AFTER:], resumed.losses)}
        yield _within("resume", found, {"losses": RESUMED}, REPORT)


def _stepped(ranks: Ranks, network: str, parallel: str) -> Config:
    """Return a training whose batch the ranks cannot share evenly."""
    return made_up_config(network, f"batch_size={2 * ranks.count + 1}", f"cluster.parallel={parallel}")


def _within(name: str, found: Mapping[str, float], limits: Mapping[str, float], fix: str) -> Check:
    """Return the check of relative distances beside their limits; a distance that is no number is beyond them."""
    figures = ", ".join(f"{part} {found[part]:.1e} (limit {limits[part]:.1e})" for part in limits)
    if all(found[part] <= limits[part] for part in limits):
        return ok(name, figures)
    return failed(name, f"beyond the limits: {figures}", fix)


def _distance(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float((other.double() - exact.double()).norm() / exact.double().norm())


def _furthest(exact: list[float], other: list[float]) -> float:
    return float((torch.tensor(other) / torch.tensor(exact) - 1).abs().max())  # NaN where one of them is


def _flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
