"""A training over several hosts, each with an address of its own: one is cut off in mid-run, and comes back."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.training.goodput import measure
from pipelines.training.ledger import read_sessions
from tests.chaos.arena import BATCH, Training, until
from tests.chaos.hosts import Host, Network, reason_for_none
from tests.integration.command import DDPM
from tests.networks import TINY_UNET
from tests.processes import ray_train_workers

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3600)]

SETTINGS = [
    "+experiment=digits", "storage=s3", "storage.root=s3://ddpm", *TINY_UNET,
    "optim.decay=constant", "optim.lr=1e-5", "optim.warmup_images=0",
    "optim.precision=fp32", f"batch_size={BATCH}", f"checkpoint.every={20 * BATCH}", f"tracking.log_every={BATCH}",
    "tracking.grid_every=1000000", "tracking.grid_images=10", "sampler.steps=2", "cluster.cpus_per_worker=1",
    "cluster.resize_every_s=10", "cluster.step_timeout_s=30",
]  # fmt: skip


def workers(host: Host) -> list[psutil.Process]:
    return [worker for process in host.processes for worker in ray_train_workers(process.pid)]


def test_a_host_that_is_cut_off_and_comes_back_leaves_no_trace_in_the_losses(tmp_path_factory: pytest.TempPathFactory):
    if reason := reason_for_none():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.getbasetemp() / "h"  # short, as paths of Ray's sockets have to be
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with Network(folder) as network:
        for host in network.hosts:
            say(f"{host.name} is {host.address}, in the namespace {host.namespace}")
        ingest = [DDPM, "ingest", "digits", "--to", "s3://ddpm/datasets/digits", "storage=s3", "storage.root=s3://ddpm"]
        subprocess.run([*network.head.prefix, *ingest], env=network.environment, check=True)

        def train(*arguments: str) -> Training:
            return Training(folder, network.environment, [*SETTINGS, *arguments], network.head.prefix)

        training = train("name=cut", "cluster.num_workers=[1,2]", "images=10000000")
        try:
            until(lambda: workers(network.one) and workers(network.two), 600, lambda: "a worker on each host")
            training.gets_on(600)
            say(f"{training.images():,} images; {network.two.name} ({network.two.address}) is cut off")
            before = {worker.pid for worker in workers(network.one)}
            network.two.cut()
            cut_at = training.images()

            def goes_on_alone() -> bool:
                alone = workers(network.one)
                return bool(alone) and not before & {worker.pid for worker in alone} and training.images() > cut_at

            until(goes_on_alone, 600, lambda: "".join(training.said)[-3000:])
            training.gets_on(300)
            say(f"{training.images():,} images with {network.one.name} alone; {network.two.name} is connected again")
            network.two.mend()
            # Ray has given the node up, and it ends when it hears of that: whoever supervises it starts it again.
            until(lambda: network.two.processes[-1].poll() is not None, 300, lambda: "the end of the old Ray node")
            say("its Ray node has ended, and starts again")
            network.join(network.two)
            until(lambda: workers(network.one) and workers(network.two), 600, lambda: "a worker on each host again")
            training.gets_on(600)
            say(f"{training.images():,} images with both again; stopped with a checkpoint")
            training.process.send_signal(signal.SIGINT)
            answer = training.answer(300)
        finally:
            training.process.kill()
            print("".join(training.said), flush=True)
        images = answer["images_seen"]
        calm = train("name=calm", "cluster.num_workers=1", f"images={images}").answer(1200)

        client = MlflowClient(tracking_uri=network.mlflow_url)
        trace = [(m.step, m.value) for m in client.get_metric_history(answer["run_id"], "train/loss")]
        assert sorted(step for step, _ in trace) == list(range(BATCH, images + 1, BATCH))
        undisturbed = {m.step: m.value for m in client.get_metric_history(calm["run_id"], "train/loss")}
        assert dict(trace) == pytest.approx(undisturbed, rel=1e-3)
        ledger = measure(read_sessions(network.s3, "s3://ddpm/runs/cut"))
        say(f"{len(trace)} steps, each once, as in the training that nothing happened to")
        print(*ledger.lines(), sep="\n", flush=True)
        assert ledger.attempts >= 3  # on both, on one, on both
        assert ledger.sessions == 1
