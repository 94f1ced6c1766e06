"""What a training takes of memory, estimated from its configuration and counted by torch's allocator."""

from __future__ import annotations

import pytest

from pipelines.config import compose
from pipelines.doctor.gpu import tasks
from pipelines.training.memory import CONTEXT, Placement, estimate, in_words
from tests.allocated import allocated

NETWORKS = {
    **tasks.NETWORKS,
    "wide dit": ("model=dit_small", "model.width=192", "model.depth=2", "model.heads=2"),
}


def config_of(network, *overrides):
    plain = ["storage=file", "storage.root=file:///nowhere", "data.lanes=1", "data.image_size=16", "data.channels=3"]
    return compose([*plain, "optim.precision=fp32", "batch_size=8", *NETWORKS[network], *overrides])


def estimated(network, *overrides, ranks=1, per_node=None, device="cpu", precision="fp32"):
    return estimate(config_of(network, *overrides), Placement(ranks, per_node or ranks, device, precision))


@pytest.mark.parametrize(
    "network, overrides",
    [
        ("unet", ["batch_size=16"]),
        ("unet", ["batch_size=16", "optim.precision=bf16"]),
        ("dit", ["batch_size=64"]),
        ("dit", ["batch_size=64", "optim.precision=bf16"]),
        ("dit", ["batch_size=64", "model.checkpointing=true"]),
        ("dit", ["batch_size=4"]),
        ("jit", ["batch_size=64", "data.num_classes=5"]),
        ("jit", ["batch_size=64", "optim.precision=bf16"]),
        ("wide dit", ["batch_size=2", "optim.kind=muon", "optim.power_ema=[0.05,0.1]"]),
        ("dit", ["batch_size=32", "micro_batch_size=16"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_estimate_is_what_a_training_allocates(network, overrides):
    config = config_of(network, *overrides)
    expected = estimate(config, Placement(1, 1, "cpu", "bf16" if config.optim.precision == "bf16" else "fp32"))
    found = allocated(config)
    assert found.most == pytest.approx(sum(expected.device.values()), rel=0.15)
    assert expected.host["staging"] == pytest.approx(found.stored, rel=0.001)


def test_ranks_that_share_a_network_hold_and_write_their_part_of_it():
    alone = estimated("wide dit")
    for parallel, ranks, shards in (("fsdp", 4, 4), ("hsdp", 4, 2)):
        more = ["cluster.shard_size=2"] if parallel == "hsdp" else []
        shared = estimated("wide dit", f"cluster.parallel={parallel}", *more, ranks=ranks)
        for part in ("parameters", "optimizer", "averages"):
            assert shared.device[part] == pytest.approx(alone.device[part] / shards, rel=0.05), part
        assert shared.host["staging"] == pytest.approx(alone.host["staging"] / ranks, rel=0.05)
        assert shared.disk == {}
    assert alone.disk == {"checkpoint": alone.host["staging"]}


def test_what_is_gathered_is_smaller_in_bf16_and_no_rank_keeps_copies_of_all_weights():
    plain, half = (
        estimated("wide dit", "cluster.parallel=fsdp", f"cluster.param_dtype={dtype}", ranks=4, precision="bf16")
        for dtype in ("fp32", "bf16")
    )
    assert half.device["gathered"] < 0.7 * plain.device["gathered"]
    copies = 4 * plain.device["parameters"] / 2
    assert plain.device["activations"] - half.device["activations"] > 0.7 * copies


def test_whole_gradients_are_kept_between_the_micro_batches_of_a_sharded_network():
    one, several = (
        estimated("wide dit", "cluster.parallel=fsdp", f"micro_batch_size={size}", ranks=4) for size in (2, 1)
    )
    assert several.device["gradients"] == pytest.approx(4 * one.device["gradients"], rel=0.05)


def test_copies_in_the_memory_of_nodes_are_those_of_two_nodes_and_twice_while_one_is_made():
    sharded = ["cluster.parallel=fsdp", "checkpoint.local_every=8"]
    part = estimated("wide dit", "cluster.parallel=fsdp", ranks=4, per_node=2).host["staging"]
    assert estimated("wide dit", *sharded, ranks=4, per_node=2).node["local copies"] == 2 * 2 * 2 * part
    assert estimated("wide dit", *sharded, ranks=4).node["local copies"] == 2 * 4 * part


def test_a_gpu_keeps_inputs_of_norms_in_float32_where_a_cpu_keeps_them_in_bf16():
    cpu, gpu = (estimated("unet", device=device, precision="bf16") for device in ("cpu", "cuda"))
    assert gpu.device["activations"] > 1.2 * cpu.device["activations"]
    assert gpu.tensors == sum(gpu.device.values()) - CONTEXT


def test_a_network_takes_all_its_conditions():
    assert estimated("dit", "model.text_dim=8", "model.inpainting=true", "data.num_classes=3").device["activations"]


def test_the_bytes_of_a_place_add_up():
    plain = estimated("dit").to_dict()
    assert list(plain) == ["device", "host", "node", "disk"]
    for parts in plain.values():
        assert parts.pop("total") == sum(parts.values())
    assert "GiB (parameters 0.00" in in_words(plain["device"])
    assert plain["host"]["device"] == sum(plain["device"].values())
