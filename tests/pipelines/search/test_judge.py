"""A trial is ended when another is better for no more money, beyond chance; and is judged on the same images alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.model import Model, ModelSpec
from ddpm.models.classifier import NoisyClassifier
from ddpm.models.unet import UNet
from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.evaluation.compare import measured_frechet
from pipelines.evaluation.evaluators import Evaluator
from pipelines.evaluation.evaluators.classifier import Classifier
from pipelines.evaluation.evaluators.contrastive import Contrastive
from pipelines.evaluation.images import to_levels
from pipelines.search.judge import Reference, TrialSubject, hopeless, rungs
from tests.pipelines.checkpoints.tiny import SMALL
from tests.pipelines.evaluation.in_process import Keeping

CLASSES = ("a", "b")


def judged(distance, error=0.1, evaluations=10, samples=100, own=0.0):
    """A setting whose distance shares an error with all others, and has one of its own, of this standard deviation."""
    alone = torch.randn(400, generator=torch.Generator().manual_seed(int(10 * distance))).double()
    shared = torch.linspace(-2, 2, 400).double()
    return {
        "frechet_distance": distance,
        "influence": ((error * alone + own * shared) * 400**0.5).float().numpy(),
        "evaluations": evaluations,
        "samples": samples,
    }


@pytest.mark.parametrize(
    "mine, other, ended",
    [
        (judged(6.0), judged(5.0), True),
        (judged(5.3), judged(5.0), False),  # 0.3 is 2.1 of its errors: chance at 1 %
        (judged(6.0, own=3.0), judged(5.0, own=3.0), True),  # what both have in common does not count
        (judged(6.0, own=3.0), judged(5.0, own=-3.0), False),
        (judged(5.4), judged(5.0), True),
        (judged(6.0, evaluations=9), judged(5.0), False),  # cheaper: it may be on the front
        (judged(6.0), judged(5.0, samples=50), False),  # distances of different numbers of samples do not compare
        (judged(5.0), judged(6.0), False),
    ],
)
def test_the_test_is_one_sided_at_equal_samples_and_no_higher_cost(mine, other, ended):
    assert hopeless(mine, [other]) is ended
    assert hopeless(mine, [judged(9.0), other]) is ended


def test_the_first_trial_has_nothing_to_lose_to():
    assert not hopeless(judged(1e9), [])


@pytest.mark.filterwarnings("error")
def test_read_only_influences_as_ray_delivers_them_are_compared_without_a_warning():
    influence = np.ones(2, dtype=np.float32)
    influence.flags.writeable = False
    reported = {"frechet_distance": 1.0, "evaluations": 10.0, "samples": 2, "influence": influence}
    torch.set_warn_always(True)  # another test of the process may have had the warning already
    try:
        assert not hopeless(reported, [reported])
    finally:
        torch.set_warn_always(False)


@given(st.integers(4, 10_000), st.integers(1, 12))
def test_rungs_grow_to_the_number_of_samples(samples, count):
    found = rungs(samples, count)
    assert found == sorted(set(found))
    assert found[-1] == samples
    assert min(found) >= min(4, samples)
    assert len(found) <= count


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    network = replace(SMALL, num_classes=2)
    spec = ModelSpec(network, {"kind": "cosine", "num_steps": 50}, "v", 8, CLASSES)
    evaluator = Evaluator(Classifier(1, 8, 2).eval(), "classifier", "d", "here", "none", labels=True, accuracy=0.5)
    real = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = evaluator.encoder(to_levels(real)).features
    model = Model(spec, UNet(network).eval().requires_grad_(False))
    weak = Model(spec, UNet(network).eval().requires_grad_(False))
    classifier = NoisyClassifier(network, 2).eval().requires_grad_(False)
    guides = {"weaker": weak, "judge": classifier}
    return TrialSubject(
        model,
        evaluator,
        Reference(FeatureMoments.of(features), features),
        Conditioning(label=torch.arange(60) % 2),
        guides,
    )


@pytest.mark.parametrize(
    "settings, evaluations",
    [
        (Sampling.of(scale=1.0, kind="ddim", steps=4), 4),
        (Sampling.of(scale=0.0, kind="ddim", steps=4), 4),
        (Sampling.of(scale=2.0, kind="ddim", steps=4), 8),
        (Sampling.of(scale=1.0, kind="heun", steps=3), 4),  # first and last step have no second half
        (Sampling.of(scale=2.0, interval=(0.0, 0.5), kind="ddim", steps=4), 6),
        (Sampling.of(scale=2.0, guidance="auto", weak="weaker", steps=4), 8),
        (Sampling.of(scale=1.0, guidance="auto", weak="weaker", steps=4), 4),
    ],
)
def test_cost_is_what_the_network_was_really_asked(subject, settings, evaluations):
    drawn = subject.draw(settings, torch.arange(6), seed=1)
    assert drawn.evaluations == evaluations


def test_a_classifier_that_guides_costs_its_way_there_and_back(subject):
    settings = Sampling.of(scale=2.0, guidance="classifier", classifier="judge", steps=4)
    drawn = subject.draw(settings, torch.arange(6), seed=1)
    # Half a network, three times (there, and back to the image and no further): less than two evaluations more a step.
    assert 4 * 1.2 < drawn.evaluations < 4 * 3


def test_guides_change_what_is_drawn(subject):
    image_ids = torch.arange(6)
    plain = Sampling.of(steps=4)
    others = [
        Sampling.of(scale=3.0, guidance="auto", weak="weaker", steps=4),
        Sampling.of(scale=3.0, guidance="classifier", classifier="judge", steps=4),
    ]
    alone = subject.draw(plain, image_ids, seed=1).features
    for settings in others:
        assert not torch.allclose(subject.draw(settings, image_ids, seed=1).features, alone)
    same = Sampling.of(scale=1.0, guidance="auto", weak="weaker", steps=4)
    assert torch.equal(subject.draw(same, image_ids, seed=1).features, alone)
    with pytest.raises(ValueError, match="autoguidance needs a weaker model"):
        subject.draw(Sampling.of(guidance="auto", weak="elsewhere", steps=4), image_ids, seed=1)


def test_rungs_add_up_to_the_whole(subject):
    settings, keeping = Sampling.of(kind="ddim", steps=2), Keeping(subject.evaluator.encoder)
    subject = replace(subject, evaluator=replace(subject.evaluator, encoder=keeping))
    parts = [subject.draw(settings, torch.arange(a, b), seed=3) for a, b in ((0, 6), (6, 10), (10, 24))]
    whole = subject.draw(settings, torch.arange(24), seed=3)
    together = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(together.features, whole.features, rtol=1e-4, atol=1e-5)
    assert together.evaluations == whole.evaluations == 2
    assert torch.equal(together.correct, whole.correct)
    assert (keeping.pixels[:24] == keeping.pixels[24:]).all()
    found, influence = subject.reference.scores(whole.features, whole.accuracy, whole.evaluations)
    assert found["samples"] == 24
    assert {"precision", "recall", "class_accuracy", "standard_error"} <= found.keys()
    assert found["standard_error"] == pytest.approx(influence.std().item() / 24**0.5)
    assert found["frechet_distance"] == pytest.approx(
        frechet_distance(subject.reference.moments, FeatureMoments.of(whole.features))
    )


def test_an_evaluator_without_labels_judges_by_its_features_alone(subject):
    evaluator = Evaluator(Contrastive(1, 8).eval(), "contrastive", "d", "here", "none", labels=False, accuracy=None)
    drawn = replace(subject, evaluator=evaluator).draw(Sampling.of(steps=2), torch.arange(6), seed=1)
    assert drawn.correct is None
    found, _ = subject.reference.scores(drawn.features, drawn.accuracy, drawn.evaluations)
    assert "class_accuracy" not in found
    assert {"frechet_distance", "precision", "recall"} <= found.keys()


def test_settings_are_told_apart_better_on_the_same_noise(subject):
    image_ids = torch.arange(60)
    one, two = (
        measured_frechet(subject.reference.moments, subject.draw(Sampling.of(steps=n), image_ids, seed=3).features)
        for n in (5, 6)
    )
    assert (one - two).standard_error < one.standard_error / 2
    assert (one - one).standard_error == (one - one).value == 0
