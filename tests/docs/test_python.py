"""The Python of the pages that have no commands runs as it stands, on a network with random weights."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.model import Model, load_model, make_classifier, save_model
from ddpm.samplers import DDIM
from tests.docs.modules import ROOT
from tests.docs.terminal import PYTHON
from tests.pipelines.drawing import model_folder


@pytest.fixture
def model(tmp_path) -> Model:
    drawn = load_model(model_folder(tmp_path / "drawn", classes=[str(digit) for digit in range(10)]))
    spec = replace(drawn.spec, schedule={"kind": "cosine", "num_steps": 1000})
    save_model(tmp_path / "model", spec, drawn.network.state_dict())
    return load_model(tmp_path / "model")


def blocks(path: str) -> list[str]:
    return PYTHON.findall((ROOT / path).read_text())


@pytest.mark.heavy
def test_the_mathematics_is_used_as_its_page_says(model, tmp_path, capsys):
    torch.manual_seed(0)
    classifier = make_classifier(model.spec.network, 10)
    save_model(tmp_path / "classifier", replace(model.spec, task="classifier"), classifier.state_dict())
    left = {"folder": tmp_path / "model", "classifier_folder": tmp_path / "classifier"}
    for block in blocks("docs/mathematics.md"):
        exec(block, left)
    assert left["images"].shape == left["again"].shape == (2, 1, 8, 8)
    (bits,) = re.findall(r"value=([\d.]+)", capsys.readouterr().out)
    assert 1 < float(bits) < 50


def test_the_sampler_that_the_recipe_writes_is_ddim_where_it_damps_nothing(model, tmp_path, monkeypatch):
    (block,) = blocks("CONTRIBUTING.md")
    (tmp_path / "my_package.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    damped = importlib.import_module("my_package").Damped

    def draw(sampler):
        cond = Conditioning(label=torch.tensor([3, 7]))
        given = model.denoiser, model.schedule, Sampling(sampler)
        return generate(*given, cond=cond, shape=model.spec.shape, seed=0)

    assert torch.allclose(draw(damped(steps=4)), draw(DDIM(steps=4)), atol=1e-5)
    assert not torch.allclose(draw(damped(steps=4, damping=0.5)), draw(DDIM(steps=4)), atol=1e-2)
