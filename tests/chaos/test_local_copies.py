"""Workers on two nodes that are lost, and go on from what the nodes keep in memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.environment.limits import NODE_FOLDER
from pipelines.training.log_lines import LogReader
from tests.chaos.arena import Arena, Training, until

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3000)]

BATCH, STEPS = 32, 40
FAR = 1_000_000
LARGE = ["model=dit_digits", "model.width=640", "model.depth=8", "model.heads=8"]
"""51 M parameters, whose state has a GB."""
SETTINGS = [
    "+experiment=digits", *LARGE, f"batch_size={BATCH}", f"images={STEPS * BATCH}", "optim.decay=constant",
    "optim.lr=1e-5", "optim.precision=fp32", "optim.warmup_images=0", f"tracking.log_every={BATCH}",
    "tracking.grid_every=null", "cluster.num_workers=8", "cluster.cpus_per_worker=0.5", "cluster.parallel=hsdp",
    "cluster.shard_size=4", "cluster.max_failures=20",
]  # fmt: skip


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Arena]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NODE_FOLDER, str(tmp_path / "node-0"))
        arena = Arena(tmp_path / ".ddpm", tmp_path / "work")
    arena.environment[NODE_FOLDER] = str(tmp_path / "node-1")
    arena.environment["AWS_ENDPOINT_URL"] = str(arena.state.s3_endpoint)  # a proxy would hold parts in memory
    for node in ("node-0", "node-1", "work"):
        (tmp_path / node).mkdir(exist_ok=True)
    try:
        arena.ddpm("ingest", "digits", "--to", "s3://ddpm/datasets/digits")
        arena.start_node()
        yield arena
    finally:
        arena.close()


def goes_on(arena: Arena, training: Training, begun: float, what: str) -> list[str]:
    """Print the seconds until the next attempt makes a step; what it says of where the state came from."""
    seen = training.images()
    until(lambda: training.images() > seen, 400, lambda: "".join(training.said)[-3000:])
    took = time.time() - begun
    said = [line.message for line in LogReader(arena.s3, f"s3://ddpm/runs/{training.name}").new_lines()]
    states = [line for line in said if "local copies" in line]
    print(f"{what}: {took:.1f} s to a new step; {states[-1] if states else 'the store was read'}", flush=True)
    return states


def losses(arena: Arena, name: str) -> dict[int, float]:
    client = MlflowClient(tracking_uri=arena.state.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id], f"tags.`ddpm.run` = '{name}'")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert len({m.step for m in history}) == len(history)
    return {m.step: m.value for m in history}


@pytest.mark.parametrize("copies", [True, False], ids=["from local copies", "from the store"])
def test_eight_workers_on_two_nodes_lose_a_process_and_a_node(two_nodes: Arena, tmp_path: Path, copies: bool):
    arena, often = two_nodes, f"{2 * BATCH}"
    stored = [f"checkpoint.every={4 * BATCH}"]  # each is 1 GB, which the local store keeps in memory for a while
    every = [f"checkpoint.local_every={often}", f"checkpoint.every={12 * BATCH}"] if copies else stored
    training = arena.train(*SETTINGS, *every, "name=lossy")
    training.gets_on(600)
    until(lambda: training.images() >= 8 * BATCH, 600, lambda: "eight steps")
    begun = time.time()
    arena.workers()[-1].kill()
    assert len(goes_on(arena, training, begun, "process")) == (1 if copies else 0)
    training.gets_on(600)
    until(lambda: training.images() >= 16 * BATCH, 600, lambda: "sixteen steps")
    begun = time.time()
    arena.kill_node()
    shutil.rmtree(tmp_path / "node-1")
    (tmp_path / "node-1").mkdir()
    arena.start_node()
    assert len(goes_on(arena, training, begun, "node")) >= (2 if copies else 0)
    goodput = training.answer(900)["goodput"]
    print(goodput)
    assert goodput["losses"].keys() == {"process", "node"}, "".join(training.said)
    alone = ["cluster.num_workers=1", "cluster.parallel=ddp", "cluster.shard_size=null", f"checkpoint.every={FAR}"]
    alone += ["cluster.cpus_per_worker=2", "cluster.threads_per_worker=2"]
    arena.train(*SETTINGS, "name=calm", *alone).answer(900)
    calm, lossy = losses(arena, "calm"), losses(arena, "lossy")
    assert list(lossy) == list(range(BATCH, STEPS * BATCH + 1, BATCH))
    assert lossy == pytest.approx(calm, rel=1e-3)
