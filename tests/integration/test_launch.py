"""A training on the local stack's Ray head through `ddpm launch`: submitted, followed, stopped, resumed, shown."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import stack
from pipelines.config import compose
from pipelines.flow.ingest import write_dataset
from pipelines.presentation.progress import Silent
from pipelines.stack import StackState
from pipelines.storage import Storage
from tests.integration.conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RUN = "s3://ddpm/runs/launched"
TRAIN = ["train", "+experiment=digits", "name=launched", "cluster.num_workers=1", "optim.decay=constant"]
TRAIN += ["batch_size=32", "data.lanes=4", "model.channels=[32]", "model.attention=[false]"]
TRAIN += ["checkpoint.every=10_000_000", "tracking.grid_every=null"]


@pytest.fixture
def newer_head(local_stack: StackState, tmp_path: Path) -> Iterator[None]:
    """A Ray head of another stack on this machine, which started after the tests' own."""
    home = tmp_path / ".ddpm"
    try:
        stack.up(home, ["ray"])
        yield
    finally:
        stack.down(home)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read what a command says up to a line that has the text."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said)[-3000:])


def checkpoints(s3: Storage) -> list[int]:
    """The images that each complete checkpoint has seen."""
    states = [entry.uri for entry in s3.list(RUN) if entry.uri.endswith("/state.json") and "checkpoint_" in entry.uri]
    return sorted(int(uri.partition("checkpoint_")[2].partition("-")[0]) for uri in states)


@pytest.mark.usefixtures("newer_head")
def test_a_launched_training_is_followed_stopped_and_resumed_under_its_name(shell: Shell, s3: Storage) -> None:
    write_dataset(compose(["+experiment=digits"]), Silent())

    follower = shell.start("launch", "--target", "ray", "--json", *TRAIN, "images=10_000_000")
    read_until(follower, "submitted launched to")
    read_until(follower, ", loss ")  # what the training says arrives here
    follower.send_signal(signal.SIGINT)
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 0, err[-2000:]
    assert '"id": "launched", "submitted": true' in out
    assert "job launched keeps running; the same command follows it again" in err
    assert checkpoints(s3) == []

    stopped = shell.ok("launch", "--stop", "launched", "--json")
    assert stopped.answer["jobs"] == [{"id": "launched", "status": "STOPPED"}]
    (seen,) = checkpoints(s3)  # it had time to write one

    resumed = shell.ok("launch", "--json", *TRAIN, f"images={seen + 64}")
    assert resumed.answer == {"id": "launched@2", "submitted": True, "status": "SUCCEEDED"}
    assert f"{seen + 64:,} images" in resumed.err
    assert checkpoints(s3)[-1] == seen + 64

    jobs = [{"id": "launched", "status": "STOPPED"}, {"id": "launched@2", "status": "SUCCEEDED"}]
    assert shell.ok("launch", "--status", "launched", "--json").answer == {"name": "launched", "jobs": jobs}
