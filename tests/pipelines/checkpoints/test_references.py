import json
import math
from dataclasses import replace

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec, load_model, save_guides, save_model
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet
from pipelines import tracking
from pipelines.checkpoints import ModelError
from pipelines.checkpoints.lookup import judged_as_before
from pipelines.checkpoints.references import guided, resolve
from pipelines.config import compose
from pipelines.storage import Storage
from pipelines.tracking import TrackingError
from tests.pipelines.checkpoints.tiny import SMALL

CLASSES = ("a", "b")
UNET = replace(SMALL, num_classes=2)
SPEC = ModelSpec(UNET, {"kind": "cosine", "num_steps": 50}, "v", 8, CLASSES)


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nowhere", "names no model"),
        ("runs:/abc", "needs an MLflow server"),
        ("models:/x@y", "needs an MLflow server"),
    ],
)
def test_references_that_name_nothing_say_what_a_reference_is(reference, message):
    with pytest.raises(ModelError, match=message):
        resolve(reference, tracking_uri=None, storage=Storage())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_weights_are_no_numbers_is_not_drawn_from(tmp_path, value):
    weights = UNet(UNET).state_dict()
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], value)
    save_model(tmp_path / "diverged", SPEC, weights)
    with pytest.raises(ModelError, match=r"weights in conv_out\.bias are not finite numbers, so its training"):
        resolve(str(tmp_path / "diverged"), tracking_uri=None, storage=Storage())


@pytest.mark.parametrize("reference", ["runs:/XYZ", "runs:/abc/worst", "runs:/abc/sigma_rel=2", "runs:/abc/best/100"])
def test_a_run_is_named_by_id_and_images_or_the_best_and_a_width(reference):
    with pytest.raises(ModelError, match=r"write runs:/ID, runs:/ID/IMAGES or runs:/ID/best, and /sigma_rel=0.1"):
        resolve(reference, tracking_uri="http://127.0.0.1:9", storage=Storage())


class Run:
    """An MLflow run with a configuration, or without one."""

    def __init__(self, config):
        self.config = config

    def names(self):
        if self.config == "deleted":
            raise TrackingError("no such run", 404)
        return ["model"] if self.config is None else ["config.json", "model"]

    def read_text(self, name):
        return json.dumps(self.config)


def test_a_model_is_judged_as_by_its_run_but_for_what_overrides_set(monkeypatch):
    recorded = ["evaluation.n=64", "evaluation.seeds=2", "evaluation.evaluator=contrastive", "registry.n=80"]
    run = Run(compose([*recorded, "registry.model=photos", "evaluation.actors=7"]).model_dump(mode="json"))
    monkeypatch.setattr(tracking, "get_run", lambda uri, run_id: run)
    given = ["evaluation.n=32", "tracking.uri=http://127.0.0.1:9"]
    plain = compose(given)
    found = judged_as_before(plain, given, "runs:/abc/best")
    judged = found.evaluation
    assert (judged.n, judged.seeds, judged.evaluator, judged.actors) == (32, 2, "contrastive", None)
    assert (found.registry.model, found.registry.n) == ("photos", 80)
    assert found.model_copy(update={"evaluation": plain.evaluation, "registry": plain.registry}) == plain
    run.config["evaluation"].pop("seeds")  # of a release that did not have it
    assert judged_as_before(plain, given, "runs:/abc").evaluation.seeds == plain.evaluation.seeds
    for without in (None, "deleted"):
        run.config = without
        assert judged_as_before(plain, given, "runs:/abc") == plain
    assert judged_as_before(plain, given, "folder") == plain


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "weak", SPEC, UNet(UNET).state_dict())
    noisier = replace(SPEC, schedule={"kind": "linear", "num_steps": 50})
    save_model(tmp_path / "noisier", noisier, UNet(UNET).state_dict())
    spec = replace(SPEC, task="classifier")
    save_model(tmp_path / "classifier", spec, NoisyClassifier(UNET, 2).state_dict())
    spec = replace(spec, classes=("a", "b", "c"))
    save_model(tmp_path / "classifier3", spec, NoisyClassifier(UNET, 3).state_dict())
    return tmp_path


def find(folders, **settings):
    model = Model(SPEC, UNet(UNET).eval())
    return guided(model, Sampling.of(**settings), None, Storage())


def test_a_model_finds_the_networks_that_guide_it(folders):
    alone = find(folders)
    assert (alone.classifier, alone.weak) == (None, None)
    assert isinstance(
        find(folders, guidance="classifier", classifier=f"{folders}/classifier").classifier, NoisyClassifier
    )
    auto = Sampling.of(guidance="auto", weak=f"{folders}/weak", scale=2.0, steps=3)
    model = guided(alone, auto, None, Storage())
    labels = torch.tensor([0, 1])
    assert not torch.allclose(
        model.generate(labels, sampling=auto), model.generate(labels, sampling=Sampling.of(steps=3))
    )


def test_a_network_that_came_with_the_model_is_not_looked_for_again(folders):
    auto = Sampling.of(guidance="auto", weak="gone", scale=2.0)
    weak = Model(SPEC, UNet(UNET).eval())
    model = Model(replace(SPEC, sampling=auto), UNet(UNET).eval(), weak=weak)
    assert guided(model, auto.with_fields(scale=3.0), None, Storage()).weak is weak
    with pytest.raises(ModelError, match="other names no model"):
        guided(model, auto.with_fields(weak="other"), None, Storage())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance": "classifier", "classifier": "weak"}, r"guidance.classifier = .*holds a denoiser"),
        (
            {"guidance": "classifier", "classifier": "classifier3"},
            r"does not go with the model:\n  classes: \('a', 'b', 'c'",
        ),
        ({"guidance": "auto", "weak": "noisier"}, r"guidance.weak = .*\n  schedule: .*linear.* there, .*cosine"),
        ({"guidance": "auto", "weak": "classifier"}, "which cannot sample"),
        ({"guidance": "auto", "weak": "nowhere"}, "names no model"),
    ],
)
def test_a_network_that_does_not_go_with_the_model_is_refused(folders, settings, message):
    named = {k: f"{folders}/{v}" if k in ("classifier", "weak") else v for k, v in settings.items()}
    with pytest.raises(ModelError, match=message):
        find(folders, **named)


def test_a_model_folder_whose_settings_name_a_guide_brings_it_along(folders):
    sampling = Sampling.of(guidance="auto", weak=f"{folders}/weak", scale=2.0, steps=3)
    save_model(folders / "guided", replace(SPEC, sampling=sampling), UNet(UNET).state_dict())
    model = resolve(f"{folders}/guided", tracking_uri=None, storage=Storage()).model
    assert model.weak is not None
    assert model.generate(torch.tensor([1])).shape == (1, 1, 8, 8)


TEXT = replace(UNET, num_classes=0, text_dim=4)
OF_TEXT = replace(SPEC, network=TEXT, classes=(), lineage={"text_encoder_digest": "d"})


def test_a_classifier_of_texts_guides_a_model_on_the_same_texts(tmp_path):
    torch.manual_seed(0)
    weights = NoisyClassifier(TEXT, 4, text=True).state_dict()
    save_model(tmp_path / "reader", replace(OF_TEXT, task="classifier"), weights)
    model, sampling = (
        Model(OF_TEXT, UNet(TEXT).eval()),
        Sampling.of(guidance="classifier", classifier=f"{tmp_path}/reader"),
    )
    found = guided(model, sampling, None, Storage())
    assert found.classifier.text
    cond = Conditioning(pooled=torch.randn(2, 4), text=torch.randn(2, 3, 4))
    plain = Sampling.of(steps=3, scale=0.0)
    drawn = found.generate(None, text=cond, sampling=sampling.with_fields(scale=30.0, steps=3))
    assert not torch.allclose(drawn, found.generate(None, text=cond, sampling=plain))
    save_model(tmp_path / "model", found.spec, found.network.state_dict())
    save_guides(tmp_path / "model", found)
    again = load_model(tmp_path / "model")
    assert torch.equal(again.generate(None, text=cond, sampling=sampling.with_fields(scale=30.0, steps=3)), drawn)
    other = replace(model, spec=replace(OF_TEXT, lineage={"text_encoder_digest": "other"}))
    with pytest.raises(ModelError, match="text_encoder_digest: d there, other in the model"):
        guided(other, sampling, None, Storage())
    with pytest.raises(ModelError, match="text_dim: 4 there, 0 in the model"):
        guided(Model(SPEC, UNet(UNET).eval()), sampling, None, Storage())


def test_a_model_keeps_the_text_encoder_that_its_folder_carries(tmp_path):
    torch.manual_seed(0)
    lineage = {"text_encoder": "/gone/model"}
    save_model(tmp_path / "named", replace(OF_TEXT, lineage=lineage), UNet(TEXT).state_dict())
    assert resolve(str(tmp_path / "named"), tracking_uri=None, storage=Storage()).text_encoder == "/gone/model"
    (tmp_path / "named" / "text_encoder").mkdir()
    carried = resolve(str(tmp_path / "named"), tracking_uri=None, storage=Storage())
    assert carried.text_encoder == str((tmp_path / "named" / "text_encoder").resolve())
