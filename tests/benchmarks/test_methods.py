"""The comparison of training methods: rows that are there are not trained again, and differences are paired by seed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import methods
from benchmarks.images import RealImages
from ddpm.quality import FeatureMoments
from pipelines.config import compose
from pipelines.evaluation.evaluators.base import Encoded, Evaluator
from pipelines.shards.read import Batch
from pipelines.training.loop.state import make_network

TINY = ["model.channels=[8]", "model.norm_groups=4", "model.head_dim=8", "model.attention=[true]", "images=16"]
BASE = ["+experiment=digits", *TINY, "model.layers_per_block=1", "batch_size=8", "data.lanes=4", "sampler.steps=2"]


class Means:
    """An encoder whose features are the means of rows."""

    width = 8

    def __call__(self, images):
        return Encoded(images.float().mean(3).flatten(1), None)

    def to(self, device):
        return self


@pytest.fixture
def published(tmp_path, monkeypatch):
    """What is published, with a plan of tiny trainings in place of the real one."""
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(torch.arange(40), images, torch.arange(40) % 10)
    evaluator = Evaluator(Means(), "classifier", "0" * 64, "nowhere", "none", labels=True, accuracy=None)
    reference = FeatureMoments.of(Means()(images * 255).features)
    real = RealImages(batch, batch, evaluator, reference)
    base = (*BASE, "objective.prediction=v")
    plan = methods.Plan(methods.METHODS, base, range(2), 20, real, tmp_path, torch.device("cpu"))
    found = []
    monkeypatch.setattr(methods, "make_plan", lambda options: plan)
    monkeypatch.setattr(methods, "publish", lambda result, name, options: found.append(result))
    return found


def test_a_run_that_was_cut_off_trains_only_what_is_missing(published, tmp_path, monkeypatch):
    methods.main(["--methods", "base,muon", "--part", "1/4"])  # (base, 0)
    assert [(row["method"], row["seed"]) for row in published[-1]["rows"]] == [("base", 0)]
    assert published[-1]["missing"] == ["muon, seed 0", "base, seed 1", "muon, seed 1"]
    measured = []
    measure = methods.measure

    def noted(plan, *row):
        measured.append(row)
        return measure(plan, *row)

    monkeypatch.setattr(methods, "measure", noted)
    methods.main(["--methods", "base,muon"])
    assert measured == [("muon", 0), ("base", 1), ("muon", 1)]
    assert published[-1]["missing"] == []
    assert len(list((tmp_path / "rows").glob("*.json"))) == 4
    low, high = published[-1]["rows"][0]["interval"]
    assert low < published[-1]["rows"][0]["distance"] < high


def test_the_difference_to_the_plain_training_is_paired_by_seed(published, tmp_path):
    plan = methods.make_plan(None)
    for method, distances in {"base": [5.0, 9.0], "muon": [4.0, 7.0]}.items():
        for seed, distance in enumerate(distances):
            row = {"method": method, "seed": seed, "distance": distance}
            methods.write(plan.path(method, seed), row)
    methods.main(["--methods", "base,muon"])
    table = published[-1]["methods"]
    assert table["base"] == {"seeds": 2, "distance": 7.0, "distance_standard_error": 2.0}
    assert table["muon"]["difference_to_base"] == -1.5
    assert table["muon"]["difference_to_base_standard_error"] == 0.5
    assert json.dumps(published[-1])  # as it is published


def test_every_method_is_a_configuration_and_all_see_equally_many_images():
    plan = methods.Plan(
        methods.METHODS, ("+experiment=digits", "objective.prediction=v"), range(1), 1, None, None, None
    )
    identities = {name: plan.config(name, 0).identity() for name in methods.METHODS}
    assert len({json.dumps(identity, sort_keys=True) for identity in identities.values()}) == len(methods.METHODS)
    size = compose(["+experiment=digits"]).batch_size
    assert identities["batch_x2+sqrt"]["batch_size"] == 2 * size
    assert identities["batch_x2+sqrt"]["optim.lr_scaling"] == ["sqrt", size]
    assert identities["edm"]["objective.prediction"] == "x0_skip"
    assert len({plan.config(name, 0).images for name in methods.METHODS}) == 1


def test_a_method_is_also_given_as_the_settings_that_it_changes(published):
    methods.main(["--methods", "base,optim.lr=0.01+optim.betas=[0.9,0.9]", "--part", "2/4"])
    assert [row["method"] for row in published[-1]["rows"]] == ["optim.lr=0.01+optim.betas=[0.9,0.9]"]
    config = methods.make_plan(None).config("optim.lr=0.01+optim.betas=[0.9,0.9]", 0)
    assert (config.optim.lr, config.optim.betas) == (0.01, (0.9, 0.9))
    with pytest.raises(SystemExit):
        methods.main(["--methods", "base,nothing"])


@pytest.mark.parametrize("side", [32, 64])
def test_networks_are_compared_at_equal_time_and_similar_size(side, tmp_path):
    places = ("storage=file", f"storage.root=file://{tmp_path}", "data=folder", f"data.image_size={side}")
    base = (*places, "data.num_classes=3", "data.channels=3", *methods.SHORT)
    rates = dict(zip(methods.NETWORKS, (40.0, 41.0, 70.0, 70.0, 60.0, 100.0), strict=True))
    of = methods.networks(side)
    plan = methods.Plan(of, base, range(1), 1, None, None, torch.device("cpu"), rates, 10.0)
    found = {name: plan.config(name, 0) for name in of}
    assert tuple(found) == methods.NETWORKS
    assert [config.images for config in found.values()] == [384, 416, 704, 704, 608, 992]
    patches = {name: side // config.model.patch_size for name, config in found.items() if "unet" not in name}
    assert patches == {"dit": 8, "dit_flow": 8, "jit_fine": 8, "jit_coarse": 4}
    millions = [sum(p.numel() for p in make_network(config).parameters()) / 1e6 for config in found.values()]
    assert max(millions) < 2.2 * min(millions)
    objectives = {name: (config.schedule.kind, config.objective.prediction) for name, config in found.items()}
    flow, jit = ("flow", "flow"), ("flow", "x0")
    assert list(objectives.values()) == [("cosine", "v"), flow, ("cosine", "v"), flow, jit, jit]


def test_the_interval_of_a_difference_holds_what_trainings_differ_by():
    found = methods.difference("d", [1.0, 2.0, 3.0])
    low, high = found["d_interval"]
    assert (found["d"], round(high - low, 3)) == (2.0, round(2 * 4.302652729911275 / 3**0.5, 3))
    assert "d_interval" not in methods.difference("d", [1.0])


def test_rates_are_measured_once(published, tmp_path, monkeypatch):
    told = iter([5.0, 50.0, 7.0, 40.0, 6.0, 45.0, 5.0, 44.0, 5.0, 43.0])
    monkeypatch.setattr(methods, "measure_training", lambda config, device, seconds: next(told))
    plan = methods.make_plan(None)
    assert methods.measured_rates(plan, ["base", "muon"], 1.0) == {"base": 7.0, "muon": 50.0}
    assert methods.measured_rates(plan, ["muon"], 1.0) == {"muon": 50.0}
