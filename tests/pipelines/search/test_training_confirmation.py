"""Which trained models are confirmed, and on which images."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from ddpm.model import Model, ModelSpec
from ddpm.models.unet import UNet
from ddpm.quality import FeatureMoments
from pipelines.checkpoints import ModelError, references
from pipelines.config import ConfigError, compose
from pipelines.evaluation.actors import Drawer
from pipelines.evaluation.compare import Distance
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.contrastive import Contrastive
from pipelines.evaluation.images import to_levels
from pipelines.evaluation.likelihoods import held_out_images
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.real import Real, RealSplit
from pipelines.search.confirmation import DEFAULT
from pipelines.search.study import TrialRecord, trial_name
from pipelines.search.study_config import StudyConfig
from pipelines.search.training_search import TrainingSearch, chosen, fresh_images
from pipelines.signing import Derived
from pipelines.storage import Storage
from tests.pipelines.captioned import WIDTH
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.evaluation.in_process import draw_here
from tests.pipelines.evaluation.test_prompts import some_captions

BASE = compose(["+experiment=digits"])


def study(**options):
    plain = {"kind": "training", "trials": 4, "confirm": 2, "space": {"optim.lr": {"log": [1e-4, 1e-2]}}, **options}
    return StudyConfig.model_validate(plain)


def trial(lr, distance, state="finished"):
    params = {"optim.lr": lr}
    return TrialRecord(trial_name(params), params, state, {"frechet_distance": distance})


def test_the_best_trials_that_trained_to_their_end_are_compared_with_the_configuration_as_it_stands():
    default = trial(BASE.optim.lr, 5.0)
    records = [default, trial(0.003, 4.0), trial(0.004, 1.0, "stopped"), trial(0.005, 9.0), trial(0.006, 3.0)]
    found = chosen(study(), BASE, records)
    assert list(found.values()) == [default, records[4], records[1]]
    assert [*found] == [DEFAULT, records[4].trial, records[1].trial]


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_nothing_is_confirmed_where_the_default_has_no_trained_model(state):
    assert chosen(study(), BASE, [trial(BASE.optim.lr, 5.0, state), trial(0.003, 4.0)]) == {}


def stored(count):
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return held_out_images(SimpleNamespace(held_out=lambda: (images, np.arange(count))), None)


def test_bits_per_dim_are_confirmed_on_test_images_that_have_judged_no_trial():
    bits = study(objectives=["bits_per_dim"], bits_per_dim_images=64)
    images, cond = fresh_images(bits, *stored(100))
    assert cond.present == ("label",)
    assert cond.label.tolist() == list(range(64, 100))
    assert images.flatten()[0] == pytest.approx(64 / 127.5 - 1)
    with pytest.raises(ConfigError, match=r"of the 90 stored test images 32 at least .* use 58 at most"):
        fresh_images(bits, *stored(90))
    fresh_images(study(), *stored(10))  # the distance decides: no test image is needed


class Bench:
    """A study's models and data, with Ray's tasks run in this process."""

    base = compose(
        [
            "+experiment=digits",
            "data.num_classes=0",
            "model.class_conditional=false",
            "guidance=none",
            "sampler.steps=2",
            "evaluation.batch_size=32",
            "storage=file",
            "storage.root=file:///nowhere",
        ]
    )

    def __init__(self, monkeypatch, folder):
        self.base = self.base.model_copy(
            update={"storage": self.base.storage.model_copy(update={"root": f"file://{folder}"})}
        )
        self.evaluator = Evaluator(
            Contrastive(1, 8).eval(), "contrastive", "d", "here", "none", labels=False, accuracy=None
        )
        images = torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        features = self.evaluator.encoder(images).features.numpy()
        rows = {"features": features, "labels": np.full(120, -1), "reference": np.ones(120, bool)}
        rows["pixels"] = np.zeros((120, 1, 8, 8), np.uint8)
        stored = Derived(Storage(), f"file://{folder}", "real.json", "the real images")
        contents = {f"{split}-000000000.safetensors": save(rows) for split in ("train", "test")}
        contents["held-out.safetensors"] = save({"images": images.numpy()})
        files = {name: stored.write(name, content) for name, content in contents.items()}
        split = RealSplit(120, (), FeatureMoments.of(torch.from_numpy(features)))
        self.real = Real(stored, files, "s", split, split, features.shape[1], (1, 8, 8))
        self.images, self.models, self.said = images, {}, []
        self.units, self.ends_at = [], 1_000
        monkeypatch.setattr(references, "resolve", self.resolve)
        draw_here(monkeypatch)
        generate = Drawer._generate

        def noted(drawer, unit, *given):
            if unit.stop - unit.first > 1:  # not to count its network evaluations
                if len(self.units) == self.ends_at:
                    raise KeyboardInterrupt
                self.units.append(unit)
            return generate(drawer, unit, *given)

        monkeypatch.setattr(Drawer, "_generate", noted)

    def resolve(self, reference, **_):
        if reference not in self.models:
            raise ModelError(f"{reference}: no such published checkpoint")
        return SimpleNamespace(model=self.models[reference], published=None)

    def trained(self, run_id, lr, distance, text_dim=0, classes=()):
        """The record of a trial that trained to its end, and its model."""
        torch.manual_seed(int(run_id, 16))
        network = replace(SMALL, num_classes=len(classes), text_dim=text_dim)
        spec = ModelSpec(network, {"kind": "cosine", "num_steps": 20}, "v", 8, classes)
        self.models[f"runs:/{run_id}/640"] = Model(spec, UNet(network).eval())
        scores = {"frechet_distance": distance, "bits_per_dim": distance, "images_seen": 640.0}
        return replace(trial(lr, distance), scores=scores, run_id=run_id)

    def confirm(self, study, records, captions=None, held=None):
        search = TrainingSearch(self.base, "s", study, lambda stage, text: self.said.append(text), {})
        search.base = self.base
        prompts = None if captions is None else Prompts(captions, held, False, None)
        search.data = SimpleNamespace(
            evaluator=self.evaluator, real=self.real, config=self.base, storage=Storage(), prompts=lambda spec: prompts
        )
        search.fresh = fresh_images(study, *held_out_images(self.real, held))
        return search.confirm(records, seed=6)


@pytest.fixture
def bench(monkeypatch, tmp_path, home):
    torch.manual_seed(0)
    return Bench(monkeypatch, tmp_path)


def test_trained_models_are_judged_by_new_samples_on_the_noise_of_the_confirmation(bench):
    records = [bench.trained("a1", BASE.optim.lr, 5.0), bench.trained("b2", 0.003, 4.0)]
    found = {c.trial: c for c in bench.confirm(study(confirm_samples=64), records)}
    assert set(found) == {DEFAULT, records[1].trial}
    assert {unit.seed for unit in bench.units} == {6}
    wanted = bench.models["runs:/b2/640"].generate(
        None, seed=6, sampling=found[DEFAULT].settings, image_ids=torch.arange(64), batch_size=64
    )
    features = bench.evaluator.encoder(to_levels(wanted)).features
    value = Distance.of(bench.real)(features).value
    assert found[records[1].trial].distance.value == pytest.approx(value, rel=1e-3)
    assert found[DEFAULT].params == {"optim.lr": BASE.optim.lr}


def test_a_study_of_bits_per_dim_is_decided_by_the_bound_of_unseen_test_images(bench):
    records = [bench.trained("a1", BASE.optim.lr, 5.0), bench.trained("b2", 0.003, 4.0)]
    found = bench.confirm(study(objectives=["bits_per_dim"], confirm_samples=64), records)
    assert {c.measure for c in found} == {"bits_per_dim"}
    assert {c.distance.n for c in found} == {(120 - 64,)}


def test_models_on_text_are_confirmed_by_captions(bench):
    drawn, held = (some_captions([f"{word} {i}" for i in range(n)]) for word, n in (("a", 7), ("b", 120)))
    records = [bench.trained("a1", BASE.optim.lr, 5.0, WIDTH), bench.trained("b2", 0.003, 4.0, WIDTH)]
    seen = []
    bench.models["runs:/b2/640"].network.register_forward_pre_hook(lambda module, given: seen.extend(given[2:]))
    bench.confirm(study(objectives=["bits_per_dim"], confirm_samples=64), records, drawn, held)
    assert torch.equal(seen[-1].pooled, held.pooled[64:])
    places = Prompts(drawn, held, False, None).plan.rows(64, 6)
    assert torch.equal(seen[0].pooled, drawn.pooled[places[:32]])


@pytest.mark.parametrize("default, other", [((), ("a", "b")), (("a", "b"), ())])
def test_each_model_is_confirmed_by_the_classes_that_it_has_whatever_the_default_has(bench, default, other):
    bench.real = replace(bench.real, train=replace(bench.real.train, class_counts=(60, 60)))
    records = [bench.trained("a1", BASE.optim.lr, 5.0, classes=default), bench.trained("b2", 0.003, 4.0, classes=other)]
    labels = {"a1": [], "b2": []}
    for run_id, seen in labels.items():

        def note(module, given, seen=seen):
            seen += [cond.label.unique().tolist() for cond in given[2:] if cond is not None]

        bench.models[f"runs:/{run_id}/640"].network.register_forward_pre_hook(note)
    found = bench.confirm(study(confirm_samples=64), records)
    assert {c.trial for c in found} == {DEFAULT, records[1].trial}
    for run_id, classes in (("a1", default), ("b2", other)):
        assert {number for asked in labels[run_id] for number in asked} == ({0, 1} if classes else set())


def test_a_trial_whose_model_is_gone_is_left_out_and_without_the_default_nothing_is_confirmed(bench):
    records = [bench.trained("a1", BASE.optim.lr, 5.0), bench.trained("b2", 0.003, 4.0), trial(0.004, 3.0)]
    records[2] = replace(records[2], run_id="c3", scores={**records[2].scores, "images_seen": 640.0})
    found = bench.confirm(study(confirm_samples=64), records)
    assert {c.trial for c in found} == {DEFAULT, records[1].trial}
    assert bench.said == [f"trial {records[2].trial} is not confirmed: runs:/c3/640: no such published checkpoint"]
    del bench.models["runs:/a1/640"]
    assert bench.confirm(study(confirm_samples=64), records) == []
    assert "nothing is confirmed" in bench.said[-1]


def test_a_confirmation_that_was_broken_off_goes_on_and_draws_only_what_is_missing(bench):
    records = [bench.trained("a1", BASE.optim.lr, 5.0), bench.trained("b2", 0.003, 4.0)]
    asked = study(confirm_samples=64)
    bench.ends_at = 3  # of 2 units of each model
    with pytest.raises(KeyboardInterrupt):
        bench.confirm(asked, records)
    drawn, bench.units, bench.ends_at = bench.units, [], 1_000
    resumed = bench.confirm(asked, records)
    assert [(unit.first, unit.stop) for unit in drawn + bench.units] == [(0, 32), (32, 64)] * 2
    again = bench.confirm(asked, records)
    assert len(bench.units) == 1
    assert [c.distance.value for c in again] == [c.distance.value for c in resumed]
    assert [c.scores for c in again] == [c.scores for c in resumed]
