import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddpm.gaussian import reverse_variance
from ddpm.prediction import Prediction, coefficients, eps_from_x0
from ddpm.samplers import Ancestral, AnnealedLangevin, PredictorCorrector, initial_noise, last, step_noise
from ddpm.schedule import NoiseSchedule, make_schedule
from tests.ddpm.exact import GaussianDenoiser, PointDenoiser

COSINE = make_schedule("cosine")
SHAPE = (1, 4, 4)
IMAGES = torch.arange(1000)
FALLING = (900, 700, 500, 300, 200, 100, 50, 20)


@dataclass(frozen=True)
class MixtureDenoiser:
    """E[x_0 | x_t] where every pixel is N(-0.8, 0.1^2) with probability `weight` and N(0.8, 0.1^2) else."""

    schedule: NoiseSchedule
    weight: float = 0.25
    centre: float = 0.8
    std: float = 0.1

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        variance = alpha**2 * self.std**2 + sigma**2
        centres = torch.tensor([-self.centre, self.centre]).to(x_t)
        prior = torch.tensor([self.weight, 1 - self.weight]).to(x_t).log()
        away = x_t.unsqueeze(-1) - alpha.unsqueeze(-1) * centres
        share = (prior - away.square() / (2 * variance.unsqueeze(-1))).softmax(-1)
        each = centres + (alpha * self.std**2 / variance).unsqueeze(-1) * away
        x_0 = (share * each).sum(-1)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


@dataclass
class Recorder:
    """A denoiser or a noise source that keeps what it was asked and what it answered."""

    source: object

    def __post_init__(self):
        self.calls: list[tuple] = []

    def __call__(self, *args):
        answer = self.source(*args)
        self.calls.append((args, answer))
        return answer


def noises(images=IMAGES, shape=SHAPE, seed=0):
    return initial_noise(seed, images, shape).double(), step_noise(seed, images, shape)


def test_the_chain_has_the_moments_of_its_recursion_on_gaussian_data():
    """For x_0 ~ N(m, s^2) a Langevin step is affine in x, so mean and variance have closed recursions."""
    denoiser = GaussianDenoiser(COSINE)
    x_T, noise = noises()
    options = {"steps_per_level": 10, "step_size": 0.3}
    samples = list(AnnealedLangevin(**options)(denoiser, COSINE, x_T, noise=noise, timesteps=FALLING))
    assert [s.t for s in samples] == list(FALLING)
    mean, variance = 0.0, 1.0
    for sample in samples:
        alpha, sigma = COSINE.alpha(sample.t).item(), COSINE.sigma(sample.t).item()
        total = alpha**2 * denoiser.std**2 + sigma**2
        shrink = 1 - 0.3 * sigma**2 / (2 * total)
        for _ in range(10):
            mean = alpha * denoiser.mean + shrink * (mean - alpha * denoiser.mean)
            variance = shrink**2 * variance + 0.3 * sigma**2
        error = variance**0.5 / sample.x_t.numel() ** 0.5
        assert sample.x_t.mean().item() == pytest.approx(mean, abs=4 * error)
        assert sample.x_t.std().item() == pytest.approx(variance**0.5, abs=4 * error / 2**0.5)


def test_more_steps_per_level_bring_annealed_langevin_to_gaussian_data():
    x_T, noise = noises(IMAGES[:300])

    def run(steps_per_level):
        sampler = AnnealedLangevin(steps=40, steps_per_level=steps_per_level, step_size=0.5)
        return last(sampler(GaussianDenoiser(COSINE), COSINE, x_T, noise=noise))

    few, many = run(1), run(20)
    assert many.mean().item() == pytest.approx(0.2, abs=0.015)
    assert many.std().item() == pytest.approx(0.3, abs=0.015)
    assert few.std().item() > 0.4


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
def test_the_defaults_mix_well_enough_for_gaussian_data(kind):
    """By the recursion of mean and variance the standard deviations are 0.311, 0.308 and 0.304 where 0.3 is right."""
    schedule = make_schedule(kind)
    x_T, noise = noises(IMAGES[:600])
    out = last(AnnealedLangevin()(GaussianDenoiser(schedule), schedule, x_T, noise=noise))
    assert out.mean().item() == pytest.approx(0.2, abs=0.01)
    assert out.std().item() == pytest.approx(0.3, rel=0.045)


def share_below(x: Tensor) -> float:
    return (x < 0).double().mean().item()


@pytest.mark.heavy
@pytest.mark.parametrize("step_size", [0.2, 1.0])
def test_annealing_finds_the_weights_of_the_modes_and_one_level_alone_does_not(step_size):
    denoiser = MixtureDenoiser(COSINE)
    x_T, noise = noises(torch.arange(2000), (1, 1, 1))
    grid = [*range(700, 300, -10), 300, 250, 200, 150, 100, 70, 50, 30, 0]
    sampler = AnnealedLangevin(steps_per_level=20, step_size=step_size)
    annealed = last(sampler(denoiser, COSINE, x_T, noise=noise, timesteps=grid))
    assert share_below(annealed) == pytest.approx(0.25, abs=0.05)  # a standard error is 0.01, and mixing ends early
    below = annealed[annealed < 0]
    assert below.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert below.std().item() == pytest.approx(0.1, abs=0.02)
    # As many steps at the last level: each chain stays in the mode it fell into (Song & Ermon 2019, sec. 3.2.2).
    plain = AnnealedLangevin(steps_per_level=960)(denoiser, COSINE, x_T, noise=noise, timesteps=[30, 0])
    assert share_below(next(plain).x_t) == pytest.approx(0.5, abs=0.1)


def test_a_predictor_without_corrector_is_ancestral_sampling():
    x_T, noise = noises(IMAGES[:20])
    for variance in ("small", "large"):
        options = {"steps": 10, "variance": variance}
        ours = PredictorCorrector(corrector_steps=0, **options)(GaussianDenoiser(COSINE), COSINE, x_T, noise=noise)
        theirs = Ancestral(**options)(GaussianDenoiser(COSINE), COSINE, x_T, noise=noise)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=0)
            assert one.t == other.t


@pytest.mark.parametrize("denoiser", [GaussianDenoiser(COSINE), MixtureDenoiser(COSINE)], ids=["gaussian", "mixture"])
def test_corrections_reduce_the_error_of_few_steps(denoiser):
    """The spread of the (lower) mode at the last level above 0, relative to that of q(x_t), of 12 steps."""
    x_T, noise = noises(torch.arange(100), (1, 16, 16))

    def spread(corrector_steps):
        steps = PredictorCorrector(steps=12, corrector_steps=corrector_steps)(denoiser, COSINE, x_T, noise=noise)
        *_, sample, _ = steps
        alpha, sigma = COSINE.alpha(sample.t).item(), COSINE.sigma(sample.t).item()
        x_t = sample.x_t[sample.x_t < 0] if isinstance(denoiser, MixtureDenoiser) else sample.x_t
        return x_t.std().item() / (alpha**2 * denoiser.std**2 + sigma**2) ** 0.5

    alone, one, many = (spread(n) for n in (0, 1, 16))
    assert abs(alone - 1) > 0.15
    assert abs(one - 1) < 0.85 * abs(alone - 1)
    assert many == pytest.approx(1, abs=0.04)


def test_the_correctors_step_has_the_asked_signal_to_noise_ratio_in_every_image():
    """x' - x is e score + sqrt(2 e) z with |e score| = snr sqrt(1 - beta) |sqrt(2 e) z|, image by image."""
    snr, steps = 0.3, 20
    denoiser = Recorder(GaussianDenoiser(COSINE))
    x_T, source = noises(torch.arange(5))
    noise = Recorder(source)
    x_T = x_T * torch.logspace(-1, 1, 5, dtype=torch.float64).reshape(-1, 1, 1, 1)  # norms unlike their neighbours'
    samples = list(PredictorCorrector(steps=steps, snr=snr)(denoiser, COSINE, x_T, noise=noise))
    grid = COSINE.timesteps(steps)
    for i, sample in enumerate(samples[:-1]):
        (x, t, _), answer = denoiser.calls[2 * i + 1]
        _, z = noise.calls[2 * i + 1]
        assert set(t.tolist()) == {sample.t}
        score = -answer.eps / COSINE.sigma(sample.t)
        plane = torch.stack([score.flatten(1), z.double().flatten(1)], dim=-1)
        drift, scale = torch.linalg.lstsq(plane, (sample.x_t - x).flatten(1).unsqueeze(-1)).solution.squeeze(-1).T
        torch.testing.assert_close(scale**2, 2 * drift)
        ratio = drift * score.flatten(1).norm(dim=1) / (scale * z.double().flatten(1).norm(dim=1))
        one_minus_beta = COSINE.alpha_bar(sample.t) / COSINE.alpha_bar(grid[i + 2])
        torch.testing.assert_close(ratio, (snr * one_minus_beta.sqrt()).expand(5))


STOCHASTIC = {
    "annealed_langevin": lambda x_T, noise: AnnealedLangevin(steps=10, steps_per_level=3)(
        GaussianDenoiser(COSINE), COSINE, x_T, noise=noise
    ),
    "predictor_corrector": lambda x_T, noise: PredictorCorrector(steps=20, corrector_steps=2)(
        GaussianDenoiser(COSINE), COSINE, x_T, noise=noise
    ),
}


@pytest.mark.parametrize("run", STOCHASTIC.values(), ids=STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(run):
    images = torch.arange(8)
    x_T, noise = noises(images, seed=5)
    beside = torch.ones(8, 1, 1, 1, dtype=torch.float64)
    beside[:5] = 50  # neighbours whose norms would change a mean over the batch
    alone, own = noises(images[5:6], seed=5)
    torch.testing.assert_close(last(run(x_T * beside, noise))[5:6], last(run(alone, own)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", STOCHASTIC.values(), ids=STOCHASTIC)
def test_no_two_steps_share_their_noise(run):
    x_T, source = noises(torch.arange(2))
    noise = Recorder(source)
    last(run(x_T, noise))
    keys = [key for (key,), _ in noise.calls]
    assert len(keys) == len(set(keys)) == (30 if run is STOCHASTIC["annealed_langevin"] else 19 * 3)
    assert all(isinstance(key, int) and key >= 0 for key in keys)


def test_level_zero_is_the_denoised_last_level():
    denoiser = GaussianDenoiser(COSINE)
    x_T, noise = noises(torch.arange(3))
    *_, before, end = AnnealedLangevin(steps=5, steps_per_level=2)(denoiser, COSINE, x_T, noise=noise)
    assert (before.t, end.t) == (200, 0)
    torch.testing.assert_close(end.x_t, denoiser(before.x_t, torch.full((3,), 200.0)).x0)
    assert (end.x_t - before.x0).std() > 1e-3


@pytest.mark.parametrize("sampler", [AnnealedLangevin, PredictorCorrector])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_only_image_there_is_comes_out_in_float32(sampler, zero_terminal_snr):
    schedule = make_schedule("cosine", zero_terminal_snr=zero_terminal_snr)
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    x_T, noise = noises(torch.arange(3))
    *_, sample = sampler(steps=10)(PointDenoiser(schedule, image), schedule, x_T.float(), noise=noise)
    assert sample.t == 0
    assert sample.x_t.dtype == torch.float32
    torch.testing.assert_close(sample.x_t, image.expand(3, *SHAPE), rtol=0, atol=1e-5)


def test_a_learned_variance_takes_the_place_of_the_fixed_one():
    def learned(x_t, t, cond=None):
        pred = GaussianDenoiser(COSINE)(x_t, t, cond)
        return Prediction(pred.x0, pred.eps, torch.full_like(x_t, 0.5))

    def first(noise):
        return next(PredictorCorrector(steps=20, corrector_steps=0)(learned, COSINE, x_T, noise=noise)).x_t

    x_T, noise = noises(torch.arange(3))
    added = first(noise) - first(lambda key: torch.zeros_like(x_T))
    t, s = COSINE.timesteps(20)[:2]
    variances = [reverse_variance(t, s, COSINE, kind).item() for kind in ("small", "large")]
    torch.testing.assert_close(added, math.prod(variances) ** 0.25 * noise(s).double())


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (AnnealedLangevin, {"steps": 0}),
        (AnnealedLangevin, {"steps": 1001}),
        (AnnealedLangevin, {"steps_per_level": 0}),
        (AnnealedLangevin, {"step_size": 0.0}),
        (AnnealedLangevin, {"step_size": 2.0}),
        (AnnealedLangevin, {"timesteps": [1, 2]}),
        (PredictorCorrector, {"steps": 0}),
        (PredictorCorrector, {"steps": 1001}),
        (PredictorCorrector, {"corrector_steps": -1}),
        (PredictorCorrector, {"snr": 0.0}),
        (PredictorCorrector, {"snr": 1.0}),
    ],
)
def test_what_cannot_be_done_is_refused(sampler, options):
    x_T, noise = noises(torch.arange(1))
    timesteps, settings = options.get("timesteps"), {k: v for k, v in options.items() if k != "timesteps"}
    with pytest.raises(ValueError, match=r"steps|step_size|snr"):
        last(sampler(**settings)(GaussianDenoiser(COSINE), COSINE, x_T, noise=noise, timesteps=timesteps))
