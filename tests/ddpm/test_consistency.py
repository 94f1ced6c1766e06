"""Consistency tuning and its sampler, on Gaussian data, where the consistency function is known."""

import itertools
import math

import pytest
import torch
from torch import nn

from ddpm.consistency import EPS_LIMIT, ConsistencyTuning, Pairs, refusal
from ddpm.generate import Sampling, generate
from ddpm.noise import Purpose, normal
from ddpm.prediction import (
    PARAMETERIZATIONS,
    NetworkDenoiser,
    Prediction,
    coefficients,
    eps_from_x0,
    from_output,
)
from ddpm.samplers import DDIM, Consistency, initial_noise, last, step_noise
from ddpm.samplers.spacing import K_MAX
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianConsistency, GaussianDenoiser

SCHEDULE = make_schedule("cosine")
SHAPE = (1, 4, 4)
IMAGES = 12_800
PER_STAGE = IMAGES // 8


def drawn(ordinals, seed=0):
    """x_0 ~ N(0.2, 0.3^2) and eps of these ordinals, in float64."""
    x_0 = 0.2 + 0.3 * normal(seed, ordinals, Purpose.SAMPLING, SHAPE).double()
    return x_0, normal(seed, ordinals, Purpose.NOISE, SHAPE).double()


# --- levels --------------------------------------------------------------------------------------------------


def test_stages_are_equal_parts_of_the_run_by_ordinal_and_the_last_one_continues():
    seen = torch.tensor([0, PER_STAGE - 1, PER_STAGE, IMAGES - 1, IMAGES, 10 * IMAGES])
    assert ConsistencyTuning().stage(seen, IMAGES).tolist() == [0, 0, 1, 7, 7, 7]


def test_the_nearer_level_is_that_of_the_papers_formula():
    """r = t (1 - n(t) / q^(stage + 1)) with n(t) = 1 + 8 sigmoid(-t), at least 0 (Geng et al. 2024, sec. 3.2)."""
    t = torch.tensor([0.01, 0.5, 1.0, 5.0, 80.0], dtype=torch.float64)
    for stage in range(8):
        expected = [max(0.0, k * (1 - (1 + 8 / (1 + math.exp(k))) / 2 ** (stage + 1))) for k in t.tolist()]
        found = ConsistencyTuning().nearer(t, torch.full((5,), stage))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "edm", "flow"])
def test_pairs_lie_between_the_least_trained_level_and_where_sampling_starts(kind):
    schedule, ordinals = make_schedule(kind), torch.arange(0, IMAGES, 7)
    pairs = ConsistencyTuning().pairs(schedule, 0, ordinals, IMAGES)
    top = min(schedule.ratio(1000).item(), K_MAX)
    assert pairs.t.min() >= 1 - 1e-9
    assert schedule.ratio(pairs.t).max().item() == pytest.approx(top, rel=1e-6)  # 0.3 % of the draws are above
    assert ((pairs.r == 0) | (pairs.r >= 1 - 1e-9)).all()
    assert (pairs.r < pairs.t).all()
    torch.testing.assert_close(schedule.ratio(pairs.t) - schedule.ratio(pairs.r), pairs.gap, rtol=1e-6, atol=1e-9)


def test_little_noise_is_paired_with_the_clean_image_in_early_stages_and_hardly_any_in_the_last():
    clean = []
    for stage in range(8):
        ordinals = torch.arange(stage * PER_STAGE, (stage + 1) * PER_STAGE)
        clean.append((ConsistencyTuning().pairs(SCHEDULE, 0, ordinals, IMAGES).r == 0).double().mean().item())
    assert clean == sorted(clean, reverse=True)
    # n(t) >= 2 up to log 7: P(log t <= log log 7) of N(-1.1, 4) at first; then what lies near table index 1.
    assert clean[0] == pytest.approx(0.5 * (1 + math.erf((math.log(math.log(7)) + 1.1) / 2 / 2**0.5)), abs=0.04)
    assert 0.02 < clean[-1] < 0.04


def test_the_noisier_level_is_log_normal_and_pairs_are_a_function_of_seed_and_ordinal():
    settings = ConsistencyTuning(p_mean=-0.8, p_std=0.5)
    ordinals = torch.arange(20_000)
    pairs = settings.pairs(SCHEDULE, 3, ordinals, 40_000)
    k = SCHEDULE.ratio(pairs.t).log()
    assert (k.mean().item(), k.std().item()) == (pytest.approx(-0.8, abs=0.015), pytest.approx(0.5, abs=0.015))
    some = settings.pairs(SCHEDULE, 3, ordinals[17:19], 40_000)
    assert torch.equal(some.t, pairs.t[17:19])
    assert torch.equal(some.r, pairs.r[17:19])
    assert not torch.equal(settings.pairs(SCHEDULE, 4, ordinals[:2], 40_000).t, pairs.t[:2])


# --- the consistency function ----------------------------------------------------------------------------------


class Anything(nn.Module):
    def forward(self, x_t, t, cond):
        return 3.7 - 2 * x_t


@pytest.mark.parametrize("kind", sorted(set(PARAMETERIZATIONS) - {"x0"}))
def test_without_noise_it_is_the_image_itself_whatever_the_network_says(kind):
    x = torch.randn(5, *SHAPE)
    found = NetworkDenoiser(Anything(), SCHEDULE, kind)(x, torch.zeros(5)).x0
    torch.testing.assert_close(found, x, rtol=0, atol=0)


def test_a_bare_x0_network_is_refused_because_it_is_not_and_eps_where_it_says_nothing():
    assert not torch.equal(
        from_output(torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE), 0, SCHEDULE, "x0").x0, torch.zeros(1)
    )
    assert "prediction=x0_skip" in refusal("x0", SCHEDULE)
    assert "20,291 at T" in refusal("eps", SCHEDULE)
    linear = make_schedule("linear")
    assert linear.ratio(1000).item() < EPS_LIMIT
    allowed = [("v", SCHEDULE), ("x0_skip", SCHEDULE), ("eps", linear), ("eps", make_schedule("edm"))]
    assert [refusal(kind, schedule) for kind, schedule in allowed] == [None] * 4


# --- the loss --------------------------------------------------------------------------------------------------


def test_along_exact_trajectories_the_loss_of_the_exact_function_halves_with_the_gap():
    """One DDIM step of the exact denoiser errs by the gap squared, and the loss divides by the gap.

    From the lowest level, whose r is 0 in every stage, the gap and so the loss stay what they are, at most 0.06.
    """
    settings, means = ConsistencyTuning(stages=11), []
    exact, teacher = GaussianConsistency(SCHEDULE), GaussianDenoiser(SCHEDULE)
    for stage in range(11):
        ordinals = torch.arange(200) + stage * 1000
        x_0, eps = drawn(ordinals)
        pairs = settings.pairs(SCHEDULE, 0, ordinals, 11_000)
        losses = settings.losses(exact, SCHEDULE, x_0, eps, pairs, teacher=teacher)
        means.append(losses[pairs.r > 0].mean().item())
        assert stage < 6 or losses.max() < 0.06
    ratios = [after / before for before, after in itertools.pairwise(means[3:])]
    assert all(0.4 < ratio < 0.6 for ratio in ratios)
    assert means[-1] < 1e-3


def test_the_loss_is_the_pseudo_huber_distance_over_the_gap():
    ordinals = torch.arange(64)
    (x_0, eps), off = drawn(ordinals), 0.3
    settings = ConsistencyTuning(huber=0.06)
    pairs = settings.pairs(SCHEDULE, 0, ordinals, 64)

    def constant(x_t, t, cond=None):
        return from_output(torch.where((t > 0).reshape(-1, 1, 1, 1), off, x_t), x_t, t, SCHEDULE, "x0")

    distance = torch.where((pairs.r == 0)[:, None, None, None], off - x_0, torch.zeros_like(x_0)).flatten(1).norm(dim=1)
    expected = ((distance**2 + 0.06**2).sqrt() - 0.06) / pairs.gap
    torch.testing.assert_close(settings.losses(constant, SCHEDULE, x_0, eps, pairs), expected, rtol=1e-9, atol=1e-9)


def test_where_the_student_is_its_teacher_rounding_makes_no_gradient():
    """The exact denoiser gives pairs (t, 0) the target that the student begins with, but for the last digits."""
    student, ordinals = Power(), torch.arange(400)
    with torch.no_grad():
        student.mean.fill_(0.2)
        student.log_std.fill_(math.log(0.3))
    pairs = ConsistencyTuning().pairs(SCHEDULE, 0, ordinals, 400 * 8)
    clean = Pairs(pairs.t[pairs.r == 0], pairs.r[pairs.r == 0], pairs.gap[pairs.r == 0])
    x_0, eps = (x[pairs.r == 0].float() for x in drawn(ordinals))
    teacher = GaussianDenoiser(SCHEDULE)
    ConsistencyTuning().losses(student, SCHEDULE, x_0, eps, clean, teacher=teacher).mean().backward()
    assert student.power.grad.abs() < 1e-3


class Noisy(nn.Module):
    """A network with dropout, and weights that autocast casts."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_t, t, cond):
        return self.inner(self.dropout(x_t.flatten(1))).reshape(x_t.shape)


def test_both_passes_drop_the_same_activations():
    """At two levels that are nearly one, the same dropout gives nearly the same image."""
    torch.manual_seed(0)
    denoiser, ordinals = NetworkDenoiser(Noisy(), SCHEDULE, "v"), torch.arange(200) + 20_000
    settings = ConsistencyTuning(stages=20, p_mean=0.0, p_std=0.5)
    pairs = settings.pairs(SCHEDULE, 0, ordinals, 20_200)
    x_0, eps = (x.float() for x in drawn(ordinals))
    with torch.no_grad():
        apart = settings.losses(denoiser, SCHEDULE, x_0, eps, pairs) * pairs.gap
    assert pairs.gap.max() < 1e-3
    assert apart.max() < 0.01


def test_the_pass_without_gradient_does_not_take_it_from_the_other_one_under_autocast():
    torch.manual_seed(0)
    network, ordinals = Noisy(), torch.arange(64)
    pairs = ConsistencyTuning().pairs(SCHEDULE, 0, ordinals, 64)
    x_0, eps = (x.float() for x in drawn(ordinals))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ConsistencyTuning().losses(NetworkDenoiser(network, SCHEDULE, "v"), SCHEDULE, x_0, eps, pairs)
    loss.sum().backward()
    assert network.inner.weight.grad.abs().max() > 0


class Power(nn.Module):
    """f(x_t) = m + (1 + k^2 / s^2)^-p (x_t / alpha - m).

    For data of N(m, s^2) the exact denoiser is p = 1 of this family, and the exact consistency function p = 1/2.
    """

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.0))
        self.log_std = nn.Parameter(torch.tensor(0.5).log())
        self.power = nn.Parameter(torch.tensor(1.0))

    def forward(self, x_t, t, cond=None):
        alpha, sigma = coefficients(SCHEDULE, t, x_t)
        gain = (1 + (sigma / alpha / self.log_std.exp()).square()) ** -self.power
        x_0 = self.mean + gain * (x_t / alpha - self.mean)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, SCHEDULE))


@pytest.mark.heavy
def test_a_student_of_gaussian_data_goes_from_the_denoiser_to_the_exact_function():
    """The exponent within 0.005 of 1/2, the mean within 0.01 of 0.2, the standard deviation within 1 % of 0.3."""
    student, batch, steps, lr = Power(), 64, 400, 0.02
    settings, optimizer = ConsistencyTuning(), torch.optim.RAdam(student.parameters(), lr, betas=(0.9, 0.99))
    for step in range(steps):
        ordinals = torch.arange(batch) + step * batch
        x_0, eps = (x.float() for x in drawn(ordinals))
        pairs = settings.pairs(SCHEDULE, 0, ordinals, steps * batch)
        optimizer.zero_grad()
        settings.losses(student, SCHEDULE, x_0, eps, pairs).mean().backward()
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (1 - step / steps))
        optimizer.step()
        if step == steps // 8 - 1:  # the first stage is nearly diffusion training
            assert student.power.item() > 0.9
    assert student.power.item() == pytest.approx(0.5, abs=0.005)
    assert student.mean.item() == pytest.approx(0.2, abs=0.01)
    assert student.log_std.exp().item() == pytest.approx(0.3, rel=0.01)
    t = SCHEDULE.timestep_of_ratio(torch.tensor([0.1, 0.821, 10.0, 80.0]))
    x_t = torch.randn(4, *SHAPE)
    torch.testing.assert_close(student(x_t, t).x0, GaussianConsistency(SCHEDULE)(x_t, t).x0, rtol=0, atol=0.02)


# --- sampling --------------------------------------------------------------------------------------------------


def test_one_step_is_the_function_itself_at_the_first_level():
    ids = torch.arange(50)
    x_T, exact = initial_noise(0, ids, SHAPE).double(), GaussianConsistency(SCHEDULE)
    t = SCHEDULE.timestep_of_ratio(80.0)
    torch.testing.assert_close(
        last(Consistency(steps=1)(exact, SCHEDULE, x_T)), exact(x_T, t.expand(50)).x0, rtol=0, atol=0
    )


def test_levels_are_those_of_the_paper_even_in_log_between_and_end_where_the_schedule_does():
    def ratios(steps, schedule=SCHEDULE):
        *above, end = Consistency(steps=steps).levels(schedule)
        assert end == 0
        return [schedule.ratio(t).item() for t in above]

    assert ratios(1) == pytest.approx([80])
    assert ratios(2) == pytest.approx([80, 0.821])
    four = ratios(4)
    assert (four[0], four[-1]) == (pytest.approx(80), pytest.approx(0.821))
    assert four[0] / four[1] == pytest.approx(four[1] / four[2]) == pytest.approx(four[2] / four[3])
    noisy = make_schedule("sigmoid")
    assert ratios(1, noisy) == pytest.approx([min(80, noisy.ratio(1000).item())])
    with pytest.raises(ValueError, match=r"last_ratio must be in \[0\.00643, 80\) .*, got 90"):
        Consistency(last_ratio=90.0).levels(SCHEDULE)
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.1000"):
        Consistency(steps=1001).levels(SCHEDULE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exact_function_draws_gaussian_data_in_any_number_of_steps(steps):
    settings = Sampling.of(kind="consistency", steps=steps, clip=None)
    samples = generate(GaussianConsistency(SCHEDULE), SCHEDULE, settings, cond=None, count=4000, shape=SHAPE, seed=1)
    assert samples.mean().item() == pytest.approx(0.2, abs=0.01)
    assert samples.std().item() == pytest.approx(0.3, rel=0.01)
    # A denoiser in its place gives the mean of all images at once.
    one = generate(GaussianDenoiser(SCHEDULE), SCHEDULE, settings, cond=None, count=400, shape=SHAPE, seed=1)
    assert one.std().item() < 0.25


def test_several_steps_need_noise_and_one_does_not():
    x_T = initial_noise(0, torch.arange(3), SHAPE)
    last(Consistency(steps=1)(GaussianConsistency(SCHEDULE), SCHEDULE, x_T))
    with pytest.raises(ValueError, match="needs noise"):
        last(Consistency(steps=2)(GaussianConsistency(SCHEDULE), SCHEDULE, x_T))
    noise = step_noise(0, torch.arange(3), SHAPE)
    found = list(
        Consistency(steps=2)(GaussianConsistency(SCHEDULE), SCHEDULE, x_T, noise=noise, timesteps=[900, 300, 0])
    )
    assert [sample.t for sample in found] == [300, 0]
    assert torch.equal(found[-1].x_t, found[-1].x0)


def test_ddim_to_consistency_keeps_the_levels_of_consistency():
    """`ddpm sample --sampler consistency --steps 2` changes the kind of a model's own settings."""
    changed = Sampling(DDIM(steps=50, spacing="leading")).with_fields(kind="consistency", steps=2)
    assert changed.sampler == Consistency(steps=2)
