"""Properties of every way in which a model draws pictures."""

from dataclasses import replace

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.inference import (
    INPAINTERS,
    MAX_VALUES,
    Editing,
    Inpainting,
    Inverting,
    Noise,
    class_indices,
    draw,
)
from ddpm.model import Model, ModelSpec
from ddpm.models.unet import UNetConfig
from ddpm.samplers.repaint import RePaint

CLASSES = ("circle", "square", "7", "a, b")
CONFIG = UNetConfig(
    in_channels=1,
    out_channels=1,
    channels=(8,),
    layers_per_block=1,
    attention=(False,),
    head_dim=8,
    norm_groups=4,
    num_classes=len(CLASSES),
)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = (torch.randint(0, 256, (5, 1, 8, 8), generator=GENERATOR) / 127.5 - 1).float()
LABELS = Conditioning(label=torch.tensor([0, 1, 2, 3, 0]))
MASK = torch.rand(5, 1, 8, 8, generator=GENERATOR) > 0.5
FOURTH = (torch.arange(5) == 3)[:, None, None, None]
SETTINGS = Sampling.of(steps=6, scale=2.0)


def a_model(**changes) -> Model:
    """A network whose output layer is not zero, as it is at the start of a training, with outputs of a usual size."""
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    network = config.build().eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return Model(ModelSpec(config, {"kind": "cosine", "num_steps": 50}, "v", 8, CLASSES, SETTINGS), network)


MODEL, PAINTER = a_model(), a_model(context_channels=1)
ONE = RePaint(steps=5, jump_length=2, resamplings=2)


@pytest.mark.parametrize(
    "model, task, settings",
    [
        (MODEL, None, SETTINGS),
        (MODEL, None, Sampling.of(kind="ancestral", steps=6, scale=2.0)),
        (MODEL, Inpainting(IMAGES, MASK, ONE), SETTINGS),
        (MODEL, Inpainting(IMAGES, MASK, INPAINTERS["replacement"](steps=6)), SETTINGS),  # type: ignore[call-arg]
        (PAINTER, Inpainting(IMAGES, MASK), SETTINGS),
        (MODEL, Editing(IMAGES, 0.5), SETTINGS),
        (MODEL, Editing(IMAGES, 0.5), Sampling.of(kind="ancestral", steps=6)),
        (MODEL, Inverting(IMAGES, 0.7, LABELS), SETTINGS),
    ],
)
def test_a_picture_depends_on_its_own_row_and_not_on_its_batch(model, task, settings):
    noise = Noise.of([3, 1, 4, 1, 5])
    whole = to_uint8(draw(model, noise, LABELS, task, sampling=settings).images).int()
    parts = to_uint8(draw(model, noise, LABELS, task, sampling=settings, batch_size=2).images).int()
    assert (whole - parts).abs().max() <= 1
    one = slice(3, 4)
    own = None if task is None else task.part(one, torch.device("cpu"))
    alone = draw(model, noise.map(lambda tensor: tensor[one]), LABELS[one], own, sampling=settings).images
    assert (to_uint8(alone).int() - whole[one]).abs().max() <= 1
    assert whole.float().std() > 1


def test_one_seed_gives_what_the_model_gives_by_itself():
    ours = draw(MODEL, Noise.numbered(9, 5), LABELS).images
    assert torch.equal(ours, MODEL.generate(LABELS.label, seed=9))
    assert torch.equal(
        draw(MODEL, Noise.of([9]), LABELS[:1]).images, draw(MODEL, Noise.numbered(9, 1), LABELS[:1]).images
    )


@pytest.mark.parametrize("kind", ["ddim", "ancestral"])
def test_an_interpolation_starts_and_ends_with_the_pictures_of_its_seeds(kind):
    settings, label = Sampling.of(kind=kind, steps=6), Conditioning(label=torch.zeros(5, dtype=torch.long))
    between = draw(MODEL, Noise.between(3, 8, 5), label, sampling=settings).images
    ends = draw(MODEL, Noise.of([3, 8]), label[:2], sampling=settings).images
    torch.testing.assert_close(between[[0, 4]], ends, rtol=1e-4, atol=1e-4)
    assert (between.diff(dim=0).abs().amax((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("model, method", [(MODEL, ONE), (MODEL, INPAINTERS["replacement"](steps=6)), (PAINTER, None)])  # type: ignore[call-arg]
def test_known_pixels_come_out_exactly_and_the_others_do_not(model, method):
    drawn = draw(model, Noise.numbered(0, 5), LABELS, Inpainting(IMAGES, MASK, method)).images
    assert torch.equal(drawn[MASK], IMAGES[MASK])
    assert (drawn[~MASK] != IMAGES[~MASK]).float().mean() > 0.9
    changed = IMAGES.where(MASK, torch.nan)  # whatever a hidden pixel is
    assert torch.equal(draw(model, Noise.numbered(0, 5), LABELS, Inpainting(changed, MASK, method)).images, drawn)


def test_a_stronger_edit_leaves_less_of_the_image_and_none_leaves_all():
    noise = Noise.numbered(0, 5)
    results = [draw(MODEL, noise, LABELS, Editing(IMAGES, s)).images for s in (0.0, 0.2, 0.6, 1.0)]
    assert torch.equal(to_uint8(results[0]), to_uint8(IMAGES))
    assert torch.equal(draw(MODEL, noise, LABELS, Inverting(IMAGES, 0.0)).images, IMAGES)
    distances = [(result - IMAGES).square().mean().item() for result in results]
    assert distances == sorted(distances)
    assert distances[1] > 0


def test_a_learned_solver_draws_whole_pictures_and_edits_none():
    learned = Sampling.of(kind="generalized", steps=1, timesteps=(50.0, 0.0), weights=(0.0, 1.0))
    noise = Noise.numbered(0, 5)
    assert torch.equal(draw(MODEL, noise, LABELS, Editing(IMAGES, 0.0), sampling=learned).images, IMAGES)
    with pytest.raises(ValueError, match="cannot begin or end elsewhere: use another sampler, such as dpm_solver"):
        draw(MODEL, noise, LABELS, Editing(IMAGES, 1.0), sampling=learned)
    drawn = draw(MODEL, noise, LABELS, sampling=learned).images
    one_step = draw(MODEL, noise, LABELS, sampling=Sampling.of(steps=1)).images
    torch.testing.assert_close(drawn, one_step, rtol=0, atol=1e-2)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_an_inverted_image_is_drawn_again_with_its_own_condition_and_not_with_another(strength):
    settings = Sampling.of(steps=50, clip=None)
    task, noise = Inverting(IMAGES, strength, LABELS), Noise.numbered(0, 5)
    again = draw(MODEL, noise, LABELS, task, sampling=settings).images
    assert (again - IMAGES).abs().max() < 0.02
    other = draw(MODEL, noise, LABELS.map(lambda label: (label + 1) % 4), task, sampling=settings).images
    assert (other - IMAGES).abs().max() > 0.05


def test_a_film_ends_with_the_picture_and_progress_with_the_total():
    seen = []
    drawn = draw(
        MODEL,
        Noise.numbered(0, 5),
        LABELS,
        batch_size=2,
        film=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert drawn.film.x_t.shape == drawn.film.x0.shape == (4, 5, 8, 8, 1)
    assert torch.equal(drawn.film.x_t[-1], to_uint8(drawn.images))
    assert (len(drawn.film.t), drawn.film.t[-1]) == (4, 0)
    assert seen == [(i, 18) for i in range(1, 19)]


@pytest.mark.parametrize("steps, frames", [(6, 4), (1, 1)])
def test_a_film_of_annealed_langevin_dynamics_ends_with_the_picture_too(steps, frames):
    settings = Sampling.of(kind="langevin", steps=steps, steps_per_level=2)
    drawn = draw(MODEL, Noise.numbered(0, 5), LABELS, sampling=settings, film=4)
    assert (len(drawn.film.t), drawn.film.t[-1]) == (frames, 0)
    assert torch.equal(drawn.film.x_t[-1], to_uint8(drawn.images))


def test_pictures_away_from_a_class_differ_from_those_away_from_none():
    away = draw(MODEL, Noise.numbered(0, 5), LABELS, negative=LABELS.map(lambda label: (label + 1) % 4)).images
    assert not torch.allclose(away, draw(MODEL, Noise.numbered(0, 5), LABELS).images, atol=1e-3)


def test_classes_go_by_name_before_index():
    assert class_indices(["square", "7", 3, "0", "a, b"], CLASSES) == [1, 2, 3, 0, 3]
    with pytest.raises(
        ValueError, match=r"no class 'squar'; the model has: circle, square, 7, a, b\. Did you mean 'square'"
    ):
        class_indices(["squar"], CLASSES)
    assert class_indices([" 1", "2 ", " 0", 1], ("1", "2", "3")) == [0, 1, 0, 1]
    assert class_indices([" a", "a", "b "], ("a", " a", "b")) == [1, 0, 2]
    with pytest.raises(ValueError, match="no class '4'"):
        class_indices([4], CLASSES)
    with pytest.raises(ValueError, match="no classes"):
        class_indices([0], ())


@pytest.mark.parametrize(
    "noise, options, message",
    [
        (Noise.numbered(0, 0), {}, "at least 1"),
        (
            Noise(torch.zeros(1).expand(MAX_VALUES), torch.zeros(1).expand(MAX_VALUES)),
            {},
            "too many for one call, at most",
        ),
        (Noise.numbered(0, 5), {"sampling": Sampling.of(steps=51)}, r"steps must be in 1\.\.50 for this model, got 51"),
        (Noise.numbered(0, 5), {"cond": LABELS[:2]}, "the condition has 2 rows for 5 pictures"),
        (Noise.numbered(0, 5), {"cond": LABELS.map(lambda label: label + 1)}, r"labels must be in 0\.\.3"),
        (Noise.numbered(0, 5), {"cond": Conditioning(pooled=torch.zeros(5, 3))}, "not trained on text"),
        (Noise.numbered(0, 5), {"task": Editing(IMAGES, 1.5)}, r"strength must be in \[0, 1\], got 1\.5"),
        (Noise.numbered(0, 5), {"task": Editing(IMAGES[..., :4])}, r"images must be \[5, 1, 8, 8\] for this model"),
        (Noise.numbered(0, 4), {"task": Editing(IMAGES)}, r"images must be \[4, 1, 8, 8\]"),
        (Noise.numbered(0, 5), {"task": Editing(IMAGES * 255)}, r"in \[-1, 1\]"),
        (Noise.numbered(0, 5), {"task": Inpainting(IMAGES, MASK[..., :4], ONE)}, "mask must be"),
        (
            Noise.numbered(0, 5),
            {"task": Inpainting(IMAGES, MASK | FOURTH, ONE)},
            "the mask of picture 3 hides no pixel",
        ),
        (
            Noise.numbered(0, 5),
            {"task": Inpainting(IMAGES, MASK & ~FOURTH, ONE)},
            "picture 3 hides every pixel: it must",
        ),
        (Noise.numbered(0, 5), {"task": Inpainting(IMAGES, MASK)}, "not trained for inpainting"),
        (Noise.numbered(0, 5), {"task": Inpainting(IMAGES, MASK, RePaint(steps=60))}, r"steps must be in 1\.\.50"),
        (Noise.numbered(0, 5), {"task": Inpainting(IMAGES, MASK, RePaint(steps=5))}, "jump_length=10 does not fit"),
        (
            Noise.numbered(0, 5),
            {"task": Inverting(IMAGES), "sampling": Sampling.of(kind="heun", steps=6)},
            "kind=ddim with eta=0",
        ),
        (
            Noise.numbered(0, 5),
            {"cond": LABELS, "negative": LABELS, "sampling": Sampling.of(steps=6)},
            "no effect at guidance scale 1",
        ),
        (Noise.numbered(0, 5), {"sampling": Sampling.of(guidance="auto", steps=6)}, "needs a weaker model"),
    ],
)
def test_requests_that_a_model_cannot_serve_are_refused_before_it_starts(noise, options, message):
    with pytest.raises(ValueError, match=message):
        draw(MODEL, noise, **options)
