"""Callbacks start processes quickly, and free the resources that Ray Train forgets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipelines.config import compose
from pipelines.training.ray_train import callbacks
from pipelines.training.ray_train.callbacks import FreeWorkers
from pipelines.training.ray_train.trainer import make_trainer


def group(placement_group: str) -> SimpleNamespace:
    handle = SimpleNamespace(placement_group=placement_group)
    return SimpleNamespace(get_worker_group_state=lambda: SimpleNamespace(placement_group_handle=handle))


@pytest.mark.parametrize("groups, freed", [([], []), (["first"], ["first"]), (["first", "second"], ["second"])])
def test_resources_of_the_newest_worker_group_are_freed_when_the_controller_ends(monkeypatch, groups, freed):
    removed: list[str] = []
    monkeypatch.setattr(callbacks, "remove_placement_group", removed.append)
    callback = FreeWorkers()
    for name in groups:
        callback.after_worker_group_start(group(name))
    assert removed == []
    asyncio.run(callback.before_controller_shutdown())
    assert removed == freed


def test_the_controller_of_every_training_frees_its_workers_resources():
    trainer = make_trainer(lambda settings: None, {}, compose(["+experiment=digits"]).cluster, "digits")
    assert [type(c) for c in trainer._create_default_callbacks() if isinstance(c, FreeWorkers)] == [FreeWorkers]


def test_callbacks_and_functions_of_workers_load_without_torch_which_is_imported_while_the_collector_rests():
    modules = ", ".join(f"pipelines.training.ray_train.{name}" for name in ("callbacks", "worker"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
