import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate
from ddpm.prediction import coefficients
from ddpm.samplers import DDIM, SAMPLERS, Ancestral, AnnealedLangevin, initial_noise, last, step_noise
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, MixtureDenoiser, PointDenoiser

SCHEDULE = make_schedule("cosine")
SHAPE = (1, 4, 4)
IMAGES = torch.arange(2000)


def test_every_sampler_ends_in_the_only_image_there_is():
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    denoiser = PointDenoiser(SCHEDULE, image)
    x_T = initial_noise(0, torch.arange(3), SHAPE)
    noise = step_noise(0, torch.arange(3), SHAPE)
    for samples in (
        DDIM(steps=10)(denoiser, SCHEDULE, x_T),
        DDIM(steps=10, eta=1.0)(denoiser, SCHEDULE, x_T, noise=noise),
        Ancestral(steps=10)(denoiser, SCHEDULE, x_T, noise=noise),
    ):
        torch.testing.assert_close(last(samples), image.expand(3, *SHAPE), rtol=0, atol=1e-5)


def test_ddim_follows_its_recursion_on_gaussian_data():
    """With x_0 ~ N(m, s^2) one exact DDIM step is affine in x_t, so the variance has a closed recursion."""
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, IMAGES, SHAPE).double()
    out = last(DDIM(steps=50)(denoiser, SCHEDULE, x_T))
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
    out = last(Ancestral(steps=400, variance=variance)(denoiser, SCHEDULE, x_T, noise=step_noise(0, IMAGES, SHAPE)))
    assert out.mean().item() == pytest.approx(0.2, abs=0.01)
    assert out.std().item() == pytest.approx(0.3, abs=0.02)


def test_ddim_with_eta_one_has_the_ancestral_marginals():
    denoiser = GaussianDenoiser(SCHEDULE)
    x_T = initial_noise(0, IMAGES, SHAPE).double()
    noise = step_noise(0, IMAGES, SHAPE)
    one = last(DDIM(steps=100, eta=1.0)(denoiser, SCHEDULE, x_T, noise=noise))
    other = last(Ancestral(steps=100)(denoiser, SCHEDULE, x_T, noise=noise))
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
    torch.testing.assert_close(last(DDIM(steps=50)(denoiser, SCHEDULE, x_T)), theirs, rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    denoiser = GaussianDenoiser(SCHEDULE)

    def run(images):
        x_T = initial_noise(5, images, SHAPE)
        return last(Ancestral(steps=20)(denoiser, SCHEDULE, x_T, noise=step_noise(5, images, SHAPE)))

    torch.testing.assert_close(run(torch.arange(8))[5:6], run(torch.tensor([5])))


def test_every_step_is_given_out_on_the_way_down():
    steps = list(DDIM(steps=7)(GaussianDenoiser(SCHEDULE), SCHEDULE, initial_noise(0, IMAGES[:2], SHAPE)))
    assert [s.t for s in steps] == SCHEDULE.timesteps(7)[1:]
    alpha, sigma = coefficients(SCHEDULE, steps[0].t, steps[0].x_t)
    assert steps[0].x_t.shape == steps[0].x0.shape == (2, *SHAPE)
    assert (steps[0].x_t - alpha * steps[0].x0).std() < 2 * sigma.max()


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1001}, {"eta": 2.0}, {"eta": 0.5}])
def test_ddim_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match=r"steps|eta"):
        last(DDIM(**options)(GaussianDenoiser(SCHEDULE), SCHEDULE, torch.zeros(1, *SHAPE)))


def test_the_markov_chain_refuses_to_take_no_steps():
    with pytest.raises(ValueError, match="steps must be >= 1"):
        last(Ancestral(steps=0)(GaussianDenoiser(SCHEDULE), SCHEDULE, torch.zeros(1, *SHAPE), noise=lambda s: 0))


def test_a_sampler_without_steps_is_an_error():
    with pytest.raises(ValueError, match="yielded nothing"):
        last(iter(()))


MIXTURE = MixtureDenoiser(
    SCHEDULE,
    means=torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], dtype=torch.float64),
    std=0.1,
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
)


def components(samples):
    """(share of each component, mean [3, 2], standard deviation [3]) of samples in the plane."""
    points = samples.flatten(1).double()
    nearest = torch.cdist(points, MIXTURE.means).argmin(1)
    parts = [points[nearest == k] for k in range(3)]
    return (
        torch.tensor([len(part) / len(points) for part in parts], dtype=torch.float64),
        torch.stack([part.mean(0) for part in parts]),
        torch.stack([(part - part.mean(0)).square().mean().sqrt() for part in parts]),
    )


# A corrector's step goes by the ratio of two norms, which two pixels are too few for: its own tests take more of them.
# Consistency sampling is of consistency functions, not of denoisers.
@pytest.mark.parametrize("kind", sorted(set(SAMPLERS) - {"predictor_corrector", "consistency"}))
def test_every_sampler_recovers_a_mixture_in_the_plane(kind):
    settings = Sampling.of(kind=kind, steps=200 if kind == "ancestral" else 100, clip=None)
    samples = generate(MIXTURE, SCHEDULE, settings, cond=None, count=4000, shape=(1, 1, 2), seed=5, batch_size=4000)
    share, mean, std = components(samples)
    torch.testing.assert_close(share, MIXTURE.weights, rtol=0, atol=0.03)  # a standard error is 0.008
    torch.testing.assert_close(mean, MIXTURE.means, rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.full_like(std, 0.1), rtol=0.12, atol=0)


def test_annealed_langevin_finds_the_components_of_a_mixture_in_the_plane():
    images = torch.arange(3000)
    x_T, noise = initial_noise(5, images, (1, 1, 2)).double(), step_noise(5, images, (1, 1, 2))
    grid = [*range(700, 300, -20), 300, 250, 200, 150, 100, 70, 50, 30, 0]
    chain = AnnealedLangevin(steps_per_level=20)(MIXTURE, SCHEDULE, x_T, noise=noise, timesteps=grid)
    share, mean, _ = components(last(chain))
    torch.testing.assert_close(share, MIXTURE.weights, rtol=0, atol=0.06)
    torch.testing.assert_close(mean, MIXTURE.means, rtol=0, atol=0.03)


# Langevin chains end in the last level's own distribution, where components so far apart feel no guidance.
@pytest.mark.parametrize("kind", sorted(set(SAMPLERS) - {"langevin", "consistency"}))
def test_a_label_draws_its_component_and_guidance_sharpens_it(kind):
    """Guided samples lie further from the other components than the component itself does (Ho & Salimans, fig. 2)."""
    cond = Conditioning(label=torch.full((1000,), 1))

    def draw(scale):
        settings = Sampling.of(kind=kind, steps=100, scale=scale, clip=None)
        samples = generate(MIXTURE, SCHEDULE, settings, cond=cond, shape=(1, 1, 2), seed=6, batch_size=1000)
        return samples.flatten(1).double()

    plain, guided = draw(1.0), draw(3.0)
    torch.testing.assert_close(plain.mean(0), MIXTURE.means[1], rtol=0, atol=0.02)
    others = MIXTURE.means[[0, 2]]
    assert torch.cdist(guided, others).mean() > torch.cdist(plain, others).mean() + 0.01


def test_real_levels_may_start_below_the_top_for_the_markov_samplers_too():
    x_t = initial_noise(0, torch.arange(4), SHAPE).double()
    noise = step_noise(0, torch.arange(4), SHAPE)
    denoiser = GaussianDenoiser(SCHEDULE)
    for run in (DDIM()(denoiser, SCHEDULE, x_t, timesteps=[400.5, 200.0, 0.0]),
                Ancestral()(denoiser, SCHEDULE, x_t, timesteps=[400.5, 200.0, 0.0], noise=noise)):  # fmt: skip
        assert [sample.t for sample in run] == [200.0, 0.0]
    with pytest.raises(ValueError, match="strictly decreasing"):
        next(DDIM()(denoiser, SCHEDULE, x_t, timesteps=[1.0, 2.0]))


def test_noise_of_levels_between_the_tables_is_of_their_own():
    noise = step_noise(0, torch.arange(3), (4,))
    assert not torch.equal(noise(10.0), noise(10.25))
    assert torch.equal(noise(10), noise(10.0))
