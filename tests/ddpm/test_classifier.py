import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ddpm.conditioning import Conditioning
from ddpm.guidance import ClassifierGuided, Guides
from ddpm.models.classifier import NoisyClassifier, class_loss, text_loss
from ddpm.models.unet import UNet, UNetConfig
from ddpm.noise import Purpose, integers, normal
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser

SCHEDULE = make_schedule("cosine")
CONFIG = UNetConfig(
    in_channels=1, out_channels=1, channels=(32, 32), layers_per_block=1, attention=(False, True), head_dim=32
)
NAMES = F.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(5)), dim=1)


def make(outputs, *, text=False):
    torch.manual_seed(0)
    return NoisyClassifier(CONFIG, outputs, text=text)


def batch(n):
    """Images that are bright (class 1) or dark (class 0), with timesteps and noise by ordinal."""
    label = (n % 2).long()
    x_0 = (label * 1.2 - 0.6).reshape(-1, 1, 1, 1) + 0.1 * normal(1, n, Purpose.SAMPLING, (1, 8, 8))
    return x_0, integers(0, n, Purpose.TIMESTEP, 1000) + 1, normal(0, n, Purpose.NOISE, (1, 8, 8)), label


def test_it_is_the_encoder_half_of_the_unet():
    unet, classifier = UNet(CONFIG).state_dict(), make(3).state_dict()
    own = {name for name in classifier if name.startswith(("norm_out", "head", "log_temperature"))}
    assert {name: tuple(t.shape) for name, t in classifier.items() if name not in own} == {
        name: tuple(t.shape)
        for name, t in unet.items()
        if name.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))
    }


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_classifier_of_noisy_images_learns_and_guides_samples_to_the_requested_class(kind):
    classifier = make(2) if kind == "class" else make(6, text=True)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for i in range(40):
        x_0, t, eps, label = batch(torch.arange(32) + 32 * i)
        if kind == "class":
            loss = class_loss(classifier, SCHEDULE, x_0, t, eps, label)
        else:
            loss = text_loss(classifier, SCHEDULE, x_0, t, eps, NAMES[label])
        assert loss.shape == (32,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    x_0, _, _, label = batch(torch.arange(64))
    t = torch.full((64,), 1.0)
    log_prob = classifier.log_prob
    asked, other = (Conditioning(label=y, pooled=NAMES[y]) for y in (label, 1 - label))
    assert (log_prob(x_0, t, asked) > log_prob(x_0, t, other)).float().mean() > 0.95
    base = GaussianDenoiser(SCHEDULE, mean=0.0, std=0.5)
    x_t, at = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((64,), 500.0)
    guided = ClassifierGuided(3.0).wrap(base, SCHEDULE, Guides(log_prob=log_prob))
    shift = guided(x_t, at, asked).x0 - base(x_t, at).x0
    towards = shift.mean((1, 2, 3)) * (2 * label - 1)
    assert (towards > 0).float().mean() > 0.95


def test_log_probabilities_of_classes_sum_to_one():
    classifier, x, t = make(4), torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 1000.0])
    each = [classifier.class_log_prob(x, t, Conditioning(label=torch.full((3,), y))) for y in range(4)]
    torch.testing.assert_close(torch.stack(each).exp().sum(0), torch.ones(3))


def test_equal_texts_share_the_contrastive_probability():
    """With one text for all the images there is nothing to tell apart: the loss is 0."""
    x_0, t, eps, _ = batch(torch.arange(8))
    loss = text_loss(make(6, text=True), SCHEDULE, x_0, t, eps, NAMES[:1].expand(8, -1))
    torch.testing.assert_close(loss, torch.zeros(8), rtol=0, atol=1e-5)


def test_mixed_precision_distinguishes_texts_as_float32_does():
    """Cosines of texts that are alike differ by less than bfloat16 can say."""
    generator = torch.Generator().manual_seed(3)
    texts = F.normalize(
        torch.randn(1, 384, generator=generator) + 0.1 * torch.randn(6, 384, generator=generator), dim=1
    )
    x_0, t, eps, _ = batch(torch.arange(24))
    classifier = make(384, text=True)
    whole = text_loss(classifier, SCHEDULE, x_0, t, eps, texts.repeat(4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = text_loss(classifier, SCHEDULE, x_0, t, eps, texts.repeat(4, 1))
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed, whole, rtol=0.05, atol=0.05)


def test_weights_of_an_earlier_release_have_a_scalar_for_a_temperature():
    stored = make(3).state_dict()
    stored["log_temperature"] = torch.tensor(-1.5)
    classifier = make(3)
    classifier.load_state_dict(stored)
    assert classifier.log_temperature.tolist() == [-1.5]


def test_the_wrong_condition_and_no_outputs_are_refused():
    x, t = torch.zeros(1, 1, 8, 8), torch.ones(1)
    with pytest.raises(ValueError, match=r"needs cond\.label"):
        make(2).log_prob(x, t, Conditioning())
    with pytest.raises(ValueError, match=r"needs cond\.pooled"):
        make(2, text=True).log_prob(x, t, Conditioning())
    with pytest.raises(ValueError, match="outputs"):
        make(0)
