"""A trial of a guidance study without the Ray Tune around it."""

from dataclasses import replace

import torch

from ddpm.model import Model, ModelSpec
from ddpm.models.unet import UNet
from ddpm.quality import FeatureMoments
from pipelines.config import compose
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.contrastive import Contrastive
from pipelines.search.guidance_search import GuidanceTrial
from pipelines.search.judge import Reference, TrialSubject
from pipelines.search.study_config import StudyConfig
from tests.pipelines.checkpoints.tiny import SMALL


def test_a_model_of_data_without_labels_is_searched_by_a_contrastive_evaluator():
    torch.manual_seed(0)
    network = replace(SMALL, num_classes=0)
    spec = ModelSpec(network, {"kind": "cosine", "num_steps": 20}, "v", 8, ())
    evaluator = Evaluator(Contrastive(1, 8).eval(), "contrastive", "d", "here", "none", labels=False, accuracy=None)
    real = evaluator.encoder(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)).features
    subject = TrialSubject(
        Model(spec, UNet(network).eval()), evaluator, Reference(FeatureMoments.of(real), real), None, {}
    )
    base = compose(["+experiment=digits", "data.num_classes=0", "model.class_conditional=false", "guidance=none"])
    space = {"sampler.steps": {"int": [2, 4]}}
    study = StudyConfig.model_validate({"kind": "guidance", "trials": 2, "samples": 16, "rungs": 2, "space": space})
    trial = GuidanceTrial.__new__(GuidanceTrial)
    trial.setup({"sampler.steps": 2}, subject=subject, study=study, base=base, seed=5)
    first, last = trial.step(), trial.step()
    assert (first["samples"], first["done"], last["samples"], last["done"]) == (8, False, 16, True)
    assert last["evaluations"] == 2
    assert last["frechet_distance"] > 0
    assert "class_accuracy" not in last
    again = trial.subject.draw(trial.settings, torch.arange(16), seed=5)
    torch.testing.assert_close(trial.drawn.features, again.features, rtol=1e-4, atol=1e-5)
    assert last["influence"].shape == (16,)
