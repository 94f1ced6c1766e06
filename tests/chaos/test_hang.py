"""A worker that hangs in a training is found by the one that waits for it, and both start again."""

from __future__ import annotations

import re
import signal
import time

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.training.log_lines import LogReader
from tests.chaos.arena import BATCH, Arena, until
from tests.networks import TINY_UNET

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 10
SETTINGS = [
    "+experiment=digits", *TINY_UNET,
    "optim.decay=constant", "optim.lr=1e-5", "optim.warmup_images=0", "optim.precision=fp32", f"batch_size={BATCH}",
    f"checkpoint.every={20 * BATCH}", f"tracking.log_every={BATCH}", "tracking.grid_every=null", "sampler.steps=2",
    "cluster.num_workers=2", f"cluster.step_timeout_s={TIMEOUT_S}", "name=hang", "images=10000000",
]  # fmt: skip


def test_a_stopped_worker_is_replaced_and_the_trace_is_unbroken(arena: Arena):
    training = arena.train(*SETTINGS)
    training.gets_on()
    before: list[psutil.Process] = until(lambda: len(w := arena.workers()) == 2 and w, 30, lambda: "two workers")
    before[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()

    def replaced() -> bool:
        now = arena.workers()
        return len(now) == 2 and not set(now) & set(before)

    until(replaced, TIMEOUT_S + 90, lambda: f"two new workers beside {arena.workers()}")
    print(f"new workers after {time.monotonic() - began:.1f} s", flush=True)
    training.gets_on()
    print(f"new steps after {time.monotonic() - began:.1f} s", flush=True)
    training.process.send_signal(signal.SIGINT)
    answer = training.answer()

    history = MlflowClient(tracking_uri=arena.state.tracking_uri).get_metric_history(answer["run_id"], "train/loss")
    assert sorted(m.step for m in history) == list(range(BATCH, answer["images_seen"] + 1, BATCH))
    said = "\n".join(line.message for line in LogReader(arena.s3, "s3://ddpm/runs/hang").new_lines())
    # The other waits in the all-reduce of the step.
    assert re.search(r"has made no progress for 1\d s in the phase 'step' \(cluster.step_timeout_s\)", said)
    assert "training/loop/train.py" in said
