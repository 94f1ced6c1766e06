import math

import pytest
import torch

from ddpm.bound import vlb_pair_term, vlb_term, vlb_weight
from ddpm.conditioning import Conditioning
from ddpm.gaussian import DiagonalGaussian, kl, p_reverse, q_sample
from ddpm.noise import Purpose, integers, normal
from ddpm.objectives import Objective, score_matching_loss, simple_loss
from ddpm.prediction import PARAMETERIZATIONS, coefficients, from_output, target
from ddpm.schedule import make_schedule
from ddpm.timesteps import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps
from ddpm.weights import WEIGHTS, MinSNR
from tests.ddpm.exact import GaussianDenoiser

SCHEDULE = make_schedule("cosine")


class Optimal(torch.nn.Module):
    """The best eps for x_0 ~ N(0, std^2): E[eps | x_t]."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x_t, t, cond):
        alpha, sigma = coefficients(SCHEDULE, t + 1, x_t)
        return sigma * x_t / (alpha**2 * self.std**2 + sigma**2)


def test_the_loss_of_the_optimal_predictor_is_the_posterior_variance_of_the_noise():
    """Var[eps | x_t] = alpha^2 std^2 / (alpha^2 std^2 + sigma^2) on Gaussian data."""
    n, std, t = torch.arange(4000), 0.5, 400
    x_0 = std * normal(0, n, Purpose.SAMPLING, (1, 4, 4))
    eps = normal(0, n, Purpose.NOISE, (1, 4, 4))
    loss = simple_loss(Optimal(std), SCHEDULE, x_0, torch.full_like(n, t), eps)
    alpha, sigma = SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()
    assert loss.shape == (4000,)
    assert loss.mean().item() == pytest.approx((alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2), rel=0.02)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_network_that_outputs_zero_pays_the_power_of_its_target(kind):
    class Zero(torch.nn.Module):
        def forward(self, x_t, t, cond):
            assert cond is not None
            return torch.zeros_like(x_t)

    n = torch.arange(2000)
    x_0, eps = normal(0, n, Purpose.SAMPLING, (1, 4, 4)), normal(0, n, Purpose.NOISE, (1, 4, 4))
    t = integers(0, n, Purpose.TIMESTEP, 1000) + 1
    loss = simple_loss(Zero(), SCHEDULE, x_0, t, eps, Conditioning(label=n % 10), prediction=kind)
    assert loss.mean().item() == pytest.approx(1, abs=0.03)


# --- weights and parameterizations ---------------------------------------------------------------------------


def drawn(n, t):
    """x_0, eps and x_t in float64 for n samples at timesteps t."""
    ordinals = torch.arange(n)
    x_0 = 0.3 * normal(7, ordinals, Purpose.SAMPLING, (1, 2, 2)).double() + 0.2
    eps = normal(7, ordinals, Purpose.NOISE, (1, 2, 2)).double()
    return x_0, eps, q_sample(x_0, t, eps, SCHEDULE)


def test_min_snr_weighs_the_same_error_the_same_in_every_parameterization():
    t = torch.tensor([1, 10, 200, 500, 800, 999])
    x_0, eps, x_t = drawn(6, t)
    wrong = x_0 + 0.1 * torch.randn_like(x_0)
    expected = SCHEDULE.snr(t).clamp(max=5) * (wrong - x_0).square().flatten(1).mean(1)
    wrong_eps = (x_t - coefficients(SCHEDULE, t, x_t)[0] * wrong) / coefficients(SCHEDULE, t, x_t)[1]
    for kind in PARAMETERIZATIONS:
        error = target(wrong, wrong_eps, t, SCHEDULE, kind) - target(x_0, eps, t, SCHEDULE, kind)
        weighted = MinSNR(5.0)(SCHEDULE, t, kind) * error.square().flatten(1).mean(1)
        torch.testing.assert_close(weighted, expected)


def test_min_snr_is_finite_where_there_is_no_signal():
    schedule = make_schedule("cosine", zero_terminal_snr=True)
    end = torch.tensor([1000])
    assert MinSNR(5.0)(schedule, end, "v").item() == 0
    assert MinSNR(5.0)(schedule, end, "eps").item() == 1
    with pytest.raises(ValueError, match="allowed"):
        MinSNR(5.0)(schedule, end, "mean")


def test_denoising_score_matching_is_noise_prediction_up_to_the_weight():
    """The same loss and the same gradient once weighted by sigma_t^2 (Ho et al. 2020, sec. 3.2)."""
    t = torch.tensor([1, 50, 300, 700, 1000])
    _, eps, _ = drawn(5, t)
    eps_theta = torch.randn_like(eps).requires_grad_()
    sigma = coefficients(SCHEDULE, t, eps)[1]
    dsm = sigma.flatten().square() * score_matching_loss(-eps_theta / sigma, eps, t, SCHEDULE)
    simple = (eps_theta - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(dsm, simple)
    by_dsm, by_simple = (torch.autograd.grad(loss.sum(), eps_theta)[0] for loss in (dsm, simple))
    torch.testing.assert_close(by_dsm, by_simple)


def test_the_minimizer_of_score_matching_is_the_score_of_the_noised_data():
    """For Gaussian data the score of q(x_t) is linear: no other slope has a smaller loss."""
    t = torch.full((4000,), 300)
    _, eps, x_t = drawn(4000, t)
    variance = (SCHEDULE.alpha_bar(300) * 0.3**2 + 1 - SCHEDULE.alpha_bar(300)).item()
    centred = x_t - 0.2 * SCHEDULE.alpha(300)
    losses = {
        gain: score_matching_loss(-gain * centred / variance, eps, t, SCHEDULE).mean().item()
        for gain in (0.9, 0.95, 1.0, 1.05, 1.1)
    }
    assert min(losses, key=losses.__getitem__) == 1.0


# --- the bound -----------------------------------------------------------------------------------------------


def pairs(t, n, seed=0):
    """(x_0, x_{t-1}, x_t) drawn along the forward chain, n times."""
    ordinals = torch.arange(n)
    x_0 = 0.2 + 0.3 * normal(seed, ordinals, Purpose.SAMPLING, (1, 1, 1)).double()
    first = normal(seed, ordinals, Purpose.NOISE, (1, 1, 1)).double()
    second = normal(seed + 1, ordinals, Purpose.NOISE, (1, 1, 1)).double()
    x_s = q_sample(x_0, t - 1, first, CHAIN)
    beta = CHAIN.betas[t - 1]
    return x_0, x_s, (1 - beta).sqrt() * x_s + beta.sqrt() * second


CHAIN = make_schedule("linear", num_steps=50)
DENOISER = GaussianDenoiser(CHAIN, mean=0.1, std=0.5)  # not the data's: every term is positive


@pytest.mark.parametrize("t, ratio", [(2, 1.2), (5, 5), (10, 25), (40, 1000)])
def test_pairs_estimate_the_kl_form_with_more_variance(t, ratio):
    """Fresh draws per t: equal expectation (with x_0 in the posterior, at every t), the KL form tighter everywhere.

    Near the data the two are alike (1.4 times), in the noise, where a KL is nearly 0, they are not (60,000 times).
    """
    x_0, x_s, x_t = pairs(t, 40_000)
    at = torch.full((len(x_0),), t)
    pred = DENOISER(x_t, at)
    exact = vlb_term(pred, x_0, x_t, at, CHAIN)
    paired = vlb_pair_term(pred, x_s, x_t, at, CHAIN, x_0=x_0)
    error = (paired - exact).std().item() / len(x_0) ** 0.5
    assert paired.mean().item() == pytest.approx(exact.mean().item(), abs=4 * error)
    assert paired.var() > ratio * exact.var()


def test_pairs_with_the_transition_differ_by_what_sums_to_the_prior_term():
    """Per t by E[log q(x_t | x_0) - log q(x_{t-1} | x_0)]; over all t, with log p(x_T), the two bounds are one."""
    total_pairs = total_kl = spread = 0.0
    n = 20_000
    for t in range(2, 51):
        x_0, x_s, x_t = pairs(t, n, seed=3 * t)
        at = torch.full((n,), t)
        pred = DENOISER(x_t, at)
        paired, exact = vlb_pair_term(pred, x_s, x_t, at, CHAIN), vlb_term(pred, x_0, x_t, at, CHAIN)
        bar_t, bar_s = CHAIN.alpha_bar(t), CHAIN.alpha_bar(t - 1)
        gap = (torch.log((1 - bar_s) / (1 - bar_t)) / 2).item() / math.log(2)  # of the two entropies
        error = (paired - exact).std().item() / n**0.5
        assert paired.mean().item() - exact.mean().item() == pytest.approx(gap, abs=4.5 * error)
        total_pairs, total_kl = total_pairs + paired.mean().item(), total_kl + exact.mean().item()
        spread += error**2
    bar_1, bar_T = CHAIN.alpha_bar(1), CHAIN.alpha_bar(50)
    telescoped = (torch.log((1 - bar_1) / (1 - bar_T)) / 2).item() / math.log(2)
    assert total_pairs - total_kl == pytest.approx(telescoped, abs=4 * spread**0.5)


def test_the_kl_term_is_the_weighted_error_of_the_noise():
    """DDPM, eq. 12: with p's variance the posterior's, the term is vlb_weight |eps - eps_theta|^2 in nats."""
    t = torch.tensor([2, 10, 30, 50])
    x_0, eps = torch.randn(2, 4, 1, 1, 1, dtype=torch.float64)
    x_t = q_sample(x_0, t, eps, CHAIN)
    pred = from_output(torch.randn_like(eps), x_t, t, CHAIN, "eps")
    nats = vlb_term(pred, x_0, x_t, t, CHAIN) * math.log(2)
    torch.testing.assert_close(nats, vlb_weight(CHAIN, t) * (pred.eps - eps).square().flatten())


def test_the_simple_loss_weighs_noisy_steps_more_than_the_bound_does():
    """Relative to the bound's, L_simple's weight is least at small t, the details (DDPM, sec. 3.4).

    It rises a hundredfold over the first third of the chain, and of that no more than a half is lost up to the end.
    """
    relative = 1 / vlb_weight(make_schedule("linear"), torch.arange(2, 1001))
    peak = int(relative.argmax())
    assert 300 < peak < 400
    assert (relative[: peak + 1].diff() > 0).all()
    assert relative[peak] > 100 * relative[0]
    assert relative[-1] > 0.4 * relative[peak]


def test_at_the_first_step_the_term_is_the_decoder_and_the_posterior_has_no_density_there():
    t = torch.ones(4, dtype=torch.long)
    x_0, x_t = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(4, 1, 1, 1), torch.zeros(4, 1, 1, 1).double()
    term = vlb_term(DENOISER(x_t, t), x_0, x_t, t, CHAIN)
    assert (term > 0).all()
    decoder = p_reverse(DENOISER(x_t, t), x_t, t, t - 1, CHAIN, "small").discretized_log_prob(x_0)
    torch.testing.assert_close(term, -decoder.flatten(1).mean(1) / math.log(2))
    with pytest.raises(ValueError, match="no density"):
        vlb_pair_term(DENOISER(x_t, t), x_0, x_t, t, CHAIN, x_0=x_0)
    assert torch.isfinite(vlb_pair_term(DENOISER(x_t, t), x_0, x_t, t, CHAIN)).all()


# --- Objective -----------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """Outputs w x_t, and where asked a variance fraction that is one number."""

    def __init__(self, learns_variance):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
        self.raw = torch.nn.Parameter(torch.tensor(-1.0)) if learns_variance else None

    def forward(self, x_t, t, cond):
        mean = self.w * x_t
        return mean if self.raw is None else torch.cat([mean, self.raw.expand_as(x_t)], dim=1)


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_simple_loss():
    t = torch.tensor([2, 100, 400, 900])
    x_0, eps, _ = (x.float() for x in drawn(4, t))
    network = Linear(learns_variance=True)
    hybrid = Objective(loss="hybrid").losses(network, SCHEDULE, x_0, t, eps)
    simple = Objective().losses(network, SCHEDULE, x_0, t, eps)
    vlb = Objective(loss="vlb").losses(network, SCHEDULE, x_0, t, eps)
    torch.testing.assert_close(hybrid, simple + 1e-3 * vlb)
    of_hybrid = torch.autograd.grad(hybrid.sum(), (network.w, network.raw), retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), network.w, retain_graph=True)
    (of_vlb,) = torch.autograd.grad(vlb.sum(), network.raw)
    torch.testing.assert_close(of_hybrid[0], of_simple)
    torch.testing.assert_close(of_hybrid[1], 1e-3 * of_vlb)
    with pytest.raises(ValueError, match="twice the output channels"):
        Objective(loss="hybrid").losses(Linear(learns_variance=False), SCHEDULE, x_0, t, eps)


def test_the_bound_learns_the_variance_of_the_true_reverse_step():
    """On Gaussian data q(x_{t-1} | x_t) is Gaussian: the fraction that minimizes L_vlb gives its variance."""
    t, n = 30, 20_000
    x_0, _, x_t = pairs(t, n)
    exact = GaussianDenoiser(CHAIN, mean=0.2, std=0.3)
    bar_t, bar_s, beta = CHAIN.alpha_bar(t), CHAIN.alpha_bar(t - 1), CHAIN.betas[t - 1]
    var_s, var_t = bar_s * 0.09 + 1 - bar_s, bar_t * 0.09 + 1 - bar_t
    true = var_s - (1 - beta) * var_s**2 / var_t
    small = beta * (1 - bar_s) / (1 - bar_t)
    best = (torch.log(true / small) / torch.log(beta / small)).item()
    at, losses = torch.full((n,), t), {}
    for fraction in (best - 0.1, best, best + 0.1):
        pred = exact(x_t, at)
        pred = type(pred)(pred.x0, pred.eps, torch.full_like(x_t, fraction))
        losses[fraction] = vlb_term(pred, x_0, x_t, at, CHAIN).mean().item()
    assert 0 < best < 1
    assert min(losses, key=losses.__getitem__) == best


def test_vlb_of_uniform_timesteps_estimates_the_sum_of_the_terms():
    n = torch.arange(20_000)
    t, _ = UniformTimesteps().make(chain(50), 1, seed=0).sample(n)
    x_0 = normal(0, n, Purpose.SAMPLING, (1, 1, 1))
    eps = normal(0, n, Purpose.NOISE, (1, 1, 1))
    network = Linear(learns_variance=False)
    losses = Objective(loss="vlb").losses(network, CHAIN, x_0, t, eps)
    by_step = [losses[t == step].mean().item() / 50 for step in range(1, 51)]
    assert losses.mean().item() == pytest.approx(sum(by_step), rel=0.05)


def test_the_prior_term_of_the_tables_end_is_small():
    end = DiagonalGaussian(CHAIN.alpha(50), CHAIN.sigma(50).square())
    assert kl(end, DiagonalGaussian(torch.tensor(0.0), torch.tensor(1.0))).item() < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Objective(loss="l1"),
        lambda: WEIGHTS.find("l2"),
        lambda: MinSNR(gamma=0.0),
        lambda: Objective(vlb_weight=-1.0),
    ],
)
def test_unknown_objectives_are_refused(make):
    with pytest.raises(ValueError, match=r"unknown|must be"):
        make()


def chain(num_steps):
    return make_schedule("cosine", num_steps=num_steps)


# --- timesteps -----------------------------------------------------------------------------------------------


def test_uniform_timesteps_cover_the_chain_evenly():
    t, _ = UniformTimesteps().make(chain(50), 1, seed=0).sample(torch.arange(100_000))
    counts = torch.bincount(t, minlength=51)
    assert counts[0] == 0
    assert counts[1:].min() > 1700
    assert counts[1:].max() < 2300


@pytest.mark.parametrize("batch_size", [7, 64])
def test_stratified_timesteps_fill_every_stratum_of_a_batch_once(batch_size):
    ordinals = torch.arange(10 * batch_size)
    sampler = StratifiedTimesteps().make(chain(1000), batch_size, seed=0)
    t, _ = sampler.sample(ordinals)
    strata = ((t - 1) * batch_size // 1000).reshape(10, batch_size)
    expected = torch.arange(batch_size)
    assert ((strata.sort(1).values - expected).abs() <= 1).all()  # 1000 / 64 is no integer: borders share a timestep
    parts = [sampler.sample(ordinals[i::3])[0] for i in range(3)]
    for i, part in enumerate(parts):
        assert torch.equal(part, t[i::3])


def test_stratified_timesteps_are_uniform_in_every_place_of_the_batch():
    t, _ = StratifiedTimesteps().make(chain(1000), 8, seed=1).sample(torch.arange(8 * 4000))
    t = t.reshape(4000, 8).double()
    assert (t.mean(0) - 500.5).abs().max() < 4.5 * 289 / 4000**0.5
    assert t.mean(1).std() < 0.5 * 289 / 8**0.5  # far less than of independent ones


def test_importance_sampling_is_uniform_until_it_knows_every_timestep_and_then_unbiased():
    sampler = ImportanceTimesteps(history=3).make(chain(5), 1, seed=0)
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).double()
    assert sampler.probabilities().tolist() == [0.2] * 5
    for _ in range(3):
        sampler.record(torch.arange(1, 6), truth)
    p = sampler.probabilities()
    assert p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(p, truth / truth.sum(), rtol=0.01, atol=0)
    t, weight = sampler.sample(torch.arange(50_000))
    torch.testing.assert_close(torch.bincount(t, minlength=6)[1:] / 50_000, p.float(), rtol=0.1, atol=0.003)
    assert (weight * truth[t - 1]).mean().item() == pytest.approx(truth.mean().item(), rel=0.01)
    assert (weight * truth[t - 1]).std() < 0.1 * truth.std()


def test_the_history_keeps_the_newest_losses_and_survives_a_checkpoint():
    sampler = ImportanceTimesteps(history=2).make(chain(2), 1, seed=0)
    sampler.record(torch.tensor([1, 1, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 9.0]))
    assert sampler.losses[0].tolist() == [2.0, 3.0]
    assert sampler.counts.tolist() == [2, 1]
    other = ImportanceTimesteps(history=2).make(chain(2), 1, seed=0)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.losses, sampler.losses)
    with pytest.raises(ValueError, match="history is of shape"):
        ImportanceTimesteps(history=2).make(chain(3), 1, seed=0).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="history must be >= 1"):
        ImportanceTimesteps(history=0)
