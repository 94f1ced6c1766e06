import pytest
import torch

from ddpm.guidance import ClassifierFree, classifier_free
from ddpm.prediction import Conditioning
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser

SCHEDULE = make_schedule("cosine")
EXACT = GaussianDenoiser(SCHEDULE)
X, T = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.full((4,), 300.0)
LABELS = Conditioning(label=torch.arange(4))


class Counting:
    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, cond=None):
        self.batches.append(len(x_t))
        return EXACT(x_t, t, cond)


def test_scale_zero_is_exactly_unconditional_and_one_exactly_conditional():
    for scale, cond in ((0.0, None), (1.0, LABELS)):
        counting = Counting()
        guided = classifier_free(counting, SCHEDULE, scale)(X, T, LABELS)
        assert torch.equal(guided.x0, EXACT(X, T, cond).x0)
        assert counting.batches == [4]


def test_other_scales_extrapolate_from_null_to_conditional_in_one_batch():
    counting = Counting()
    guided = classifier_free(counting, SCHEDULE, 3.0)(X, T, LABELS)
    null, conditional = EXACT(X, T, None), EXACT(X, T, LABELS)
    torch.testing.assert_close(guided.eps, null.eps + 3 * (conditional.eps - null.eps))
    torch.testing.assert_close(guided.x0, null.x0 + 3 * (conditional.x0 - null.x0))
    assert counting.batches == [8]


def test_samples_that_are_dropped_already_stay_unconditional():
    dropped = LABELS.dropped(torch.ones(4, dtype=torch.bool))
    guided = classifier_free(EXACT, SCHEDULE, 3.0)(X, T, dropped)
    torch.testing.assert_close(guided.x0, EXACT(X, T, None).x0)


def test_outside_its_interval_guidance_leaves_the_conditional_model_alone():
    guided = ClassifierFree(EXACT, 3.0, interval=(0.4, 0.8), num_steps=1000)
    assert torch.equal(guided(X, T, LABELS).x0, EXACT(X, T, LABELS).x0)
    inside = torch.full((4,), 500.0)
    assert not torch.equal(guided(X, inside, LABELS).x0, EXACT(X, inside, LABELS).x0)
    with pytest.raises(ValueError, match="low <= high"):
        ClassifierFree(EXACT, 3.0, interval=(0.8, 0.4))
