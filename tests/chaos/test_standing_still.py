"""A node that stands still in the middle of a drawing: it is named, and its work is done elsewhere."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.chaos.arena import Arena
from tests.integration import command
from tests.integration.conftest import DIGITS, SCORED
from tests.processes import commands, family, standing_still

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = str(Path("tests/fixtures/earlier/version/model").resolve())
DATA = "s3://ddpm/datasets/digits"
SHORT = ["evaluation.seeds=1", "evaluation.batch_size=30", "evaluation.likelihood_images=0", "sampler.steps=60"]
LONG = "evaluation.n=900"
"""So that actors on the second node get some of it."""
PATIENCE = "cluster.patience_s=5"


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    (folder := tmp_path_factory.mktemp("still")).joinpath("work").mkdir()
    made = Arena(folder / ".ddpm", folder / "work")
    try:
        made.ddpm("ingest", "digits", "--to", DATA)
        yield made
    finally:
        made.close()


@contextmanager
def node_stopped(arena: Arena, title: str, *, raylet_alone: bool) -> Iterator[None]:
    """With the second node, or its raylet, stopped as soon as it has a process of a title."""
    arena.start_node()
    assert arena.node is not None
    root = arena.node.pid

    def found() -> list[psutil.Process]:
        there = commands(family(root))
        if not any(text.startswith(title) for _, text in there):
            return []
        return [process for process, text in there if "/raylet " in text or not raylet_alone]

    try:
        with standing_still(found):
            yield
    finally:
        arena.kill_node()


def said(arena: Arena, *arguments: str) -> tuple[str, dict[str, object]]:
    """What a command says, and its answer."""
    done: subprocess.CompletedProcess[str] = command.FORKS.run(
        [*arguments, "--json"], arena.folder, arena.environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("raylet_alone", [True, False])
def test_an_evaluation_goes_on_without_a_node_that_stands_still(arena, raylet_alone):
    root = f"s3://ddpm/still-{raylet_alone}"
    asked = ["evaluate", MODEL, f"data.uri={DATA}", *SHORT, LONG, PATIENCE]
    expected = said(arena, *asked, "storage.root=s3://ddpm/alone", "evaluation.actors=1")[1]
    with node_stopped(arena, "ray::_SamplingActor.call", raylet_alone=raylet_alone):
        err, found = said(arena, *asked, f"storage.root={root}", "evaluation.actors=4")
    assert "its process or its node stands still" in err
    assert found["estimates"] == expected["estimates"]


@pytest.fixture(scope="module")
def versions(arena):
    """A champion, and another version of its model with other settings."""
    said(arena, "flow", *DIGITS, *SCORED)
    said(arena, "register", "models:/digits/1", *SCORED, "sampler.steps=12", "--name", "digits")


def test_the_gate_decides_without_a_node_that_stands_still(arena, versions):
    asked = ["promote", "models:/digits/2", "--alias", "champion", "registry.n=3000", "evaluation.batch_size=30"]
    with node_stopped(arena, "ray::_SamplingActor.call", raylet_alone=False):
        done = command.FORKS.run(
            [*asked, PATIENCE, "evaluation.actors=4", "--json"], arena.folder, arena.environment, timeout=400
        )
    assert "its process or its node stands still" in done.stderr, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["attempt"] == 1  # passed or not, both were compared


def test_a_study_confirms_without_a_node_that_stands_still(arena, versions):
    study = ["search.trials=2", "search.samples=32", "search.confirm_samples=2048", "search.random_trials=2", PATIENCE]
    asked = ["search", "guidance", "--model", "models:/digits/1", "--study", "still", *study, *SCORED]
    with node_stopped(arena, "ray::_SamplingActor.call", raylet_alone=False):
        err, found = said(arena, *asked)
    assert "its process or its node stands still" in err
    assert found["confirmed"]
