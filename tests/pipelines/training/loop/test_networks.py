"""Every kind of network is trained, resumed and spread over ranks by the same loop."""

from __future__ import annotations

import time

import pytest
import torch

from ddpm.models import NETWORKS
from pipelines.checkpoints import load_checkpoint
from tests.forked import start_ranks
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    TINY,
    last_checkpoint,
    run_ranks,
    tiny_config,
    trace,
    train_here,
)

STEPS, BATCH = 6, 25
FROM_THE_FIRST = ["optim.warmup_images=0", "optim.lr=0.01"]  # parts of a network that start at zero take part soon

every_network = pytest.mark.parametrize("network", TINY)


def config(folder, network, *overrides, steps=STEPS):
    folder.mkdir(exist_ok=True)
    return tiny_config(folder, steps * BATCH, BATCH, *FROM_THE_FIRST, *overrides, network=network)


def run(folder, dataset, network, *overrides, steps=STEPS, **requests):
    return train_here(folder, dataset, config(folder, network, *overrides, steps=steps), **requests)


def on_two_ranks(tmp_path, dataset, runs):
    rendezvous = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    start_ranks(run_ranks, (2, rendezvous, dataset, runs), 2)


def worst(found, reference):
    """The largest relative difference of two traces."""
    assert found.keys() == reference.keys()
    return max(abs(found[seen] / loss - 1) for seen, loss in reference.items())


def test_every_registered_network_is_tested_here():
    assert set(TINY) == set(NETWORKS)


@pytest.mark.heavy
@every_network
def test_the_loss_on_digits_falls(digits, tmp_path, network):
    run(tmp_path / "r", digits, network, "optim.lr=0.003", NO_GRIDS, steps=80)
    losses = torch.tensor(list(trace(tmp_path / "r").values()))
    assert losses[-20:].mean() < 0.7 * losses[:5].mean()  # of v, of which noise hides more than of eps


@every_network
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(digits, tmp_path, network):
    run(tmp_path / "whole", digits, network)
    run(tmp_path / "parts", digits, network, NO_GRIDS, stop_after=3)
    second, _ = run(tmp_path / "parts", digits, network, NO_GRIDS)
    assert {r.resumed_at for r in second.reports} == {75}
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    one, other = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    for name in ("model.safetensors", "training.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.heavy
@every_network
def test_two_ranks_have_the_losses_of_one_under_ddp_and_fsdp(digits, tmp_path, network):
    run(tmp_path / "one", digits, network, "optim.precision=fp64", NO_GRIDS)
    shared = ["optim.precision=fp64", "micro_batch_size=7"]
    runs = {p: config(tmp_path / p, network, *shared, f"cluster.parallel={p}") for p in ("ddp", "fsdp")}
    on_two_ranks(tmp_path, digits, [(tmp_path / parallel, c) for parallel, c in runs.items()])
    reference = trace(tmp_path / "one")
    for parallel in runs:
        assert worst(trace(tmp_path / parallel), reference) < 1e-9


@pytest.mark.heavy
def test_with_weights_gathered_in_bf16_losses_are_those_of_one_rank_in_bf16_up_to_its_rounding(digits, tmp_path):
    runs = {}
    for network in TINY:
        alone, shared = tmp_path / f"{network}-1", tmp_path / f"{network}-2"
        run(alone, digits, network, "optim.precision=bf16", NO_GRIDS)
        chosen = ["optim.precision=bf16", "cluster.parallel=fsdp", "cluster.param_dtype=bf16"]
        runs[alone] = (shared, config(shared, network, *chosen))
    on_two_ranks(tmp_path, digits, list(runs.values()))
    for alone, (shared, _) in runs.items():
        assert 0 < worst(trace(shared), trace(alone)) < 0.02
        assert all(tensor.dtype != torch.bfloat16 for tensor in load_checkpoint(last_checkpoint(shared))[1].values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_network
def test_a_compiled_network_has_the_losses_of_a_plain_one_under_ddp_and_fsdp(digits, tmp_path, network):
    run(tmp_path / "one", digits, network)
    compiled = {
        p: config(tmp_path / p, network, "cluster.compile=true", f"cluster.parallel={p}") for p in ("ddp", "fsdp")
    }
    on_two_ranks(tmp_path, digits, [(tmp_path / parallel, c) for parallel, c in compiled.items()])
    reference = trace(tmp_path / "one")
    for parallel in compiled:
        assert worst(trace(tmp_path / parallel), reference) < 1e-3


@every_network
def test_the_kind_of_network_is_part_of_a_runs_identity_unless_it_is_the_unet(tmp_path, network):
    found = config(tmp_path / "r", network).identity()
    assert found.get("model.kind", "unet") == network
