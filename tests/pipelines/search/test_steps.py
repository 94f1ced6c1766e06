"""Time steps that are chosen for a model, on a tiny one of a folder."""

from __future__ import annotations

import json

import pytest
import torch

from ddpm.generate import Sampling
from ddpm.model import load_model
from ddpm.step_learning import StepLearning
from ddpm.step_search import StepSearch
from pipelines.checkpoints.references import Resolved
from pipelines.config import compose, sampling, sampling_overrides
from pipelines.search.steps import CHOSEN, LEARNED, StepsAsked, _conditions, _settings, find_steps
from tests.pipelines.drawing import model_folder
from tests.pipelines.evaluation.test_prompts import some_captions

SMALL = StepSearch(grid=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(model_folder(tmp_path_factory.mktemp("models") / "model", classes=("a", "b", "c")))


@pytest.mark.parametrize("kind", ["ddim", "dpm_solver", "unipc"])
@pytest.mark.parametrize("learning", [None, StepLearning(updates=3)], ids=[CHOSEN, LEARNED])
def test_what_is_found_are_settings_that_can_be_stored_registered_and_drawn(model, kind, learning):
    asked, said = Sampling.of(kind=kind, steps=3, scale=2.0), []
    found = find_steps(model, asked, StepsAsked(6, SMALL, learning), (1, 2), notice=lambda *line: said.append(line))
    assert set(found.distances) == {CHOSEN, "trailing", "karras", "exponential", *([LEARNED] if learning else [])}
    assert found.settings.to_json()["kind"] == ("generalized" if learning else kind)
    assert len(said) == (2 if learning else 0)
    levels = found.settings.sampler.timesteps  # type: ignore[attr-defined]
    assert len(levels) == 4
    assert Sampling.from_json(json.loads(json.dumps(found.settings.to_json()))) == found.settings
    assert sampling(compose(sampling_overrides(found.settings))) == found.settings
    images = model.generate(torch.arange(3), sampling=found.settings)
    assert torch.equal(images, model.generate(torch.arange(3), sampling=found.settings))
    assert find_steps(model, asked, StepsAsked(6, SMALL, learning), (1, 2)) == found


def test_learned_steps_end_no_farther_from_fine_trajectories_than_chosen_ones(model):
    """The network is untrained, so that trajectories are far from straight."""
    asked = Sampling.of(kind="dpm_solver", steps=3, scale=1.0)
    found = find_steps(model, asked, StepsAsked(64, SMALL, StepLearning(updates=60)), (1, 2))
    assert found.distances[LEARNED] < 0.9 * found.distances[CHOSEN]


def test_a_trajectory_has_a_caption_and_the_class_of_its_image(model):
    captions = some_captions(("of b", "of a"), [1, 0])
    cond = _conditions(model, torch.arange(5), captions)
    assert cond.label.tolist() == [1, 0, 1, 0, 1]
    assert torch.equal(cond.pooled, captions.pooled[torch.tensor([0, 1, 0, 1, 0])])
    assert _conditions(model, torch.arange(5), None).label.tolist() == [0, 1, 2, 0, 1]


def test_another_kind_or_number_is_named_and_noise_of_a_step_is_left_out(model):
    resolved = Resolved("folder", model)
    chosen = _settings(resolved, {"kind": "ddim", "steps": 4})
    assert (chosen.to_json()["kind"], chosen.sampler.steps) == ("ddim", 4)
    with pytest.raises(
        ValueError, match=r"the steps of 'heun' cannot be chosen: name --sampler ddim, dpm_solver, unipc"
    ):
        _settings(resolved, {"kind": "heun", "steps": 4})
