"""A run goes on from the memory of its nodes without the one that is lost, and from the store where need be."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import shutil
import time
from multiprocessing import connection
from pathlib import Path

import pytest

from pipelines.environment.limits import NODE_FOLDER
from pipelines.training.loop.local_copies import receivers
from tests.forked import FORKING, start_ranks
from tests.pipelines.training.loop.ranks import (
    NO_GRIDS,
    SMALL,
    FolderShell,
    process_group,
    tiny_config,
    trace,
    train_here,
)

BATCH, STEPS = 25, 20
MANY = 40
LAST, NOBODY = 8, None  # the step of an attempt at which it is killed


@pytest.mark.parametrize(
    "nodes, expected",
    [
        ("aaaa", [None] * 4),
        ("ab", [1, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("aabbc", [2, 3, 4, 4, 0]),
        ("abc", [1, 2, 0]),
        ("abab", [1, 0, 3, 2]),
    ],
)
def test_each_part_has_a_copy_on_the_next_node_and_nodes_share_the_work(nodes, expected):
    assert receivers(nodes) == expected


class Killed(FolderShell):
    """A shell whose rank is killed, as by SIGKILL, at a step."""

    def checkpoint_requested(self):
        if super().checkpoint_requested() or self.asked == self.stop_after:
            os._exit(9)
        return False

    def stop_requested(self):
        return False


def attempt(
    rank: int, nodes: str, rendezvous: Path, digits, folder: Path, config, last: int | None, phase: str | None = None
) -> None:
    os.environ[NODE_FOLDER] = str(folder / "nodes" / nodes[rank])
    (folder / "nodes" / nodes[rank]).mkdir(parents=True, exist_ok=True)
    shell = Killed(folder, rank, stop_after=None if phase else last)
    with pytest.MonkeyPatch.context() as patch, process_group(rank, len(nodes), rendezvous):
        if phase and nodes[rank] == ("a" if phase == "list" else "b"):
            patch.setattr(PHASES[phase], killing(shell, pkgutil.resolve_name(PHASES[phase]), last))
        train_here(folder, digits, config, rank, len(nodes), shell=shell)


PHASES = {
    "forward": "pipelines.training.loop.train.losses",
    "backward": "torch.Tensor.backward",
    "reduce": "torch.distributed.all_reduce",
    "optimizer": "pipelines.training.loop.train._update_weights",
    "staging": "pipelines.training.loop.checkpoint.written_rows",
    "copying": "pipelines.training.loop.local_copies.LocalCopies._write",
    "sending": "pipelines.training.loop.local_copies.LocalCopies._send",
    "upload": "pipelines.storage.Storage.upload_stream",
    "list": "pipelines.checkpoints.enter_checkpoint",  # by rank 0
}


def killing(shell: Killed, function, after: int):
    """The same function, whose call ends the process, as SIGKILL does, once so many steps were made."""

    def call(*arguments, **named):
        if shell.asked >= after:
            os._exit(9)
        return function(*arguments, **named)

    return call


class Run:
    """A run in a folder, of which each attempt may be on other nodes."""

    def __init__(self, folder: Path, digits, *overrides: str, steps: int = STEPS) -> None:
        self.images = steps * BATCH
        self.folder, self.digits, self.overrides = folder, digits, [*SMALL, NO_GRIDS, "optim.warmup_images=0"]
        self.overrides += ["optim.precision=fp64", "checkpoint.local_every=50", *overrides]

    def config(self, *overrides: str):
        return tiny_config(self.folder, self.images, BATCH, *self.overrides, *overrides)

    def attempt(self, nodes: str, *overrides: str, last: int | None = LAST, phase: str | None = None) -> int:
        """Train until the ranks are killed, and return the step after which the attempt began.

        Args:
            last: the step at which they are killed.
            phase: of the first step from then on in which those of one node are killed, and the others after them.
        """
        before = self._lines()
        rendezvous = self.folder.parent / f"rendezvous-{time.monotonic_ns()}"
        arguments = (nodes, rendezvous, self.digits, self.folder, self.config(*overrides), last)
        if last is NOBODY:
            start_ranks(attempt, arguments, len(nodes))
        else:
            group = [FORKING.Process(target=attempt, args=(rank, *arguments, phase)) for rank in range(len(nodes))]
            for process in group:
                process.start()
            connection.wait([process.sentinel for process in group])
            for process in group:
                if phase:
                    process.kill()
                process.join()
                assert process.exitcode in (1, 9, -9), process.exitcode
        return self._lines()[len(before)] // BATCH - 1

    def _lines(self) -> list[int]:
        path = self.folder / "trace.jsonl"
        return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []

    def lose(self, *nodes: str) -> None:
        for node in nodes:
            shutil.rmtree(self.folder / "nodes" / node)

    def parts(self, node: str) -> list[Path]:
        """The parts on a node, of the oldest copy first."""
        found = (self.folder / "nodes" / node).rglob("part-*.safetensors")
        return sorted(found, key=lambda path: (path.parent.name, path.name))

    def same_as_undisturbed(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path / "one", self.images, BATCH, *self.overrides, "checkpoint.local_every=null")
        train_here(tmp_path / "one", self.digits, config)
        reference, found = trace(tmp_path / "one"), trace(self.folder)
        assert found.keys() == reference.keys()
        assert max(abs(found[seen] / loss - 1) for seen, loss in reference.items()) < 1e-9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_from_copies_whatever_node_is_lost_and_on_other_nodes_and_ranks(digits, tmp_path):
    run = Run(tmp_path / "r", digits, steps=MANY)
    sharded = "cluster.parallel=fsdp"
    assert run.attempt("aabc", sharded) == 0
    begun = [run.attempt("aabc", sharded)]  # processes alone were lost
    run.lose("b")
    begun.append(run.attempt("aabc", sharded))  # one node, which comes back empty
    run.lose("a")
    begun.append(run.attempt("dbc", "cluster.parallel=ddp"))  # another in its place, and fewer ranks
    assert all(0 < before < after for before, after in itertools.pairwise(begun))
    assert begun[0] >= LAST - 4  # at most two copies were on their way
    assert not list((run.folder / "runs").rglob("state.json"))  # nothing has come from the store

    newest = run.parts("c")[-1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    run.lose("b", "d")  # c has its own part, and that of the node before it
    assert run.attempt("efc", sharded) == 0  # a part is gone, and nothing is in the store
    assert run.attempt("efc", sharded, last=NOBODY) >= LAST - 4
    run.same_as_undisturbed(tmp_path)
    assert not run.parts("c")  # the run has ended, and needs them no more


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_run_goes_on_from_copies_without_one_of_two_nodes_and_from_the_store_where_copies_are_damaged(
    digits, tmp_path
):
    run = Run(tmp_path / "r", digits, "checkpoint.every=250", "cluster.parallel=fsdp")
    run.attempt("ab")
    run.lose("b")
    assert LAST - 4 <= run.attempt("ab", last=9) < 10  # the store has none yet
    for part in run.parts("a"):
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    assert run.attempt("ab", last=NOBODY) == 10
    run.same_as_undisturbed(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", ["process", "node"])
@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_lost_in_whichever_phase_of_a_step_ranks_are_killed(digits, tmp_path, phase, loss):
    run = Run(tmp_path / "r", digits, "checkpoint.every=100", "cluster.parallel=fsdp")
    run.attempt("abb", last=6, phase=phase)
    if loss == "node":
        run.lose("b")
    assert run.attempt("abb", last=NOBODY) >= 4
    run.same_as_undisturbed(tmp_path)
