"""DDIM inversion: from an image to its noise and back."""

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.samplers import DDIM, initial_noise, last
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, MixtureDenoiser

COSINE = make_schedule("cosine")
GREY_LEVEL = 2 / 255
MIXTURE = MixtureDenoiser(
    COSINE, means=torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], dtype=torch.float64), std=0.1
)


def there_and_back(denoiser, images, cond=None, steps=50, **options):
    sampler, schedule = DDIM(steps=steps), denoiser.schedule
    up = list(sampler.invert(denoiser, schedule, images, cond, **options))
    assert [sample.t for sample in up] == schedule.timesteps(steps)[::-1][1:]
    return last(sampler(denoiser, schedule, up[-1].x_t, cond)), up[-1].x_t


@pytest.mark.parametrize("std", [0.3, 1.0])
@pytest.mark.parametrize("schedule", [COSINE, make_schedule("flow")], ids=["cosine", "flow"])
def test_gaussian_images_come_back_to_under_one_grey_level(schedule, std):
    images = 0.2 + std * initial_noise(0, torch.arange(64), (1, 4, 4)).double()
    back, noise = there_and_back(GaussianDenoiser(schedule, std=std), images)
    assert (back - images).abs().max() < GREY_LEVEL
    assert noise.std().item() == pytest.approx(1, rel=0.1)


def test_images_of_a_mixture_come_back_to_under_one_grey_level_with_their_label():
    label = torch.arange(60) % 3
    spread = 0.1 * initial_noise(1, torch.arange(60), (1, 1, 2)).double()
    images = MIXTURE.means[label].reshape(60, 1, 1, 2) + spread
    cond = Conditioning(label=label)
    back, _ = there_and_back(MIXTURE, images, cond)
    assert (back - images).abs().max() < GREY_LEVEL


def test_corrections_are_what_brings_images_back():
    images = 0.2 + 0.3 * initial_noise(0, torch.arange(64), (1, 4, 4)).double()
    errors = [
        (there_and_back(GaussianDenoiser(COSINE), images, steps=20, corrections=n)[0] - images).abs().max().item()
        for n in (0, 1, 3, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > GREY_LEVEL > errors[-1]


@pytest.mark.parametrize("std", [0.01, 0.03, 0.1])
def test_more_corrections_do_no_harm_where_the_density_has_sharp_edges(std):
    images = MIXTURE.means[torch.arange(60) % 3].reshape(60, 1, 1, 2)
    images = images + std * initial_noise(1, torch.arange(60), (1, 1, 2)).double()
    sharp = MixtureDenoiser(COSINE, means=MIXTURE.means, std=std)
    errors = [
        (there_and_back(sharp, images, steps=20, corrections=n)[0] - images).abs().mean().item() for n in (0, 5, 50)
    ]
    print(std, errors)
    assert errors[2] <= errors[1] * 1.05 <= errors[0] * 1.1


def test_inversion_finds_what_sampling_began_with():
    """From level 900: at the very top the image does not depend on x_T, which then cannot be told from it."""
    x_t = initial_noise(0, torch.arange(32), (1, 4, 4)).double()
    denoiser, grid = GaussianDenoiser(COSINE), list(range(900, -1, -18))
    images = last(DDIM()(denoiser, COSINE, x_t, timesteps=grid))
    *_, top = DDIM().invert(denoiser, COSINE, images, corrections=60, timesteps=grid)
    torch.testing.assert_close(top.x_t, x_t, rtol=0, atol=1e-12)


def test_without_corrections_it_is_the_inversion_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.DDIMInverseScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(50)
    denoiser = GaussianDenoiser(COSINE)
    images = theirs = 0.2 + 0.3 * initial_noise(0, torch.arange(4), (1, 4, 4)).double()
    for index in scheduler.timesteps:
        # The scheduler leaves it to its caller at which level the network is asked: at the one that the step leaves.
        eps = denoiser(theirs, torch.full((4,), max(float(index) + 1 - 20, 1.0))).eps
        theirs = scheduler.step(eps, index, theirs).prev_sample
    *_, ours = DDIM(steps=50).invert(denoiser, COSINE, images, corrections=0)
    torch.testing.assert_close(ours.x_t, theirs, rtol=0, atol=1e-3)  # their tables are float32


def test_noisy_samplers_cannot_be_inverted():
    images = torch.zeros(1, 1, 4, 4)
    for sampler, options in ((DDIM(eta=0.5), {}), (DDIM(), {"corrections": -1})):
        with pytest.raises(ValueError, match="eta = 0 and corrections >= 0"):
            next(sampler.invert(GaussianDenoiser(COSINE), COSINE, images, **options))
