"""UniPC: its order, diffusers' scheduler, and the ends of the schedule."""

import itertools
import math

import pytest
import torch

from ddpm.samplers import DDIM, UniPC, last
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, PointDenoiser
from tests.ddpm.test_ode_samplers import COSINE, END, UNIFORM, error, even, exact, noise


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_the_predictor_has_its_order_and_the_corrector_one_more(order, corrector):
    """Theorem 3.1, on the exact solution for Gaussian data."""
    denoiser, x_T = GaussianDenoiser(UNIFORM, 0.2, 0.3), noise()
    truth = exact(denoiser, UNIFORM, x_T, END)
    sampler = UniPC(order=order, corrector=corrector)
    errors = [error(last(sampler(denoiser, UNIFORM, x_T, timesteps=even(n))), truth) for n in (112, 224, 448)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order + corrector, abs=0.25), errors


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_agrees_with_diffusers_from_the_same_noise(order):
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.UniPCMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", solver_order=order, lower_order_final=False
    )
    scheduler.set_timesteps(20)
    denoiser = GaussianDenoiser(COSINE)
    theirs = x_T = noise(4)
    ours = list(UniPC(steps=20, order=order)(denoiser, COSINE, x_T))
    for index, sample in zip(scheduler.timesteps[:-1], ours, strict=False):  # at level 0 theirs is not finite
        eps = denoiser(theirs, torch.full((4,), float(index) + 1)).eps
        theirs = scheduler.step(eps, index, theirs).prev_sample
        assert error(sample.x_t, theirs) < 2e-4  # their tables are float32
    assert error(ours[10].x_t, list(DDIM(steps=20)(denoiser, COSINE, x_T))[10].x_t) > 2e-3


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_only_image_there_is_comes_out_in_float32(zero_terminal_snr, steps):
    schedule = make_schedule("cosine", zero_terminal_snr=zero_terminal_snr)
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    out = last(UniPC(steps=steps)(PointDenoiser(schedule, image), schedule, noise(3).float()))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, image.expand(3, 1, 4, 4), rtol=0, atol=1e-5)


def test_it_evaluates_once_a_step_and_beats_ddim_of_as_many():
    calls = []

    def counting(x_t, t, cond=None):
        calls.append(t[0].item())
        return denoiser(x_t, t, cond)

    denoiser = GaussianDenoiser(COSINE, -0.8, 1.0)
    truth = exact(denoiser, COSINE, noise(), 0)
    ours = error(last(UniPC(steps=20)(counting, COSINE, noise())), truth)
    assert calls == COSINE.timesteps(20)[:-1]
    assert ours < error(last(DDIM(steps=20)(denoiser, COSINE, noise())), truth) / 2
