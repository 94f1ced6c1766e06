import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser

SCHEDULE = make_schedule("cosine")
EXACT = GaussianDenoiser(SCHEDULE, std=0.1)


def draw(settings, **options):
    options = {"cond": Conditioning(label=torch.zeros(6, dtype=torch.long)), "shape": (1, 4, 4), "seed": 3, **options}
    return generate(EXACT, SCHEDULE, settings, **options)


@pytest.mark.parametrize(
    "settings",
    [
        Sampling.of(steps=10),
        Sampling.of(steps=10, scale=2.0),
        Sampling.of(steps=10, eta=1.0),
        Sampling.of(kind="ancestral", steps=10),
        Sampling.of(kind="dpm_solver", steps=10),
        Sampling.of(kind="heun", steps=5, scale=2.0, rescale=0.5),
        Sampling.of(kind="predictor_corrector", steps=5, corrector_steps=2),
        Sampling.of(steps=10, scale=4.0, clip=None, threshold=0.9),
    ],
)
def test_the_same_seed_gives_the_same_images_in_any_batching(settings):
    whole = draw(settings, batch_size=64)
    assert whole.shape == (6, 1, 4, 4)
    assert (to_uint8(draw(settings, batch_size=4)).int() - to_uint8(whole).int()).abs().max() <= 1
    some = draw(settings, cond=Conditioning(label=torch.zeros(2, dtype=torch.long)), image_ids=torch.tensor([4, 1]))
    torch.testing.assert_close(some, whole[[4, 1]], rtol=1e-4, atol=1e-4)
    assert not torch.equal(draw(settings, seed=4), whole)


def test_unconditional_images_need_a_count():
    assert draw(Sampling.of(steps=5), cond=None, count=3).shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="number of images"):
        draw(Sampling.of(steps=5), cond=None)


def test_images_stay_within_range_and_round_to_grey_levels():
    pixels = to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5))
    assert pixels.shape == (1, 1, 5, 1)
    assert pixels.flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "bad", [{"kind": "euler"}, {"scale": -1.0}, {"guidance": "own"}, {"guidance": "auto", "rescale": 0.5}]
)
def test_unknown_samplers_and_negative_scales_are_refused(bad):
    with pytest.raises(ValueError, match=r"sampler|scale|guidance"):
        Sampling.of(**bad)


@pytest.mark.parametrize(
    "settings, message",
    [
        (Sampling.of(guidance="classifier", steps=3), "guidance by a classifier needs one"),
        (Sampling.of(guidance="auto", steps=3), "autoguidance needs a weaker model"),
    ],
)
def test_guidance_by_a_network_that_is_not_there_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(settings)
