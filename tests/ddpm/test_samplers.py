import pytest
import torch

from ddpm.prediction import coefficients
from ddpm.samplers import ancestral, ddim, initial_noise, last, step_noise
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, PointDenoiser

SCHEDULE = make_schedule("cosine")
SHAPE = (1, 4, 4)
IMAGES = torch.arange(2000)


def test_every_sampler_ends_in_the_only_image_there_is():
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    denoiser = PointDenoiser(SCHEDULE, image)
    x_T = initial_noise(0, torch.arange(3), SHAPE)
    noise = step_noise(0, torch.arange(3), SHAPE)
    for samples in (
        ddim(denoiser, SCHEDULE, x_T, steps=10),
        ddim(denoiser, SCHEDULE, x_T, steps=10, eta=1.0, noise=noise),
        ancestral(denoiser, SCHEDULE, x_T, steps=10, noise=noise),
    ):
        torch.testing.assert_close(last(samples), image.expand(3, *SHAPE), rtol=0, atol=1e-5)


def test_ddim_follows_its_recursion_on_gaussian_data():
    """With x_0 ~ N(m, s^2) one exact DDIM step is affine in x_t, so the variance has a closed recursion."""
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, IMAGES, SHAPE).double()
    out = last(ddim(denoiser, SCHEDULE, x_T, steps=50))
    std = 1.0
    for t, s in SCHEDULE.pairs(50):
        (a, b), (c, d) = [(SCHEDULE.alpha(u).item(), SCHEDULE.sigma(u).item()) for u in (t, s)]
        total = a**2 * denoiser.std**2 + b**2
        std *= abs(c * a * denoiser.std**2 + d * b) / total
    assert out.std().item() == pytest.approx(std * x_T.std().item(), rel=1e-6)
    assert out.mean().item() == pytest.approx(denoiser.mean, abs=0.01)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_recovers_gaussian_data(variance):
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, IMAGES, SHAPE).double()
    out = last(ancestral(denoiser, SCHEDULE, x_T, steps=400, noise=step_noise(0, IMAGES, SHAPE), variance=variance))
    assert out.mean().item() == pytest.approx(0.2, abs=0.01)
    assert out.std().item() == pytest.approx(0.3, abs=0.02)


def test_ddim_with_eta_one_has_the_ancestral_marginals():
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, IMAGES, SHAPE).double()
    noise = step_noise(0, IMAGES, SHAPE)
    one = last(ddim(denoiser, SCHEDULE, x_T, steps=100, eta=1.0, noise=noise))
    other = last(ancestral(denoiser, SCHEDULE, x_T, steps=100, noise=noise))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_ddim_agrees_with_diffusers_from_the_same_noise():
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(50)
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, torch.arange(4), SHAPE).double()
    theirs = x_T
    for index in scheduler.timesteps:
        eps = denoiser(theirs, torch.full((4,), float(index) + 1)).eps
        theirs = scheduler.step(eps, index, theirs).prev_sample
    torch.testing.assert_close(last(ddim(denoiser, SCHEDULE, x_T, steps=50)), theirs, rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    denoiser = GaussianDenoiser(SCHEDULE)

    def run(images):
        x_T = initial_noise(5, images, SHAPE)
        return last(ancestral(denoiser, SCHEDULE, x_T, steps=20, noise=step_noise(5, images, SHAPE)))

    torch.testing.assert_close(run(torch.arange(8))[5:6], run(torch.tensor([5])))


def test_every_step_is_given_out_on_the_way_down():
    steps = list(ddim(GaussianDenoiser(SCHEDULE), SCHEDULE, initial_noise(0, IMAGES[:2], SHAPE), steps=7))
    assert [s.t for s in steps] == SCHEDULE.timesteps(7)[1:]
    alpha, sigma = coefficients(SCHEDULE, steps[0].t, steps[0].x_t)
    assert steps[0].x_t.shape == steps[0].x0.shape == (2, *SHAPE)
    assert (steps[0].x_t - alpha * steps[0].x0).std() < 2 * sigma.max()


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1001}, {"eta": 2.0}, {"eta": 0.5}])
def test_ddim_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match=r"steps|eta"):
        last(ddim(GaussianDenoiser(SCHEDULE), SCHEDULE, torch.zeros(1, *SHAPE), **options))


def test_a_sampler_without_steps_is_an_error():
    with pytest.raises(ValueError, match="yielded nothing"):
        last(iter(()))
