import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.gaussian import p_reverse, q_posterior
from ddpm.generate import Sampling
from ddpm.guidance import Autoguided, ClassifierFree, ClassifierGuided, ConditionedOn, Guides
from ddpm.prediction import Clipped, Prediction, coefficients, eps_from_x0
from ddpm.samplers import DDIM, Ancestral, initial_noise, last, step_noise
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, MixtureDenoiser

SCHEDULE = make_schedule("cosine")
EXACT = GaussianDenoiser(SCHEDULE)
GENERATOR = torch.Generator().manual_seed(0)
X, T = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=GENERATOR), torch.full((4,), 300.0)
LABELS = Conditioning(label=torch.arange(4))

MIXTURE = MixtureDenoiser(
    SCHEDULE,
    means=torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], dtype=torch.float64),
    std=0.2,
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
)
X2, T2 = torch.randn(6, 1, 1, 2, dtype=torch.float64, generator=GENERATOR), torch.full((6,), 400.0)
LABELS2 = Conditioning(label=torch.arange(6) % 3)


def classifier(x_t, t, cond):
    """The mixture's exact log p(label | x_t)."""
    return MIXTURE.class_log_posterior(x_t, t).gather(1, cond.label[:, None])[:, 0]


CLASSIFIER = Guides(log_prob=classifier)


class Counting:
    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, cond=None):
        self.batches.append(len(x_t))
        return EXACT(x_t, t, cond)


def test_scale_zero_is_exactly_unconditional_and_one_exactly_conditional():
    for scale, cond in ((0.0, None), (1.0, LABELS)):
        counting = Counting()
        guided = ClassifierFree(scale).wrap(counting, SCHEDULE)(X, T, LABELS)
        assert torch.equal(guided.x0, EXACT(X, T, cond).x0)
        assert counting.batches == [4]


def test_other_scales_extrapolate_from_null_to_conditional_in_one_batch():
    counting = Counting()
    guided = ClassifierFree(3.0).wrap(counting, SCHEDULE)(X, T, LABELS)
    null, conditional = EXACT(X, T, None), EXACT(X, T, LABELS)
    torch.testing.assert_close(guided.eps, null.eps + 3 * (conditional.eps - null.eps))
    torch.testing.assert_close(guided.x0, null.x0 + 3 * (conditional.x0 - null.x0))
    assert counting.batches == [8]


def test_samples_that_are_dropped_already_stay_unconditional():
    dropped = LABELS.dropped(torch.ones(4, dtype=torch.bool))
    guided = ClassifierFree(3.0).wrap(EXACT, SCHEDULE)(X, T, dropped)
    torch.testing.assert_close(guided.x0, EXACT(X, T, None).x0)
    guided = ClassifierGuided(3.0).wrap(MIXTURE, SCHEDULE, CLASSIFIER)(X2, T2, LABELS2.dropped(torch.ones(6).bool()))
    torch.testing.assert_close(guided.x0, MIXTURE(X2, T2).x0)


def test_the_known_pixels_of_inpainting_condition_both_sides():
    seen = []

    def network(x_t, t, cond=None):
        seen.append(cond)
        return EXACT(x_t, t, cond)

    mask, context = torch.ones(4, 1, 4, 4), torch.rand(4, 1, 4, 4)
    cond = Conditioning(label=torch.arange(4), mask=mask, context=context)
    for scale in (0.0, 2.0):
        ClassifierFree(scale).wrap(network, SCHEDULE)(X, T, cond)
    assert seen[0].label is None
    assert seen[0].mask is mask
    assert torch.equal(seen[1].context, torch.cat([context, context]))
    assert seen[1].drop.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("kind", ["classifier_free", "classifier", "auto"])
def test_outside_its_interval_guidance_leaves_the_model_alone(kind):
    def guided(interval):
        if kind == "classifier_free":
            return ClassifierFree(3.0, interval).wrap(MIXTURE, SCHEDULE)
        if kind == "classifier":
            return ClassifierGuided(3.0, interval).wrap(MIXTURE, SCHEDULE, CLASSIFIER)
        return Autoguided(3.0, interval).wrap(MIXTURE, SCHEDULE, Guides(weak=GaussianDenoiser(SCHEDULE)))

    alone = MIXTURE(X2, T2, None if kind == "classifier" else LABELS2)
    assert torch.equal(guided((0.5, 0.8))(X2, T2, LABELS2).x0, alone.x0)
    assert not torch.allclose(guided((0.4, 0.8))(X2, T2, LABELS2).x0, alone.x0)
    with pytest.raises(ValueError, match="low <= high"):
        guided((0.8, 0.4))


def test_rescale_brings_back_the_spread_of_the_conditional_image():
    conditional = EXACT(X, T, LABELS)
    plain = ClassifierFree(5.0).wrap(EXACT, SCHEDULE)(X, T, LABELS)
    full = ClassifierFree(5.0, rescale=1.0).wrap(EXACT, SCHEDULE)(X, T, LABELS)
    half = ClassifierFree(5.0, rescale=0.5).wrap(EXACT, SCHEDULE)(X, T, LABELS)
    torch.testing.assert_close(full.x0.std((1, 2, 3)), conditional.x0.std((1, 2, 3)))
    torch.testing.assert_close(half.x0, (plain.x0 + full.x0) / 2)
    alpha, sigma = coefficients(SCHEDULE, T, X)
    torch.testing.assert_close(alpha * full.x0 + sigma * full.eps, X)
    with pytest.raises(ValueError, match="rescale"):
        ClassifierFree(5.0, rescale=2.0).wrap(EXACT, SCHEDULE)


def test_an_exact_classifier_turns_the_unconditional_model_into_the_conditional_one():
    """Bayes' rule: grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)."""
    for t in (20.0, 400.0, 900.0):
        at = torch.full((6,), t)
        guided = ClassifierGuided(1.0).wrap(MIXTURE, SCHEDULE, CLASSIFIER)(X2, at, LABELS2)
        conditional = MIXTURE(X2, at, LABELS2)
        torch.testing.assert_close(guided.x0, conditional.x0)
        torch.testing.assert_close(guided.eps, conditional.eps)
    off = ClassifierGuided(0.0).wrap(MIXTURE, SCHEDULE, CLASSIFIER)(X2, T2, LABELS2)
    assert torch.equal(off.x0, MIXTURE(X2, T2).x0)


def test_both_kinds_of_guidance_follow_the_score_of_the_sharpened_class_posterior():
    """grad [log p(x_t) + scale log p(y | x_t)], for exact models, by automatic differentiation of the densities."""
    scale = 2.5
    x = X2.clone().requires_grad_()
    log_p = MIXTURE.log_density(x, T2) + scale * classifier(x, T2, LABELS2)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    _, sigma = coefficients(SCHEDULE, T2, X2)
    for guided in (
        ClassifierFree(scale).wrap(MIXTURE, SCHEDULE),
        ClassifierGuided(scale).wrap(MIXTURE, SCHEDULE, CLASSIFIER),
    ):
        torch.testing.assert_close(guided(X2, T2, LABELS2).eps, -sigma * score)


def test_guidance_by_a_classifier_works_where_gradients_are_off_and_draws_the_class():
    x_T = torch.randn(200, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(label=torch.full((200,), 2))
    guided = ClassifierGuided(2.0).wrap(MIXTURE, SCHEDULE, CLASSIFIER)
    with torch.no_grad():
        samples = last(DDIM(steps=50)(guided, SCHEDULE, x_T, cond))
    nearest = torch.cdist(samples.flatten(1), MIXTURE.means).argmin(1)
    assert not samples.requires_grad
    assert (nearest == 2).double().mean() > 0.99


def test_a_classifier_is_not_asked_about_pure_noise():
    schedule = make_schedule("cosine", zero_terminal_snr=True)
    mixture = MixtureDenoiser(schedule, MIXTURE.means, 0.2, MIXTURE.weights)

    def log_prob(x_t, t, cond):
        return mixture.class_log_posterior(x_t, t).gather(1, cond.label[:, None])[:, 0]

    end = torch.full((6,), 1000.0)
    guided = ClassifierGuided(5.0).wrap(mixture, schedule, Guides(log_prob=log_prob))(X2, end, LABELS2)
    assert torch.isfinite(guided.x0).all()
    torch.testing.assert_close(guided.eps, mixture(X2, end).eps)


def test_guiding_a_conditional_model_adds_to_its_own_condition():
    base = ConditionedOn(MIXTURE, LABELS2)
    guided = ClassifierGuided(0.0).wrap(base, SCHEDULE, CLASSIFIER)(X2, T2, LABELS2)
    assert torch.equal(guided.x0, MIXTURE(X2, T2, LABELS2).x0)


def test_autoguidance_extrapolates_from_the_weak_model():
    weak = GaussianDenoiser(SCHEDULE, std=0.6)
    strong, bad = EXACT(X, T, LABELS), weak(X, T, LABELS)
    assert torch.equal(Autoguided(1.0).wrap(EXACT, SCHEDULE, Guides(weak=weak))(X, T, LABELS).x0, strong.x0)
    assert torch.equal(Autoguided(0.0).wrap(EXACT, SCHEDULE, Guides(weak=weak))(X, T, LABELS).x0, bad.x0)
    twice = Autoguided(2.0).wrap(EXACT, SCHEDULE, Guides(weak=weak))(X, T, LABELS)
    torch.testing.assert_close(twice.x0, 2 * strong.x0 - bad.x0)
    unconditional = Autoguided(2.0).wrap(EXACT, SCHEDULE, Guides(weak=weak))(X, T)
    torch.testing.assert_close(unconditional.x0, 2 * EXACT(X, T).x0 - weak(X, T).x0)


@pytest.mark.parametrize("make", [ClassifierFree, Autoguided])
def test_negative_scales_are_refused(make):
    with pytest.raises(ValueError, match="scale must be >= 0"):
        make(-1.0)


@pytest.mark.parametrize("kind", ["classifier_free", "auto"])
@pytest.mark.parametrize("t", [900.0, 500.0, 100.0])
def test_scale_zero_is_the_limit_of_small_scales_in_and_out_of_the_interval(kind, t):
    at = torch.full((6,), t)

    def guided(scale):
        if kind == "classifier_free":
            return ClassifierFree(scale, (0.2, 0.8), rescale=0.7).wrap(MIXTURE, SCHEDULE)(X2, at, LABELS2)
        guides = Guides(weak=GaussianDenoiser(SCHEDULE))
        return Autoguided(scale, (0.2, 0.8)).wrap(MIXTURE, SCHEDULE, guides)(X2, at, LABELS2)

    zero, tiny = guided(0.0), guided(1e-9)
    torch.testing.assert_close(zero.x0, tiny.x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(zero.eps, tiny.eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4)])
def test_rescale_leaves_a_constant_image_as_it_is(shape):
    """A one-pixel image, or a network that predicts one value everywhere, has no spread to bring back."""

    def constant(x_t, t, cond=None):
        x_0 = torch.full_like(x_t, 0.25)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, SCHEDULE))

    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    guided = ClassifierFree(3.0, rescale=0.7).wrap(constant, SCHEDULE)(x, T, LABELS)
    torch.testing.assert_close(guided.x0, torch.full_like(x, 0.25))
    assert guided.eps.isfinite().all()


@pytest.mark.parametrize("variance", ["small", "large"])
def test_algorithm_1_moves_the_mean_of_the_reverse_step_by_its_variance_times_the_gradient(variance):
    """Dhariwal & Nichol 2021, algorithm 1: N(mu + s Sigma grad log p(y | x_t), Sigma)."""
    guided = ClassifierGuided(2.5, shift="mean").wrap(MIXTURE, SCHEDULE, CLASSIFIER)
    base = p_reverse(MIXTURE(X2, T2), X2, 400.0, 380.0, SCHEDULE, variance)
    moved = p_reverse(guided(X2, T2, LABELS2), X2, 400.0, 380.0, SCHEDULE, variance)
    x = X2.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(x, T2, LABELS2).sum(), x)
    torch.testing.assert_close(moved.mean, base.mean + 2.5 * base.variance * gradient)
    torch.testing.assert_close(moved.variance, base.variance)


def test_algorithm_1_with_the_posteriors_variance_is_algorithm_2_at_the_level_that_the_step_leads_to():
    """An x_0 shift of sigma_s^2 / alpha_s against sigma_t^2 / alpha_t: equal in the limit of small steps."""
    mean = ClassifierGuided(2.5, shift="mean").wrap(MIXTURE, SCHEDULE, CLASSIFIER)(X2, T2, LABELS2)
    score = ClassifierGuided(2.5).wrap(MIXTURE, SCHEDULE, CLASSIFIER)(X2, T2, LABELS2)
    ratios = []
    for s in (300.0, 399.0):
        base = q_posterior(X2, MIXTURE(X2, T2).x0, 400.0, s, SCHEDULE).mean
        by_mean = p_reverse(mean, X2, 400.0, s, SCHEDULE).mean - base
        by_score = q_posterior(X2, score.x0, 400.0, s, SCHEDULE).mean - base
        ratio = (by_mean / by_score).flatten()
        k = [(SCHEDULE.sigma(t) ** 2 / SCHEDULE.alpha(t)).item() for t in (s, 400.0)]
        torch.testing.assert_close(ratio, torch.full_like(ratio, k[0] / k[1]))
        ratios.append(k[0] / k[1])
    assert ratios[0] < 0.75 < 0.99 < ratios[1]


def test_algorithm_1_draws_the_class_by_the_markov_chain_and_is_refused_elsewhere():
    image_ids = torch.arange(300)
    x_T, noise = initial_noise(0, image_ids, (1, 1, 2)).double(), step_noise(0, image_ids, (1, 1, 2))
    cond = Conditioning(label=torch.full((300,), 2))
    guided = ClassifierGuided(1.0, shift="mean").wrap(MIXTURE, SCHEDULE, CLASSIFIER)
    samples = last(Ancestral(steps=200)(guided, SCHEDULE, x_T, cond, noise=noise))
    nearest = torch.cdist(samples.flatten(1), MIXTURE.means).argmin(1)
    assert (nearest == 2).double().mean() > 0.9
    with pytest.raises(ValueError, match=r"shift='mean'.*ancestral"):
        last(DDIM(steps=5)(guided, SCHEDULE, x_T, cond))


@pytest.mark.parametrize("kind", ["classifier_free", "auto"])
def test_clipping_before_guidance_clips_its_inputs_and_after_it_the_result(kind):
    weak = GaussianDenoiser(SCHEDULE, std=0.9)
    scale = Sampling.of(guidance=kind, scale=3.0, clip=0.1, **({"weak": "M"} if kind == "auto" else {}))
    guides = Guides(weak=weak)
    after = scale.wrap(EXACT, SCHEDULE, guides)(X, T, LABELS)
    before = scale.with_fields(clip_when="before_guidance").wrap(EXACT, SCHEDULE, guides)(X, T, LABELS)
    assert after.x0.abs().max() == 0.1
    null = Clipped(weak if kind == "auto" else EXACT, SCHEDULE, 0.1)(X, T, LABELS if kind == "auto" else None).x0
    expected = null + 3.0 * (Clipped(EXACT, SCHEDULE, 0.1)(X, T, LABELS).x0 - null)
    torch.testing.assert_close(before.x0, expected)
    assert before.x0.abs().max() > 0.1


def test_a_negative_condition_takes_the_place_of_the_null_one():
    negative = Conditioning(label=torch.tensor([3, 2, 1, 0]))
    guides = Guides(negative=negative)
    away, towards = EXACT(X, T, negative), EXACT(X, T, LABELS)
    guided = ClassifierFree(3.0).wrap(EXACT, SCHEDULE, guides)(X, T, LABELS)
    torch.testing.assert_close(guided.x0, away.x0 + 3 * (towards.x0 - away.x0))
    torch.testing.assert_close(guided.eps, away.eps + 3 * (towards.eps - away.eps))
    assert torch.equal(ClassifierFree(1.0).wrap(EXACT, SCHEDULE, guides)(X, T, LABELS).x0, towards.x0)
    assert torch.equal(ClassifierFree(0.0).wrap(EXACT, SCHEDULE, guides)(X, T, LABELS).x0, away.x0)
    null = EXACT(X, T, None)  # away from something, towards nothing in particular
    unconditional = ClassifierFree(3.0).wrap(EXACT, SCHEDULE, guides)(X, T, None)
    torch.testing.assert_close(unconditional.x0, away.x0 + 3 * (null.x0 - away.x0))


def test_a_negative_condition_sees_the_known_pixels_and_keeps_to_the_interval():
    seen = []

    def network(x_t, t, cond=None):
        seen.append(cond)
        return EXACT(x_t, t, cond)

    mask, context = torch.ones(4, 1, 4, 4), torch.rand(4, 1, 4, 4)
    cond = Conditioning(label=torch.arange(4), mask=mask, context=context)
    guides = Guides(negative=Conditioning(label=torch.tensor([3, 2, 1, 0])))
    ClassifierFree(2.0).wrap(network, SCHEDULE, guides)(X, T, cond)
    assert all(torch.equal(one.mask, mask) and torch.equal(one.context, context) for one in seen)
    assert [one.label.tolist() for one in seen] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    outside = ClassifierFree(2.0, interval=(0.0, 0.1)).wrap(network, SCHEDULE, guides)(X, T, cond)
    assert torch.equal(outside.x0, EXACT(X, T, cond).x0)


@pytest.mark.parametrize("kind", [ClassifierGuided(2.0), Autoguided(2.0)])
def test_kinds_without_a_null_condition_refuse_a_negative_one(kind):
    with pytest.raises(ValueError, match="use guidance=classifier_free"):
        kind.wrap(EXACT, SCHEDULE, Guides(log_prob=classifier, weak=EXACT, negative=LABELS))
