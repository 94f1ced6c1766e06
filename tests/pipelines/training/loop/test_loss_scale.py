"""The loss scale of fp16, beside PyTorch's own and in a training."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from pipelines.checkpoints import CheckpointState, load_checkpoint
from pipelines.training.loop import loss_scale
from pipelines.training.loop.loss_scale import GROWTH_STEPS, LossScale
from tests.forked import start_ranks
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    SMALL,
    last_checkpoint,
    run_ranks,
    tiny_config,
    trace,
    train_here,
)

STEPS, BATCH = 4, 25


def run(folder, dataset, *overrides, precision="fp16", **requests):
    folder.mkdir(exist_ok=True)
    config = tiny_config(folder, STEPS * BATCH, BATCH, *SMALL, f"optim.precision={precision}", *overrides)
    return train_here(folder, dataset, config, **requests)


def test_the_scale_changes_as_that_of_pytorchs_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    ours, weight = LossScale(enabled=True), nn.Parameter(torch.zeros(1))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for gradient in [1.0, float("inf"), 1.0, 1.0, 1.0, 1.0, float("nan"), float("inf"), 1.0, 1.0, 1.0]:
        assert ours.factor == theirs.get_scale()
        theirs.scale(weight.sum()).backward()
        weight.grad = torch.full((1,), gradient)
        theirs.step(optimizer)
        theirs.update()
        finite = gradient == 1.0
        assert ours.update(True, finite) is not finite
        optimizer.zero_grad()


def test_the_scale_stays_between_1_and_2_to_the_24_and_ignores_overflows_at_1_and_of_the_loss():
    scale = LossScale(enabled=True)
    assert [scale.update(True, False) for _ in range(18)] == [True] * 16 + [False] * 2
    assert scale.factor == 1.0
    assert not scale.update(False, False)
    for _ in range(30 * GROWTH_STEPS):
        scale.update(True, True)
    assert scale.factor == 2.0**24
    assert not scale.update(False, False)
    assert scale.factor == 2.0**24


def test_in_other_precisions_the_loss_scale_is_1_and_never_changes():
    scale = LossScale(enabled=False)
    assert not scale.update(True, False)
    assert scale.factor == 1.0
    assert scale.state.tolist() == [0, 0]


def test_gradients_are_divided_exactly():
    scale, weight = LossScale(enabled=True), nn.Parameter(torch.randn(100))
    weight.grad = torch.randn(100)
    before = weight.grad.clone()
    weight.grad *= scale.factor
    scale.unscale([weight, nn.Parameter(torch.zeros(1))])
    assert torch.equal(weight.grad, before)


def test_a_training_in_fp16_has_the_losses_of_float32_and_resumes_bit_for_bit(digits, tmp_path):
    run(tmp_path / "fp32", digits, NO_GRIDS, precision="fp32")
    _, tracker = run(tmp_path / "whole", digits, "tracking.log_every=25")  # draws, in fp16
    reference = list(trace(tmp_path / "fp32").values())
    assert list(trace(tmp_path / "whole").values()) == pytest.approx(reference, rel=5e-3)
    assert list(trace(tmp_path / "whole").values()) != reference
    assert tracker.points[BATCH]["updates/loss_scale"] == 2.0**16
    assert tracker.texts["precision.txt"] == "fp16"
    run(tmp_path / "parts", digits, NO_GRIDS, stop_after=2)
    run(tmp_path / "parts", digits, NO_GRIDS)
    one, other = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    for name in ("model.safetensors", "training.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((one / "model.json").read_text())["lineage"]["precision"] == "fp16"


def test_gradients_that_overflow_lower_the_scale_are_left_out_and_do_not_fail_the_run(digits, tmp_path, monkeypatch):
    # 2^20 is far too much for this loss; with two in a row allowed, only steps that are not counted get past it.
    monkeypatch.setattr(loss_scale, "START", 20)
    steps = 8
    config = [f"images={steps * BATCH}", "optim.max_skipped=2", NO_GRIDS]
    _, tracker = run(tmp_path / "r", digits, *config, "tracking.log_every=25")
    state, tensors = load_checkpoint(last_checkpoint(tmp_path / "r"))
    assert state.skipped >= 3
    assert state.optimizer_steps == steps - state.skipped > 0
    assert tensors["loss_scale"][0] == -state.skipped
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tracker.points[steps * BATCH]["updates/loss_scale"] == 2.0 ** (20 - state.skipped)


def test_a_run_that_goes_on_in_another_precision_says_so_and_an_older_checkpoint_has_none(digits, tmp_path, caplog):
    run(tmp_path / "r", digits, NO_GRIDS, precision="fp32", stop_after=2)
    folder = last_checkpoint(tmp_path / "r")
    state = CheckpointState.from_json((folder / "state.json").read_text(), "")
    assert state.precision == "fp32"
    plain = json.loads((folder / "state.json").read_text())
    # The same setting on a machine that resolves it otherwise.
    (folder / "state.json").write_text(json.dumps({**plain, "precision": "bf16"}))
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "r", digits, NO_GRIDS, precision="fp32", stop_after=1)
    assert "computed in bf16 so far and goes on in fp32" in caplog.text
    del plain["precision"]
    assert CheckpointState.from_json(json.dumps(plain), "").precision is None


def ranks_with_a_large_scale(*arguments):
    loss_scale.START = 20
    run_ranks(*arguments)


@pytest.mark.integration
def test_two_ranks_agree_on_what_overflows_under_ddp_and_fsdp(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 20)
    steps = 8
    own = [f"images={steps * BATCH}", "optim.max_skipped=2", "optim.precision=fp16", *SMALL]
    run(tmp_path / "one", digits, *own)
    runs = []
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        folder.mkdir()
        runs.append((folder, tiny_config(folder, steps * BATCH, BATCH, *own, f"cluster.parallel={parallel}")))
    start_ranks(ranks_with_a_large_scale, (2, tmp_path / "rendezvous", digits, runs), 2)
    reference = list(trace(tmp_path / "one").values())
    for folder, _ in runs:
        assert list(trace(folder).values()) == pytest.approx(reference, rel=1e-2)
        state, tensors = load_checkpoint(last_checkpoint(folder))
        assert state.skipped >= 3
        assert tensors["loss_scale"][0] == -state.skipped
