"""Everything that is checked, and recorded, before a training starts."""

from __future__ import annotations

import shutil

import pytest

from ddpm.model import load_model
from ddpm.tensor_files import tensors_digest
from pipelines.checkpoints import ModelError
from pipelines.training.prepare import initial_lineage
from tests.pipelines.training.loop.ranks import last_checkpoint, tiny_config, train_here


def test_the_lineage_names_the_weights_that_a_run_started_from_and_keeps_them_when_it_goes_on(digits, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert initial_lineage(tiny_config(base, 50, 25), new=True) == {"first_weights": 1}
    train_here(base, digits, tiny_config(base, 50, 25))
    model = last_checkpoint(base)
    config = tiny_config(tuned, 50, 25, f"init_from={model}")
    expected = {"init_from": str(model), "init_from_digest": tensors_digest(load_model(model).network.state_dict())}
    found = initial_lineage(config, new=True)
    assert found == expected
    train_here(tuned, digits, config, lineage=found)
    shutil.rmtree(base)
    assert initial_lineage(config, new=False) == expected
    with pytest.raises(ModelError, match="names no model"):
        initial_lineage(config, new=True)
