import itertools
import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from ddpm.bound import mean_bits_per_dim, variational_bound, variational_bounds
from ddpm.conditioning import Conditioning
from ddpm.likelihood import dequantize, log_density, ode_bits_per_dim, rademacher
from ddpm.models.unet import UNet, UNetConfig
from ddpm.prediction import NetworkDenoiser, Prediction, coefficients, eps_from_x0
from ddpm.schedule import NoiseSchedule, from_log_snr, make_schedule
from tests.ddpm.exact import GaussianDenoiser, MixtureDenoiser, PointDenoiser

SHORT = make_schedule("cosine", num_steps=8)
COSINE = make_schedule("cosine")
ZERO_SNR = make_schedule("cosine", zero_terminal_snr=True)
FLOW = make_schedule("flow")
MEAN, STD = 0.2, 0.3
EVEN = from_log_snr(lambda u: 12 - 22 * u, 1024)  # quickly inverted, which an ODE does once per evaluation
SHAPE = (1, 8, 8)
LN2 = math.log(2)


def data(count=256, shape=SHAPE):
    return MEAN + STD * torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def on_grid(count=6, levels=256, shape=SHAPE):
    k = torch.randint(levels, (count, *shape), generator=torch.Generator().manual_seed(1))
    return 2 * k.double() / (levels - 1) - 1


def bound(denoiser, schedule, x_0, **options):
    return variational_bound(denoiser, schedule, x_0, **{"seed": 0, "image_ids": torch.arange(len(x_0))} | options)


def assert_mean(values, expected, sigmas=4.5):
    """The mean of independent values [N, ...] is what is expected, as far as they tell; returns the standard error."""
    error = values.std(0) / len(values) ** 0.5
    assert (((values.mean(0) - expected) / error).abs() < sigmas).all(), (values.mean(0), expected, error)
    return error


@dataclass
class Counting:
    """A denoiser that counts its calls."""

    denoiser: GaussianDenoiser
    calls: int = 0

    def __call__(self, x_t, t, cond=None):
        self.calls += 1
        return self.denoiser(x_t, t, cond)


@dataclass(frozen=True)
class LearnsVariance:
    denoiser: GaussianDenoiser
    fraction: float

    def __call__(self, x_t, t, cond=None):
        return replace(self.denoiser(x_t, t, cond), variance_fraction=torch.full_like(x_t, self.fraction))


# --- the bound, on N(m, s^2) data, where the reverse chain of the exact denoiser is Gaussian ---------------------


def model_variances(schedule, pairs, kind):
    """Of p(x_s | x_t) for each pair, from the least noise up: the formulas of DDPM, sec. 3.2, written out once more."""
    bar = schedule.alphas_cumprod

    def posterior(t, s):
        return (1 - bar[t] / bar[s]) * (1 - bar[s]) / (1 - bar[t])

    small = [posterior(t, s) if s else posterior(2 * t, t) for t, s in pairs]
    large = [1 - bar[t] / bar[s] if s else posterior(2 * t, t) for t, s in pairs]
    if kind in ("small", "large"):
        return torch.stack(small if kind == "small" else large)
    beta = torch.stack([1 - bar[t] / bar[s] for t, s in pairs])  # a number: the learned fraction
    return torch.exp((1 - kind) * torch.stack(small).log() + kind * beta.log())


def expected_terms(schedule, pairs, kind):
    """E over x_0 and x_t, from E (x_0 - E[x_0 | x_t])^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2); bits."""
    terms = []
    for (t, s), v in zip(pairs, model_variances(schedule, pairs, kind), strict=True):
        bar, below = schedule.alphas_cumprod[t], schedule.alphas_cumprod[s]
        left = STD**2 * (1 - bar) / (bar * STD**2 + 1 - bar)
        if s == 0:
            terms.append((left / v + (2 * math.pi * v).log()) / 2 / LN2)
            continue
        q = (1 - bar / below) * (1 - below) / (1 - bar)
        pull = below.sqrt() * (1 - bar / below) / (1 - bar)
        terms.append((pull**2 * left / v + q / v - 1 - (q / v).log()) / 2 / LN2)
    return torch.stack(terms)


def joint(schedule, grid, kind):
    """Mean and covariance of (x_0, x_1, ..., x_T) at `grid`'s levels, under q and under p: for q by running the chain
    up, for p by running it down from N(0, 1); p's mean is E_q[x_s | x_t], because the denoiser is exact."""
    bar, n = schedule.alphas_cumprod[torch.tensor(grid)], len(grid)
    alpha = bar.sqrt()
    ratio = alpha[:, None] / alpha[None]
    lower = torch.tril(ratio)  # x_j = ratio x_i + noise for j >= i
    var = bar * STD**2 + 1 - bar
    cov_q = torch.tril(lower * var[None])
    cov_q = cov_q + torch.tril(cov_q, -1).T
    mean_q = alpha * MEAN
    pairs = [(t, s) for s, t in itertools.pairwise(grid)]
    noise = model_variances(schedule, pairs, kind)
    mean_p, cov_p = torch.zeros_like(mean_q), torch.zeros_like(cov_q)
    cov_p[-1, -1] = 1
    for i in range(n - 2, -1, -1):
        gain = cov_q[i, i + 1] / var[i + 1]
        mean_p[i] = mean_q[i] + gain * (mean_p[i + 1] - mean_q[i + 1])
        cov_p[i, i + 1 :] = cov_p[i + 1 :, i] = gain * cov_p[i + 1, i + 1 :]
        cov_p[i, i] = gain**2 * cov_p[i + 1, i + 1] + noise[i]
    return (mean_q, cov_q), (mean_p, cov_p)


def gaussian_kl(q, p):
    (mean_q, cov_q), (mean_p, cov_p) = q, p
    solved = torch.linalg.solve(cov_p, torch.cat([cov_q, (mean_p - mean_q)[:, None]], dim=1))
    trace, square = solved[:, :-1].trace(), (mean_p - mean_q) @ solved[:, -1]
    return (trace + square - len(mean_q) + cov_p.logdet() - cov_q.logdet()) / 2


CASES = [("small", None), ("large", None), (0.3, None), ("small", 4), ("large", 4)]


def case(kind, steps):
    """The bound of the exact denoiser on the data, and the levels of its chain."""
    exact = GaussianDenoiser(SHORT, MEAN, STD)
    options = {"levels": None, "steps": steps, "image_ids": torch.arange(256)}
    if isinstance(kind, str):
        ours = bound(exact, SHORT, data(), variance=kind, **options)
    else:
        ours = bound(LearnsVariance(exact, kind), SHORT, data(), **options)
    return ours, SHORT.timesteps(steps or SHORT.num_steps)[::-1]


@pytest.mark.parametrize(("kind", "steps"), CASES)
def test_every_term_has_its_closed_form_expectation(kind, steps):
    ours, grid = case(kind, steps)
    assert ours.timesteps.tolist() == grid[1:]
    assert ours.terms.dtype == torch.float64
    expected = expected_terms(SHORT, [(t, s) for s, t in itertools.pairwise(grid)], kind)
    error = assert_mean(ours.terms, expected)
    assert (error < 0.03 * expected.abs()).all()


@pytest.mark.parametrize(("kind", "steps"), CASES)
def test_the_bound_is_the_divergence_of_the_chains_and_exceeds_the_exact_likelihood_by_its_gap(kind, steps):
    """E[bound] = KL(q(x_0..x_T) || p(x_0..x_T)) + H(x_0), from the chains' joint Gaussians: no term enters."""
    ours, grid = case(kind, steps)
    q, p = joint(SHORT, grid, kind)
    entropy = math.log(2 * math.pi * math.e * STD**2) / 2
    assert_mean(ours.total, (gaussian_kl(q, p) + entropy) / LN2)
    mean, var = p[0][0], p[1][0, 0]
    exact = (((data() - mean).square() / var + (2 * math.pi * var).log()) / 2 / LN2).flatten(1).mean(1)
    marginals = gaussian_kl((q[0][:1], q[1][:1, :1]), (p[0][:1], p[1][:1, :1]))
    gap = (gaussian_kl(q, p) - marginals) / LN2
    assert gap > 0.001
    assert assert_mean(ours.total - exact, gap) < 0.012


def test_fewer_steps_bound_worse_where_the_data_is_finer_than_the_last_steps_noise():
    """Not on any data: where a step halves the noise, its term costs more than the decoder gains on smooth data. So 4
    of SHORT's steps are better than its 8 for N(0.2, 0.3^2), as the closed forms above have it."""
    fine = GaussianDenoiser(COSINE, MEAN, 0.01)
    x_0 = MEAN + 0.01 / STD * (data(64) - MEAN)
    exact = math.log2(0.01) + math.log2(2 * math.pi * math.e) / 2
    totals = [bound(fine, COSINE, x_0, levels=None, steps=n).total for n in (5, 25, 125, 500)]
    for fewer, more in itertools.pairwise(totals):
        assert (fewer - more).mean() > 0.05 + 5 * (fewer - more).std() / 8
    assert exact < totals[-1].mean() < exact + 0.3


def test_a_respaced_chain_is_the_chain_of_the_respaced_schedule():
    short = SHORT.respace(4)
    a = bound(GaussianDenoiser(SHORT, MEAN, STD), SHORT, data(), levels=None, steps=4)
    b = bound(GaussianDenoiser(short, MEAN, STD), short, data(), levels=None)
    torch.testing.assert_close(a.prior, b.prior)
    torch.testing.assert_close(a.terms.mean(0), b.terms.mean(0), rtol=0.05, atol=0.02)  # noise goes by the level's name


@pytest.mark.parametrize("schedule", [SHORT, COSINE, ZERO_SNR, FLOW, make_schedule("linear", num_steps=100)])
def test_the_prior_term_is_its_closed_form(schedule):
    x_0 = data(4)
    bar = schedule.alphas_cumprod[-1]
    expected = ((bar * x_0.square() - bar - torch.log1p(-bar)) / 2 / LN2).flatten(1).mean(1)
    prior = bound(GaussianDenoiser(schedule), schedule, x_0, levels=None, steps=2).prior
    torch.testing.assert_close(prior, expected, rtol=1e-6, atol=1e-15)
    assert (prior == 0).all() == (schedule is ZERO_SNR or schedule is FLOW)


@pytest.mark.parametrize("levels", [256, 17, 2])
@pytest.mark.parametrize("steps", [None, 3])
def test_one_known_image_costs_only_the_decoder(levels, steps):
    image = on_grid(1, levels)
    ours = bound(PointDenoiser(SHORT, image[0]), SHORT, image, levels=levels, steps=steps)
    assert (ours.terms[:, 1:] == 0).all()
    [(first, _)] = list(SHORT.pairs(steps or 8))[-1:]
    bar = SHORT.alphas_cumprod
    var = (1 - bar[2 * first] / bar[first]) * (1 - bar[first]) / (1 - bar[2 * first])
    z = 1 / (levels - 1) / math.sqrt(2 * var)
    inside = -math.log2(math.erf(z))  # half a bin to either side; the outermost bins have no outer end
    outside = -math.log2((1 + math.erf(z)) / 2)
    outermost = (image.abs() == 1).double().mean().item()
    expected = inside * (1 - outermost) + outside * outermost
    assert ours.terms[0, 0].item() == pytest.approx(expected, rel=1e-9)
    assert ours.total[0].item() == pytest.approx(expected + ours.prior[0].item(), rel=1e-9)


def test_the_noise_is_the_images_own_and_fresh_for_every_seed():
    denoiser, x_0 = GaussianDenoiser(SHORT), on_grid()
    images = torch.tensor([5, 0, 7, 1, 2, 9])
    whole = variational_bound(denoiser, SHORT, x_0, seed=3, image_ids=images)
    part = variational_bound(denoiser, SHORT, x_0[2:4], seed=3, image_ids=images[2:4])
    torch.testing.assert_close(part.terms, whole.terms[2:4], rtol=1e-12, atol=0)
    assert (variational_bound(denoiser, SHORT, x_0, seed=4, image_ids=images).terms != whole.terms).any(0).all()


def test_the_bounds_of_both_variances_are_of_the_same_predictions_and_noise():
    denoiser, x_0 = Counting(GaussianDenoiser(SHORT)), on_grid()
    images = torch.arange(len(x_0))
    found = variational_bounds(denoiser, SHORT, x_0, seed=3, image_ids=images)
    assert denoiser.calls == SHORT.num_steps
    for variance in ("small", "large"):
        alone = variational_bound(denoiser, SHORT, x_0, seed=3, image_ids=images, variance=variance)
        torch.testing.assert_close(found[variance].terms, alone.terms, rtol=0, atol=0)
    assert (found["small"].terms != found["large"].terms).any()


def test_labels_reach_the_denoiser():
    cond = Conditioning(label=torch.ones(64, dtype=torch.long))
    x_0, denoiser = data(64) + 1, GaussianDenoiser(SHORT, MEAN, STD)
    images = torch.arange(64)
    with_label = variational_bound(denoiser, SHORT, x_0, cond, seed=0, image_ids=images, levels=None).total
    unlabelled = variational_bound(denoiser, SHORT, x_0, seed=0, image_ids=images, levels=None).total
    assert (with_label < unlabelled - 1).all()


def test_float32_images_are_bounded_in_float64():
    """The smallest terms are of 1e-5 bits, from variances of nearly 1 whose difference float32 would not resolve."""
    seen = set()

    def denoiser(x_t, t, cond=None):
        seen.add(x_t.dtype)
        return GaussianDenoiser(COSINE)(x_t, t, cond)

    x_0 = on_grid()
    single = bound(denoiser, COSINE, x_0.float(), steps=250)
    assert seen == {torch.float32}
    double = bound(denoiser, COSINE, x_0, steps=250)
    assert double.terms.min() < 2e-5
    torch.testing.assert_close(single.terms, double.terms, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 9}, "steps"),
        ({"levels": 1}, "levels"),
        ({"levels": 255}, "grid of 255 levels"),
        ({"variance": "medium"}, "variance"),
        ({"image_ids": torch.arange(3)}, "image_ids"),
    ],
)
def test_bounds_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        bound(GaussianDenoiser(SHORT), SHORT, on_grid(), **options)


# --- the probability-flow ODE ------------------------------------------------------------------------------------


def gaussian_log_density(x, mean, var):
    return -(((x - mean).square() / var + math.log(2 * math.pi * var)) / 2).flatten(1).sum(1)


def bits_off(ours, exact, dim):
    return ((ours - exact) / dim / LN2).abs().max().item()


SMALL = (1, 4, 4)
SIGNS = rademacher(0, torch.arange(5), SMALL)


@pytest.mark.parametrize(
    ("kind", "signs"), [("linear", None), ("cosine", SIGNS), ("flow", None)], ids=["exact", "hutchinson", "flow"]
)
def test_gaussian_density_is_exact_from_the_exact_prior(kind, signs):
    """The Jacobian is a multiple of the identity, so that Hutchinson's estimate has no variance either."""
    schedule = make_schedule(kind)
    x, t_min = data(5, SMALL), 3.5

    def moments(t):
        bar = schedule.alpha_bar(t).item()
        return bar**0.5 * MEAN, bar * STD**2 + 1 - bar

    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    ours = log_density(
        denoiser, schedule, x, probes=signs, t_min=t_min, prior=lambda x: gaussian_log_density(x, *moments(1000))
    )
    exact = gaussian_log_density(x, *moments(t_min))
    assert bits_off(ours.log_density, exact, 16) < 2e-5
    (mean, var), (mean_T, var_T) = moments(t_min), moments(1000)
    torch.testing.assert_close(ours.x_T, mean_T + (x - mean) * (var_T / var) ** 0.5, rtol=0, atol=1e-4)
    assert 10 < ours.nfe < 100
    standard = log_density(denoiser, schedule, x, probes=signs, t_min=t_min).log_density
    assert bits_off(standard, exact, 16) < {"linear": 5e-3}.get(kind, 2e-5)


def test_nearly_normal_data_takes_long_steps_that_end_at_the_end():
    """The solver's first guess of a step is ten times the way there."""
    x = data(5, SMALL)
    ours = log_density(GaussianDenoiser(EVEN, 0, 1.001), EVEN, x)
    var = EVEN.alpha_bar(1).item() * (1.001**2 - 1) + 1
    assert bits_off(ours.log_density, gaussian_log_density(x, 0, var), 16) < 1e-5
    assert ours.nfe < 20


MEANS = torch.tensor([[-0.5, 0.3], [0.6, -0.1], [0.0, 0.7]]).double()
MIXTURE = MixtureDenoiser(EVEN, MEANS, 0.1, torch.tensor([0.5, 0.3, 0.2]))
POINTS = torch.tensor([[-0.5, 0.3], [0.3, 0.1], [0.62, 0.05], [-0.2, 0.6]]).double().reshape(4, 1, 1, 2)


def mixture_log_density(x, cond=None, **options):
    """From the exact prior, so that all that is left is the solver's error."""
    return log_density(MIXTURE, EVEN, x, cond, prior=lambda x: MIXTURE.log_density(x, 1024, cond), **options)


@pytest.mark.parametrize(
    ("method", "tolerance", "t_min"),
    [("dopri5", 1e-6, 1.0), ("dopri8", 1e-5, 300.0), ("bosh3", 1e-4, 300.0)],
)
def test_mixture_density_is_exact_with_the_exact_trace(method, tolerance, t_min):
    ours = mixture_log_density(POINTS, method=method, rtol=tolerance, atol=tolerance, t_min=t_min)
    assert bits_off(ours.log_density, MIXTURE.log_density(POINTS, t_min), 2) < 100 * tolerance


def test_mixture_density_is_exact_up_to_zero_terminal_snr_and_its_own_prior():
    mixture = replace(MIXTURE, schedule=ZERO_SNR)
    ours = log_density(mixture, ZERO_SNR, POINTS, t_min=1.0)
    assert bits_off(ours.log_density, mixture.log_density(POINTS, 1.0), 2) < 1e-3


def test_the_density_converges_with_the_tolerance():
    errors = []
    for tolerance in (1e-3, 1e-5):
        ours = mixture_log_density(POINTS, rtol=tolerance, atol=tolerance).log_density
        errors.append(bits_off(ours, MIXTURE.log_density(POINTS, 1.0), 2))
    assert errors[0] < 0.1
    assert errors[1] < 1e-3


def test_the_density_of_a_label_is_its_components():
    cond = Conditioning(label=torch.tensor([0, 1, 2, 0]), drop=torch.tensor([False, False, False, True]))
    ours = mixture_log_density(POINTS, cond).log_density
    assert bits_off(ours, MIXTURE.log_density(POINTS, 1.0, cond), 2) < 1e-3


def test_hutchinsons_mean_over_probes_is_the_exact_density():
    probes = rademacher(0, torch.arange(1024), (1, 1, 2))
    x = POINTS[1:2].expand(1024, -1, -1, -1)
    one = mixture_log_density(x, probes=probes, rtol=1e-4, atol=1e-4).log_density
    assert one.std() > 0.1
    assert_mean(one, MIXTURE.log_density(POINTS[1:2], 1.0))
    many = mixture_log_density(POINTS[1:2], probes=probes[:, :64].transpose(0, 1), rtol=1e-4, atol=1e-4).log_density
    torch.testing.assert_close(many, one[:64].mean(0, keepdim=True), rtol=0, atol=0.02)


class ExactV(nn.Module):
    """v of N(m, s^2) data as a network: it is told the table index, in float32."""

    def forward(self, x_t, index, cond):
        pred = GaussianDenoiser(ZERO_SNR, MEAN, STD)(x_t, index.double() + 1, cond)
        angle = ZERO_SNR.angle(index.double() + 1).to(x_t).reshape(-1, 1, 1, 1)
        return angle.cos() * pred.eps - angle.sin() * pred.x0


@pytest.mark.parametrize("signs", [None, SIGNS], ids=["exact", "hutchinson"])
def test_a_v_network_is_evaluated_up_to_zero_terminal_snr(signs):
    x = data(5, SMALL)
    exact = gaussian_log_density(x, ZERO_SNR.alpha(1).item() * MEAN, (STD**2 - 1) * ZERO_SNR.alpha_bar(1).item() + 1)
    with torch.no_grad():  # as evaluations run
        ours = log_density(NetworkDenoiser(ExactV(), ZERO_SNR, "v"), ZERO_SNR, x, probes=signs, t_min=1.0)
    assert bits_off(ours.log_density, exact, 16) < 1e-4
    assert not ours.log_density.requires_grad


def test_the_rest_of_the_batch_matters_within_the_tolerance_only():
    """A hard image does not hide among a thousand easy ones either: the norm is the worst image's."""
    hard, easy = POINTS[1:2], POINTS[:1]
    alone = mixture_log_density(hard).log_density
    assert bits_off(mixture_log_density(POINTS).log_density[1:2], alone, 2) < 1e-3
    crowd = mixture_log_density(torch.cat([hard, easy.expand(500, -1, -1, -1)])).log_density
    assert bits_off(crowd[:1], alone, 2) < 1e-3


# --- dequantization and bits per dimension -----------------------------------------------------------------------


@dataclass(frozen=True)
class UniformDenoiser:
    """E[x_0 | x_t] for x_0 uniform in [-edge, edge]: the mean of a truncated normal distribution."""

    schedule: NoiseSchedule
    edge: float

    def __call__(self, x_t, t, cond=None):
        bar = self.schedule.alpha_bar(t).reshape(-1, 1, 1, 1)
        centre, width = x_t / bar.sqrt(), ((1 - bar) / bar).sqrt()
        low, high = (-self.edge - centre) / width, (self.edge - centre) / width
        densities = (torch.exp(-low.square() / 2) - torch.exp(-high.square() / 2)) / math.sqrt(2 * math.pi)
        x_0 = centre + width * densities / (torch.special.ndtr(high) - torch.special.ndtr(low))
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


def test_uniform_8_bit_images_take_8_bits():
    x_0 = (torch.arange(256).double() / 127.5 - 1).reshape(4, *SHAPE)
    denoiser = UniformDenoiser(EVEN, 256 / 255)
    ours = ode_bits_per_dim(denoiser, EVEN, x_0, seed=0, image_ids=torch.arange(4))
    assert ours.offset == pytest.approx(math.log2(127.5))
    assert ours.bits_per_dim.mean().item() == pytest.approx(8, abs=2e-3)


def test_bits_per_dim_are_those_of_the_dequantized_density_and_bound_those_of_the_levels():
    """Levels so coarse that the density varies within a bin; the level's probability is known from erf."""
    levels, k = 5, 2
    x_0 = torch.full((2048, 1, 1, 2), 2 * k / (levels - 1) - 1, dtype=torch.float64)
    denoiser = GaussianDenoiser(EVEN, MEAN, STD)
    bits = ode_bits_per_dim(denoiser, EVEN, x_0, seed=0, image_ids=torch.arange(2048), levels=levels).bits_per_dim
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    x = 2 * (k + u - 0.5) / (levels - 1) - 1
    density = torch.exp(-((x - MEAN) / STD).square() / 2) / STD / math.sqrt(2 * math.pi)
    assert_mean(bits, (-density.log2().mean() + 1).item())  # log2((5 - 1) / 2) = 1
    level = -math.log2((density.mean() * 2 / (levels - 1)).item())
    low, high = ((x_0[0, 0, 0, 0].item() + side / 4 - MEAN) / STD / math.sqrt(2) for side in (-1, 1))
    assert level == pytest.approx(-math.log2((math.erf(high) - math.erf(low)) / 2), abs=1e-6)
    assert bits.mean() > level + 0.02


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_fill_their_own_bins(levels):
    x_0 = on_grid(64, levels).float()
    images = torch.arange(64)
    x = dequantize(x_0, levels, seed=0, image_ids=images)
    assert x.dtype == torch.float64
    place = (x - x_0.double()) * (levels - 1) / 2
    assert place.abs().max() < 0.5 + 1e-4  # of float32's rounding
    torch.testing.assert_close(((x + 1) * (levels - 1) / 2).round(), ((x_0.double() + 1) * (levels - 1) / 2).round())
    assert place.mean().item() == pytest.approx(0, abs=4.5 * (1 / 12 / x.numel()) ** 0.5)
    assert place.var().item() == pytest.approx(1 / 12, rel=0.06)
    assert torch.equal(
        dequantize(on_grid(64, levels), levels, seed=0, image_ids=images), x
    )  # float32 rounds it, no more
    assert torch.equal(dequantize(x_0[7:9], levels, seed=0, image_ids=images[7:9]), x[7:9])
    assert not torch.equal(dequantize(x_0, levels, seed=1, image_ids=images), x)


def test_probes_are_signs_of_the_images_own():
    images = torch.arange(300)
    signs = rademacher(0, images, SHAPE, 3)
    assert signs.shape == (3, 300, *SHAPE)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.mean().item()) < 4.5 / signs.numel() ** 0.5
    correlation = torch.einsum("pbchw,qbchw->pq", signs, signs) / signs[0].numel()
    torch.testing.assert_close(correlation, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.04)
    assert torch.equal(rademacher(0, images[5:6], SHAPE, 2), signs[:2, 5:6])


def test_a_float32_network_has_bits_per_dim_under_either_trace():
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            in_channels=1,
            out_channels=1,
            channels=(8, 16),
            layers_per_block=1,
            attention=(False, True),
            head_dim=8,
            norm_groups=4,
        )
    )
    for p in network.parameters():  # the last convolution may start at 0
        nn.init.normal_(p, std=0.1)
    denoiser = NetworkDenoiser(network.eval(), ZERO_SNR, "v")
    x_0, images = on_grid(2, shape=SMALL).float(), torch.arange(2)
    options = {"seed": 0, "image_ids": images, "rtol": 1e-3, "atol": 1e-3}
    with torch.no_grad():
        exact = ode_bits_per_dim(denoiser, ZERO_SNR, x_0, trace="exact", **options)
        estimate = ode_bits_per_dim(denoiser, ZERO_SNR, x_0, probes=16, **options)
        total = variational_bound(denoiser, ZERO_SNR, x_0, seed=0, image_ids=images, steps=5).total
    assert exact.bits_per_dim.dtype == total.dtype == torch.float64
    assert exact.bits_per_dim.isfinite().all()
    assert total.isfinite().all()
    torch.testing.assert_close(estimate.bits_per_dim, exact.bits_per_dim, rtol=0, atol=0.1)
    assert all(p.grad is None for p in network.parameters())


def test_a_data_sets_mean_comes_with_its_count_and_interval():
    bits = 3 + 0.5 * torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    interval = mean_bits_per_dim(bits)
    assert interval.value == pytest.approx(bits.mean().item())
    assert interval.n == (400,)
    half = 1.96 * 0.5 / 20
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.2)
    assert interval.low < interval.value < interval.high
    with pytest.raises(ValueError, match="finite"):
        mean_bits_per_dim(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"\[N\]"):
        mean_bits_per_dim(bits[:, None])


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"t_min": 0}, "t_min .* singular"),
        ({"t_min": 1000}, "t_min"),
        ({"t_min": math.nan}, "t_min"),
        ({"trace": "skilling"}, "trace 'skilling'; allowed: hutchinson, exact"),
        ({"probes": 0}, "probes"),
        ({"method": "euler"}, "method"),
        ({"rtol": 0}, "rtol"),
        ({"levels": 100}, "grid"),
        ({"image_ids": torch.arange(5)}, "image_ids"),
    ],
)
def test_likelihoods_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ode_bits_per_dim(
            GaussianDenoiser(COSINE), COSINE, on_grid(), **{"seed": 0, "image_ids": torch.arange(6)} | options
        )


def test_probes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="probes"):
        log_density(GaussianDenoiser(COSINE), COSINE, data(2), probes=torch.ones(2, *SHAPE))


def test_denoisers_that_have_no_divergence_are_named(monkeypatch):
    def detached(x_t, t, cond=None):
        pred = GaussianDenoiser(EVEN)(x_t, t, cond)
        return Prediction(pred.x0.detach(), pred.eps.detach())

    def broken(x_t, t, cond=None):
        pred = GaussianDenoiser(EVEN)(x_t, t, cond)
        return Prediction(pred.x0 * math.nan, pred.eps)

    def rough(x_t, t, cond=None):
        pred = GaussianDenoiser(EVEN)(x_t, t, cond)
        return Prediction(pred.x0 + 10 * (1e15 * x_t).sin(), pred.eps)

    monkeypatch.setattr("ddpm.likelihood._MAX_STEPS", 30)
    for denoiser, match in ((detached, "gradient"), (broken, "not finite at t = 1:"), (rough, "cannot be solved")):
        with pytest.raises(ValueError, match=match):
            log_density(denoiser, EVEN, data(2, (1, 1, 2)), t_min=1.0)


def test_a_missing_solver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        log_density(GaussianDenoiser(COSINE), COSINE, data(2))


@dataclass(frozen=True)
class BlackDenoiser:
    """E[x_0 | x_t] where every pixel is black in all images, dequantized: uniform in the lowest bin of 256."""

    schedule: NoiseSchedule

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        y, k = x_t / alpha, sigma / alpha
        low, high = ((edge - y) / k for edge in (-1 - 1 / 255, -1 + 1 / 255))
        normal = torch.distributions.Normal(torch.zeros((), dtype=x_t.dtype), torch.ones((), dtype=x_t.dtype))
        mass = (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-300)
        x_0 = y + k * (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / mass
        x_0 = x_0.clamp(-1 - 1 / 255, -1 + 1 / 255)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


@pytest.mark.parametrize(
    ("kind", "t_min", "cost"), [("linear", 1.0, 1.748), ("linear", None, 0.1757), ("cosine", None, 0.1757)]
)
def test_the_cost_of_stopping_short_of_zero_is_reported_for_a_constant_pixel(kind, t_min, cost):
    schedule = make_schedule(kind)
    black = -torch.ones(64, 1, 8, 8, dtype=torch.float64)
    found = ode_bits_per_dim(BlackDenoiser(schedule), schedule, black, seed=0, image_ids=torch.arange(64), t_min=t_min)
    assert found.truncation_cost == pytest.approx(cost, abs=1e-3)
    assert found.bits_per_dim.mean().item() == pytest.approx(cost, abs=0.02)  # a standard error is 0.005
    if t_min is None:
        assert schedule.sigma(found.t_min).item() == pytest.approx(1e-3, rel=1e-6)
