"""A picture of a seed, number, class and setting is one, whoever asks for it: judged is what is served."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.inference import Noise, draw, draw_table
from ddpm.model import load_model
from pipelines.evaluation.actors import _SamplingActor
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.classifier import Classifier
from pipelines.evaluation.images import unpack_samples
from pipelines.evaluation.samples import Plan
from pipelines.search.judge import SampleScorer, Subject
from pipelines.storage import Storage
from tests.pipelines.test_earlier_release import EARLIER

COUNT, SEED = 6, 11
SETTINGS = [
    Sampling.of(steps=4, scale=2.0),
    Sampling.of(kind="ancestral", steps=5),
    Sampling.of(kind="dpm_solver", steps=4, interval=(0.2, 0.8), scale=1.5),
]


def judged(model, settings, tmp_path):
    """By evaluations and the gate; (pictures, their labels)."""
    evaluator = SimpleNamespace(digest="e" * 32, encoder=Classifier(1, 8, 10).eval())
    plan = Plan("digest", settings, COUNT, (SEED,), (5,) * 10, COUNT, f"file://{tmp_path}")
    (unit,) = plan.units()
    _SamplingActor((model, evaluator, None), Storage()).draw(unit, plan, {})
    images, finite = unpack_samples(Storage().read(f"{plan.folder}/{unit.path(unit.shard)}"), 1)
    assert finite.all()
    return images, torch.from_numpy(unit.labels)


def of_a_trial(model, settings, labels):
    """By a study of guidance."""
    judge = Classifier(1, 8, 10).eval()
    evaluator = Evaluator(judge, "classifier", "d", "here", "none", labels=True, accuracy=None)
    scorer = SampleScorer(Subject(model, evaluator, None, None, labels))
    return scorer.draw(settings, torch.arange(COUNT), seed=SEED, keep=COUNT).pixels


@pytest.mark.parametrize("settings", SETTINGS, ids=["ddim", "ancestral", "dpm_solver"])
def test_evaluation_gate_study_preview_command_and_registered_model_draw_the_same_to_the_bit(settings, tmp_path):
    torch.set_num_threads(1)
    model = load_model(EARLIER / "version" / "model")
    expected, labels = judged(model, settings, tmp_path)
    assert expected.std() > 30
    assert len({image.tobytes() for image in expected}) == COUNT

    cond = Conditioning(label=labels)
    asked = draw(model, Noise.numbered(SEED, COUNT), cond, sampling=settings).images
    preview = generate(  # as a training does, which has no `Model`
        model.denoiser, model.schedule, settings, cond=cond, shape=model.spec.shape, seed=SEED, count=COUNT
    )
    found = {
        "study": of_a_trial(model, settings, labels),
        "command and server": to_uint8(asked).numpy(),
        "preview": to_uint8(preview).numpy(),
        "registered model": draw_table(
            model, {"label": [model.spec.classes[label] for label in labels]}, {"seed": SEED, **changed(settings)}
        ).numpy(),
    }
    for who, pictures in found.items():
        np.testing.assert_array_equal(pictures, expected, err_msg=who)


def changed(settings):
    """The fields of settings by which a request to a registered model asks for them."""
    plain = settings.to_json()
    return {name: plain[name] for name in ("kind", "steps", "scale", "interval", "eta") if name in plain}
