"""Which levels samplers visit: against the lists of diffusers and the formulas of k-diffusion."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddpm.generate import Sampling, generate
from ddpm.samplers import DDIM, SAMPLERS, DPMSolver, initial_noise, last, step_noise
from ddpm.samplers.spacing import K_MAX, SPACINGS, exponential_ratios, karras_ratios, vp_ratios
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser

LINEAR, COSINE = make_schedule("linear"), make_schedule("cosine")


def diffusers_levels(spacing, steps, **options):
    """diffusers' DDIM timesteps as our levels: its table index is t - 1, and it ends at 0."""
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, **options)
    scheduler.set_timesteps(steps)
    return [float(index) + 1 for index in scheduler.timesteps] + [0.0]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 250, 1000])
def test_table_spacings_are_those_of_diffusers_ddim(spacing, steps):
    theirs = diffusers_levels(spacing, steps)
    if (spacing, steps) == ("linspace", 1):
        theirs[0] = 1000.0  # numpy.linspace gives the least noisy level alone, from which a sample cannot start
    assert SPACINGS[spacing](LINEAR, steps) == theirs


@pytest.mark.parametrize("steps", [10, 25])
def test_trailing_alone_differs_from_diffusers_where_the_steps_do_not_divide_t_by_rounding_only(steps):
    ours = SPACINGS["trailing"](make_schedule("linear", num_steps=990), steps)
    theirs = diffusers_levels("trailing", steps, num_train_timesteps=990)
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= 1


def test_karras_levels_are_those_of_k_diffusion_and_of_diffusers():
    """get_sigmas_karras(n, sigma_min, sigma_max, rho=7): (max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7."""
    low, high, n = 0.0292, 14.6146, 10
    ramp = np.linspace(0, 1, n)
    theirs = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(karras_ratios(low, high, n).numpy(), theirs, rtol=1e-12)
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(n)
    there = scheduler.sigmas[:-1].double()
    ours = karras_ratios(there[-1].item(), there[0].item(), n)
    torch.testing.assert_close(ours, there, rtol=1e-5, atol=0)


def test_exponential_levels_are_even_in_log_snr():
    ratios = exponential_ratios(0.01, 80.0, 9)
    torch.testing.assert_close(ratios.log().diff(), torch.full((8,), math.log(0.01 / 80) / 8, dtype=torch.float64))


def test_vp_levels_are_those_of_k_diffusion():
    """get_sigmas_vp(n, beta_d=19.9, beta_min=0.1, eps_s=1e-3): sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    t = np.linspace(1, 1e-3, 7)
    theirs = np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    np.testing.assert_allclose(vp_ratios(theirs[-1], theirs[0], 7).numpy(), theirs, rtol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "vp"])
def test_ratio_spacings_fall_from_80_or_the_top_to_the_least_trained_level(kind, zero_terminal_snr, spacing):
    schedule = make_schedule(kind, zero_terminal_snr=zero_terminal_snr)
    levels = SPACINGS[spacing](schedule, 12)
    assert len(levels) == 13
    assert all(t > s for t, s in itertools.pairwise(levels))
    assert levels[-1] == 0
    assert levels[-2] == pytest.approx(1, abs=1e-6)
    k = [(schedule.sigma(t) / schedule.alpha(t)).item() for t in levels[:-1]]
    top = min(math.tan(schedule.angle(schedule.num_steps).item()), K_MAX)
    assert k[0] == pytest.approx(top, rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", sorted(set(SAMPLERS) - {"langevin", "predictor_corrector", "consistency"}))
def test_every_sampler_recovers_gaussian_data_on_every_spacing(kind, spacing):
    image_ids = torch.arange(500)
    x_T, noise = initial_noise(0, image_ids, (1, 4, 4)).double(), step_noise(0, image_ids, (1, 4, 4))
    # Where a spacing leaves out the noisiest levels, x_T is taken for a sample of its first one.
    steps = {"ancestral": 250, "heun": 60, "dpm2": 60}.get(kind, 100)
    sampler = SAMPLERS[kind](steps=steps, spacing=spacing)  # type: ignore[call-arg]
    out = last(sampler(GaussianDenoiser(LINEAR), LINEAR, x_T, noise=noise))
    assert out.mean().item() == pytest.approx(0.2, abs=0.015)
    assert out.std().item() == pytest.approx(0.3, rel=0.06)


def test_a_respaced_sampler_visits_what_the_spacing_says_and_unknown_ones_are_refused():
    x_T = initial_noise(0, torch.arange(2), (1, 4, 4))
    for spacing in SPACINGS:
        steps = list(DDIM(steps=6, spacing=spacing)(GaussianDenoiser(COSINE), COSINE, x_T))
        assert [sample.t for sample in steps] == SPACINGS[spacing](COSINE, 6)[1:]
    with pytest.raises(ValueError, match=r"unknown spacing 'kerras'.*Did you mean 'karras'"):
        DPMSolver(spacing="kerras")
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            next(DDIM(steps=1001, spacing=spacing)(GaussianDenoiser(COSINE), COSINE, x_T))


def test_settings_with_levels_visit_them_and_survive_json():
    settings = Sampling(DDIM(steps=3, timesteps=(900.5, 400.0, 20.0, 0.0)))
    assert Sampling.from_json(settings.to_json()) == settings
    assert settings.key()["timesteps"] == [900.5, 400.0, 20.0, 0.0]
    assert "timesteps" not in Sampling(DDIM(steps=3)).key()
    x_T, denoiser = initial_noise(0, torch.arange(2), (1, 4, 4)), GaussianDenoiser(COSINE)
    steps = list(settings.sampler(denoiser, COSINE, x_T))
    assert [sample.t for sample in steps] == [400.0, 20.0, 0.0]
    images = generate(denoiser, COSINE, settings.with_fields(clip=None), cond=None, count=2, shape=(1, 4, 4), seed=0)
    assert torch.equal(images, steps[-1].x_t.clamp(-1, 1))


def test_levels_go_with_their_kind_and_number_of_steps():
    settings = Sampling(DDIM(steps=2, timesteps=(900.0, 400.0, 0.0)))
    assert settings.with_fields(scale=2.0).sampler == settings.sampler
    assert settings.with_fields(steps=5).sampler == DDIM(steps=5)
    assert settings.with_fields(kind="dpm_solver").sampler == DPMSolver(steps=2)
    assert settings.with_fields(kind="ddim", steps=2).sampler == settings.sampler
    moved = settings.with_fields(steps=1, timesteps=[700.0, 0.0])
    assert moved.sampler == DDIM(steps=1, timesteps=(700.0, 0.0))


@pytest.mark.parametrize(
    "timesteps, message",
    [
        ((900.0, 0.0), "timesteps must be 3 levels for 2 steps, got 2"),
        ((900.0, 900.0, 0.0), "strictly decreasing"),
        ((900.0, 400.0, 1.0), "the last 0"),
    ],
)
def test_levels_that_are_no_schedule_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        DDIM(steps=2, timesteps=timesteps)
