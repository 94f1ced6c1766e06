"""Everything that can vanish under a training vanishes in one, and nothing of it shows in what it learned."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.checkpoints import CheckpointList, catalog, complete_checkpoints, load_checkpoint, sweep
from pipelines.training.goodput import measure
from pipelines.training.ledger import read_sessions
from pipelines.training.log_lines import LogReader
from tests.chaos.arena import BATCH, CPUS, Arena, Training, until
from tests.chaos.fault_proxy import Fault, FaultProxy
from tests.integration.workers import slow_steps
from tests.networks import TINY_UNET

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(1200)]

EVERY = 20 * BATCH
OFTEN = 5 * BATCH
"""Where steps are slow, so that every loss comes after a checkpoint."""
SOAK_EVERY_S = 30.0
FAR = "images=10000000"
# A step is short, so that there are many; the learning rate is small, so that float order, which depends on the number
# of workers, does not grow over the steps, and a loss speaks of its samples and their noise alone. On a busy machine
# workers may be lost more often than there is a new checkpoint.
SETTINGS = [
    "+experiment=digits", *TINY_UNET,
    "optim.decay=constant", "optim.lr=1e-5", "optim.warmup_images=0", "optim.precision=fp32", f"batch_size={BATCH}",
    f"checkpoint.every={EVERY}", f"tracking.log_every={BATCH}", "tracking.grid_every=1000000",
    "tracking.grid_images=10", "sampler.steps=2", f"cluster.cpus_per_worker={CPUS}", "cluster.num_workers=[1,2]",
    "cluster.resize_every_s=10", "cluster.max_failures=20",
]  # fmt: skip


def kill_worker(arena: Arena, training: Training, rng: random.Random) -> Training:
    rng.choice(until(arena.workers, 180, lambda: f"a worker after {''.join(training.said)[-1500:]}")).kill()
    return training


def kill_s3(arena: Arena, training: Training, rng: random.Random) -> Training:
    arena.kill_service("s3", lambda: time.sleep(rng.uniform(3, 8)))
    return training


def kill_mlflow(arena: Arena, training: Training, rng: random.Random) -> Training:
    arena.kill_service("mlflow", lambda: time.sleep(rng.uniform(3, 8)))
    return training


def miss_mlflow(arena: Arena, training: Training, rng: random.Random) -> Training:
    """MLflow is killed, and away until the rank that logs says so on the terminal of the driver."""

    def warned() -> bool:
        return any("rank 0: training goes on without" in line for line in training.said)

    arena.kill_service("mlflow", lambda: until(warned, 60, lambda: f"a warning after {''.join(training.said)[-1500:]}"))
    return training


def bounce_node(arena: Arena, training: Training, rng: random.Random) -> Training:
    """A node is gone, and another one comes after a while, whatever the training makes of it."""
    arena.kill_node()
    time.sleep(rng.uniform(5, 25))
    arena.start_node()
    return training


def preempt_node(arena: Arena, training: Training, rng: random.Random) -> Training:
    """A node is announced to go, as spot instances are: a checkpoint is taken at once, whatever the interval."""
    # Ray announces a loss to the workers that train at the time, if one of them is on that node.
    until(lambda: len(arena.workers()) == 2, 120, lambda: f"two workers after {''.join(training.said)[-1500:]}")
    training.gets_on()
    complete: set[str] = set()

    def announced() -> bool:
        listed = [entry.uri.split("/") for entry in arena.s3.list(f"s3://ddpm/runs/{training.name}")]
        complete.update(parts[-2] for parts in listed if parts[-1] == "state.json")  # some are deleted soon
        said = re.findall(r"about to be taken away: a checkpoint is saved at ([\d,]+) images", "".join(training.said))
        wanted = [f"checkpoint_{int(images.replace(',', '')):012d}-" for images in said]
        return any(name.startswith(start) for name in complete for start in wanted)

    assert not announced()
    arena.drain_node(deadline_s=20)
    until(announced, 30, lambda: f"a checkpoint on notice in {sorted(complete)} after {''.join(training.said)[-1500:]}")
    arena.kill_node()
    training.gets_on()  # with fewer
    return training


def return_node(arena: Arena, training: Training, rng: random.Random) -> Training:
    arena.start_node()
    until(lambda: len(arena.workers()) == 2, 90, lambda: "two workers again")
    return training


def kill_driver(arena: Arena, training: Training, rng: random.Random) -> Training:
    training.process.kill()
    training.process.wait()
    return arena.train(*training.arguments)


def disturb_s3(arena: Arena, training: Training, rng: random.Random) -> Training:
    """Connections to S3 stall, break and trickle, it is busy, and the credentials expire."""
    kind = rng.choice(["stall", "reset", "short_body", "trickle", "refuse", "slow_down", "expired_token"])
    methods = ("GET", "PUT", "POST") if kind == "expired_token" else ()
    return disturb(arena.s3_proxy, Fault(kind, seconds=rng.uniform(3, 8), methods=methods), training)


def disturb_mlflow(arena: Arena, training: Training, rng: random.Random) -> Training:
    """Connections to MLflow stall and break, a proxy before it answers for it, or it refuses a token for a while."""
    kind = rng.choice(["stall", "reset", "short_body", "refuse", "unavailable", "unauthorized", "forbidden"])
    return disturb(arena.mlflow_proxy, Fault(kind, seconds=rng.uniform(3, 8)), training)


def disturb(proxy: FaultProxy, fault: Fault, training: Training) -> Training:
    active = proxy.start(fault)
    active.wait()
    print(f"         {fault.kind} for {fault.seconds:.1f} s met {len(active.hits)} requests", flush=True)
    return training


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([kill_worker, preempt_node, kill_driver], id="a worker, a node, the driver"),
        pytest.param([kill_worker, kill_s3, preempt_node, miss_mlflow, kill_driver], id="all", marks=pytest.mark.slow),
    ],
)
def test_a_training_survives_the_loss_of_every_part(arena: Arena, tmp_path: Path, parts: list[Callable[..., Training]]):
    run_chaos(arena, tmp_path, parts, random.Random(0))


@pytest.mark.slow
def test_a_training_grows_again_with_a_node_that_comes_back(arena: Arena, tmp_path: Path):
    run_chaos(arena, tmp_path, [preempt_node, return_node, kill_worker], random.Random(0), name="grown")


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_long_training_survives_a_fault_every_half_minute(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    """A soak of DDPM_SOAK_MINUTES (100): the next fault comes when it is due, whether or not the training has
    recovered from the one before. It is repeated by its DDPM_SOAK_SEED, and goes on, with another part of the
    faults, where DDPM_SOAK_FOLDER names the folder of an earlier one. The training that nothing happens to runs beside
    it on a stack of its own, so that a soak takes little longer than its minutes."""
    given = os.environ.get("DDPM_SOAK_FOLDER")
    folder = Path(given) if given else tmp_path_factory.mktemp("soak")
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    part = len(list(parts.iterdir()))
    rng = random.Random(f"{os.environ.get('DDPM_SOAK_SEED', '0')}-{part}")
    (folder / "calm").mkdir(exist_ok=True)
    with contextlib.ExitStack() as opened:
        arena, quiet = Arena(folder / "home" / ".ddpm", folder), Arena(folder / "calm" / ".ddpm", folder / "calm")
        opened.callback(arena.close)
        opened.callback(quiet.close)
        for each in (arena, quiet) if part == 0 else ():
            each.ddpm("ingest", "digits", "--to", "s3://ddpm/datasets/digits")
        lasts = time.monotonic() + 60 * float(os.environ.get("DDPM_SOAK_MINUTES", "100"))
        run_chaos(arena, tmp_path, faults_until(lasts, rng), rng, every_s=SOAK_EVERY_S, beside=quiet)
        (parts / str(part)).touch()


def faults_until(deadline: float, rng: random.Random) -> Iterator[Callable[..., Training]]:
    kinds = [kill_worker, kill_s3, bounce_node, disturb_s3, disturb_s3, disturb_mlflow, kill_mlflow, kill_driver]
    while time.monotonic() < deadline:
        yield rng.choice(kinds)


def run_chaos(
    arena: Arena,
    tmp_path: Path,
    faults: Iterable[Callable[..., Training]],
    rng: random.Random,
    every_s: float | None = None,
    beside: Arena | None = None,
    name: str = "chaos",
) -> None:
    """Train while faults happen, and compare with a training that nothing happens to.

    Args:
        every_s: mean time from one fault to the next; None where each waits until the training goes on again.
        beside: where the training that nothing happens to runs meanwhile; None: in the same arena, afterwards.
        name: of the training.
    """
    happened = []
    slowly = contextlib.ExitStack()
    settings = [*SETTINGS, f"name={name}", FAR]
    if beside is None:
        slowly.enter_context(slow_steps(arena.home))
        settings += [f"checkpoint.every={OFTEN}"]
    arena.start_node()
    asked = time.time()
    training = arena.train(*settings)
    calm = beside.train(*SETTINGS, f"name={name}-calm", FAR, "cluster.num_workers=1") if beside else None
    until(lambda: any("follow it at" in line for line in training.said), 120, lambda: "a plan")
    if beside and calm:
        calm.gets_on()
        for worker in beside.workers():
            worker.nice(19)  # it takes what the other one leaves, which is enough, for that one often stands still
    folder = f"s3://ddpm/runs/{name}"
    began = due = time.time()
    if every_s is None:
        until(lambda: complete_checkpoints(arena.s3, folder), 120, lambda: f"a checkpoint after {training.said[-5:]}")
    for fault in faults:
        if every_s is None:
            training.gets_on()
            time.sleep(min(rng.expovariate(1 / 2.5), 10))
        else:
            due += rng.expovariate(1 / every_s)
            time.sleep(max(due - time.time(), 0))
        if training.process.poll() is not None:
            # One that is started while its token is refused says so and ends; who supervises it starts it again.
            said = "".join(training.said)
            assert training.images() == 0, said[-3000:]
            assert any(refused in said for refused in ("MLflow at http", "the credentials have expired")), said[-3000:]
            training = arena.train(*settings)
        happened.append(fault)
        print(f"{time.time() - began:6.1f} s, {training.images():,} images: {fault.__name__}", flush=True)
        training = fault(arena, training, rng)
    training.gets_on(timeout_s=300)
    client = MlflowClient(tracking_uri=arena.state.tracking_uri)
    experiment = client.get_experiment_by_name("ddpm")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`ddpm.run` = '{name}'")
    # A training that is stopped before it is where a lost one was has points in its trace that it has not come to yet.
    furthest = max(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
    until(lambda: training.images() > furthest, 120, lambda: f"{furthest:,} images at {training.images():,}")
    # Every group of workers begins with them after some 20 s, and none may have lived so long until now.
    until(
        lambda: any("system/node-0/" in key for key in client.get_run(run.info.run_id).data.metrics),
        120,
        lambda: "curves of a node",
    )
    training.process.send_signal(signal.SIGINT)
    answer = training.answer()
    ended = time.time()
    took = ended - began
    slowly.close()
    assert answer["status"] == "stopped"
    images = answer["images_seen"]

    trace = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    # Every batch of the stream, and so every sample of every epoch, is in the trace once …
    assert sorted(step for step, _ in trace) == list(range(BATCH, images + 1, BATCH))
    # … and has the loss that it has where nothing happens.
    if calm is None:
        calm = arena.train(*SETTINGS, f"name={name}-calm", f"images={images}")
    else:
        until(lambda: calm.images() >= images, 600 + images / 200, lambda: f"{images:,} images at {calm.images():,}")
        calm.process.send_signal(signal.SIGINT)
    calm_client = MlflowClient(tracking_uri=(beside or arena).state.tracking_uri)
    history = calm_client.get_metric_history(calm.answer(600 + images / 200)["run_id"], "train/loss")
    undisturbed = {m.step: m.value for m in history if m.step <= images}
    assert dict(trace) == pytest.approx(undisturbed, rel=1e-3)

    current = CheckpointList.from_json(arena.s3.read(f"{folder}/checkpoints.json"))
    assert current is not None
    assert len(current.checkpoints) == 2
    complete = {listed for listed, _ in complete_checkpoints(arena.s3, folder)}
    assert complete >= set(current.checkpoints)
    for listed in current.checkpoints:
        arena.s3.download_folder(f"{folder}/{listed.name}", tmp_path / listed.name)
        state, *_ = load_checkpoint(tmp_path / listed.name)  # checks every digest
    assert state.images_seen == images
    # A kill may have left half an upload, or an old checkpoint between its end in the list and its deletion.
    left = {entry.uri.split("/")[-2] for entry in arena.s3.list(folder) if "/checkpoint_" in entry.uri}
    left -= {listed.name for listed in current.checkpoints}
    assert not [name for name in left - {listed.name for listed in complete} if f"-e{current.epoch}-" in name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "GRACE_S", -1.0)
        assert set(sweep(arena.s3, folder)) == left
    assert {listed for listed, _ in complete_checkpoints(arena.s3, folder)} == set(current.checkpoints)

    # What the workers of all drivers said outlives them.
    said = [line.message for line in LogReader(arena.s3, folder).new_lines()]
    if miss_mlflow in happened:
        assert any("training goes on without" in message for message in said)

    sessions = read_sessions(arena.s3, folder)
    goodput = measure(sessions)
    print(goodput.lines())
    if every_s is None:
        assert goodput.sessions == 1 + sum(fault is kill_driver for fault in happened)
        causes = {kill_worker: "process", preempt_node: "preemption", kill_driver: "driver"}
        assert goodput.losses.keys() >= {causes[fault] for fault in happened if fault in causes}
        # All that the ledger misses is the drivers' start and goodbye, which are imports on a busy machine.
        assert 0.9 * took - 20 < goodput.wall_s < ended - asked
        assert goodput.attempts > sum(fault in (kill_worker, kill_driver) for fault in happened)
        assert all(session.attempts[-1].resumed_at > 0 for session in sessions)  # a lost worker, and a lost driver
    else:
        print(f"{len(happened)} faults in {took:.0f} s, one every {took / len(happened):.0f} s")
        assert goodput.recomputed_images > 0  # of one loss of a worker there may be none: a checkpoint was just stored
    assert sum(goodput.parts().values()) == pytest.approx(goodput.wall_s, rel=1e-6)
    assert abs(goodput.unaccounted_s) < 0.02 * goodput.wall_s
