"""Drawings that are joined into one network batch, and cut out of it again."""

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling, to_uint8
from ddpm.inference import Drawing, Editing, FromNoise, Inpainting, Inverting, Noise, cut, join
from ddpm.samplers.repaint import RePaint
from tests.ddpm.test_inference import IMAGES, MASK, MODEL, PAINTER, a_model

SETTINGS = Sampling.of(steps=4, scale=2.0)
COUNTS = (1, 3, 2)


def labels(count: int, first: int = 0) -> Conditioning:
    return Conditioning(label=(torch.arange(count) + first) % 4)


def texts(count: int, length: int, padded: bool) -> Conditioning:
    generator = torch.Generator().manual_seed(length)
    text, pooled = (torch.randn(*form, 4, generator=generator) for form in ((count, length), (count,)))
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[0, -1] = not padded
    return Conditioning(text=text, text_mask=mask if padded else None, pooled=pooled)


def tasks(kind: str, count: int):
    images, mask = IMAGES[:count], MASK[:count]
    return {
        "noise": FromNoise(),
        "trained": Inpainting(images, mask),
        "repaint": Inpainting(images, mask, RePaint(steps=4, jump_length=1, resamplings=2)),
        "edit": Editing(images, 0.6),
        "invert": Inverting(images, 0.6, labels(count, 1)),
    }[kind]


@pytest.mark.parametrize("kind", ["noise", "trained", "repaint", "edit", "invert"])
def test_each_gets_its_own_pictures_and_film_out_of_a_joined_batch(kind):
    model = PAINTER if kind == "trained" else MODEL
    parts = [
        Drawing(Noise.numbered(seed, n), SETTINGS, labels(n, seed), tasks(kind, n), film=2)
        for seed, n in enumerate(COUNTS)
    ]
    found = cut(join(parts).draw(model), COUNTS)
    assert len({part.shared for part in parts}) == 1
    for part, drawn in zip(parts, found, strict=True):
        alone = part.draw(model)
        assert (to_uint8(drawn.images).int() - to_uint8(alone.images).int()).abs().max() <= 1
        assert drawn.film.t == alone.film.t
        assert drawn.film.x_t.shape == alone.film.x_t.shape
        assert (drawn.film.x0[-1].int() - alone.film.x0[-1].int()).abs().max() <= 1
    flat = torch.cat([drawn.images for drawn in found]).flatten(1)
    assert len(flat.unique(dim=0)) == sum(COUNTS)


def test_texts_of_different_lengths_are_joined():
    model = a_model(text_dim=4)
    parts = [
        Drawing(Noise.numbered(i, n), SETTINGS, texts(n, length, padded), negative=texts(n, 2, False))
        for i, (n, length, padded) in enumerate([(1, 2, False), (2, 5, True), (1, 3, False)])
    ]
    assert len({part.shared for part in parts}) == 1
    joined = join(parts)
    assert joined.cond.text.shape == (4, 5, 4)
    assert joined.cond.text_mask.sum(1).tolist() == [2, 4, 5, 3]
    for part, drawn in zip(parts, cut(joined.draw(model), [1, 2, 1]), strict=True):
        assert (to_uint8(drawn.images).int() - to_uint8(part.draw(model).images).int()).abs().max() <= 1


def test_drawings_that_cannot_be_joined_differ_in_what_they_share():
    noise, cond = Noise.numbered(0, 2), labels(2)
    alike = [
        Drawing(noise, SETTINGS, cond),
        Drawing(noise, Sampling.of(steps=5, scale=2.0), cond),
        Drawing(noise, SETTINGS, None),
        Drawing(noise, SETTINGS, cond, film=3),
        Drawing(noise, SETTINGS, cond, negative=cond),
        Drawing(Noise.between(0, 1, 2), SETTINGS, cond),
        Drawing(noise, SETTINGS, cond, tasks("edit", 2)),
        Drawing(noise, SETTINGS, cond, Editing(IMAGES[:2], 0.5)),
        Drawing(noise, SETTINGS, cond, tasks("invert", 2)),
        Drawing(noise, SETTINGS, cond, Inverting(IMAGES[:2], 0.6)),
        Drawing(noise, SETTINGS, cond, tasks("trained", 2)),
        Drawing(noise, SETTINGS, cond, tasks("repaint", 2)),
        Drawing(noise, SETTINGS, cond, Inpainting(IMAGES[:2], MASK[:2], RePaint(steps=5))),
    ]
    assert len({drawing.shared for drawing in alike}) == len(alike)
    assert Drawing(Noise.numbered(9, 5), Sampling.of(steps=4, scale=2), labels(5, 3)).shared == alike[0].shared
