import pytest
import torch

from ddpm import prediction
from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, generate, to_uint8
from ddpm.guidance import Guides
from ddpm.models.unet import UNet, UNetConfig
from ddpm.prediction import NetworkDenoiser
from ddpm.samplers import SAMPLERS
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


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = UNet(
        UNetConfig(
            in_channels=1,
            out_channels=1,
            channels=(16, 16),
            layers_per_block=1,
            attention=(False, True),
            norm_groups=4,
            head_dim=8,
        )
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind not in ("consistency", "langevin")])
def test_in_bf16_networks_compute_in_bf16_and_samplers_in_float32(network, monkeypatch, kind):
    monkeypatch.setattr(prediction, "computes_bf16", lambda device: True)
    seen = set()
    handles = [
        module.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    denoiser = NetworkDenoiser(network, SCHEDULE, "v")
    settings = Sampling.of(kind=kind, steps=4)
    exact = generate(denoiser, SCHEDULE, settings, cond=None, count=2, shape=(1, 8, 8), seed=0)
    assert seen == {torch.float32}
    seen.clear()
    half = generate(
        denoiser, SCHEDULE, settings.with_fields(precision="bf16"), cond=None, count=2, shape=(1, 8, 8), seed=0
    )
    for handle in handles:
        handle.remove()
    assert seen == {torch.bfloat16}
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.05 * exact.std()


def test_settings_from_before_there_was_an_arithmetic_keep_theirs_and_their_key():
    settings, chosen = Sampling.of(steps=10), {"precision": "bf16", "compile": True}
    older = {name: value for name, value in settings.to_json().items() if name not in chosen}
    assert Sampling.from_json(older) == settings
    assert not chosen.keys() & settings.key().keys()
    assert settings.with_fields(**chosen).key() == {**settings.key(), **chosen}
    assert settings.with_fields(**chosen).exact == settings


class Small(torch.nn.Module):
    """A network that is quick to compile; counts how often Python runs it."""

    def __init__(self):
        super().__init__()
        self.mix, self.classes, self.runs = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Embedding(3, 1), 0

    def forward(self, x_t, t, cond=None):
        if not torch.compiler.is_compiling():
            self.runs += 1
        row = self.classes(torch.where(cond.drop, 2, cond.label) if cond.drop is not None else cond.label)
        return torch.tanh(self.mix(x_t) + row[:, :, None, None] + t[:, None, None, None] / 1000)


@pytest.mark.heavy
def test_a_compiled_network_draws_the_same_pictures_in_batches_of_any_size():
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    denoiser, settings = NetworkDenoiser(network, SCHEDULE, "v"), Sampling.of(steps=3, scale=2.0)
    options = {"cond": Conditioning(label=torch.arange(7) % 2), "shape": (1, 8, 8), "seed": 0, "batch_size": 4}
    exact = generate(denoiser, SCHEDULE, settings, **options)
    assert network.runs > 0
    network.runs = 0
    compiled = generate(denoiser, SCHEDULE, settings.with_fields(compile=True), **options)
    assert network.runs == 0
    torch.testing.assert_close(compiled, exact, rtol=1e-4, atol=1e-4)
    other = Small().eval().requires_grad_(False)  # of the same class, with other weights
    theirs = generate(NetworkDenoiser(other, SCHEDULE, "v"), SCHEDULE, settings.with_fields(compile=True), **options)
    assert (theirs - exact).abs().max() > 0.01


@pytest.mark.heavy
def test_a_weaker_model_that_guides_is_compiled_too():
    torch.manual_seed(0)
    networks = [Small().eval().requires_grad_(False) for _ in range(2)]
    main, weak = (NetworkDenoiser(network, SCHEDULE, "v") for network in networks)
    settings = Sampling.of(steps=2, scale=2.0, guidance="auto", weak="named", compile=True)
    cond = Conditioning(label=torch.zeros(2, dtype=torch.long))
    generate(main, SCHEDULE, settings, cond=cond, shape=(1, 8, 8), seed=0, guides=Guides(weak=weak))
    assert [network.runs for network in networks] == [0, 0]


def test_on_a_device_that_is_slower_in_bf16_networks_compute_in_float32_and_say_so(network, monkeypatch):
    monkeypatch.setattr(prediction, "computes_bf16", lambda device: False)
    denoiser = Sampling.of(precision="bf16").wrap(NetworkDenoiser(network, SCHEDULE, "v"), SCHEDULE)
    with pytest.warns(UserWarning, match="more slowly in it than in fp32"):
        half = denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1)).x0
    exact = Sampling().wrap(NetworkDenoiser(network, SCHEDULE, "v"), SCHEDULE)
    assert torch.equal(half, exact(torch.zeros(1, 1, 8, 8), torch.ones(1)).x0)
