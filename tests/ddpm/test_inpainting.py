import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm.conditioning import Conditioning
from ddpm.masks import inpainting_condition, masked_error, paste, random_mask, seam_error
from ddpm.models.unet import UNet, UNetConfig
from ddpm.prediction import Prediction, eps_from_x0
from ddpm.samplers import DDIM, Ancestral, DPMSolver, Heun, initial_noise, last, step_noise
from ddpm.samplers.repaint import RePaint, Replacement, repaint_levels
from ddpm.samplers.sdedit import noised_start
from ddpm.schedule import NoiseSchedule, make_schedule

SCHEDULE = make_schedule("cosine")
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.2, 0.1, 0.0, -0.1], dtype=torch.float64)
PLACE = torch.arange(4, dtype=torch.float64)
COVARIANCE = 0.09 * 0.9 ** (PLACE[:, None] - PLACE[None]).abs()
"""Four pixels in a row, each correlated by 0.9 with the next; the outer two are known, far from their mean."""
KNOWN = torch.tensor([0.8, math.nan, math.nan, 0.5], dtype=torch.float64).reshape(1, *SHAPE)
MASK = torch.tensor([True, False, False, True]).reshape(1, *SHAPE)


@dataclass(frozen=True)
class CorrelatedDenoiser:
    """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE) over an image's pixels; keeps what it was asked."""

    schedule: NoiseSchedule
    asked: list[tuple[float, Tensor]]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning | None = None) -> Prediction:
        self.asked.append((t[0].item(), x_t))
        alpha, sigma = self.schedule.alpha(t[0]), self.schedule.sigma(t[0])
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4))
        x_0 = (MEAN + (x_t.double().flatten(1) - alpha * MEAN) @ gain.T).reshape(x_t.shape).to(x_t)
        return Prediction(x_0, eps_from_x0(x_0, x_t, t, self.schedule))


def true_conditional():
    """Mean [2] and covariance [2, 2] of the hidden pixels given the known ones: the textbook's."""
    known, hidden = torch.tensor([0, 3]), torch.tensor([1, 2])
    gain = COVARIANCE[hidden][:, known] @ torch.linalg.inv(COVARIANCE[known][:, known])
    mean = MEAN[hidden] + gain @ (KNOWN.flatten()[known] - MEAN[known])
    return mean, COVARIANCE[hidden][:, hidden] - gain @ COVARIANCE[known][:, hidden]


def law(steps, jump_length=1, resamplings=1):
    """The exact mean [4] and covariance [4, 4] of `repaint`'s samples, and what the denoiser was asked on the way.

    With this denoiser a sample is affine in the noise. So one batch tells all: its first image has no noise at all,
    each other one has a single unit of it, in one pixel of one draw.
    """
    levels = repaint_levels(SCHEDULE.timesteps(steps), jump_length=jump_length, resamplings=resamplings)
    rows = 1 + 4 * len(levels)

    def unit(draw):
        out = torch.zeros(rows, 4, dtype=torch.float64)
        out[1 + 4 * draw : 5 + 4 * draw] = torch.eye(4)
        return out.reshape(rows, *SHAPE)

    denoiser = CorrelatedDenoiser(SCHEDULE, [])
    samples = RePaint(steps=steps, jump_length=jump_length, resamplings=resamplings)(
        denoiser,
        SCHEDULE,
        unit(0),
        known=KNOWN.expand(rows, *SHAPE),
        mask=MASK.expand(rows, *SHAPE),
        noise=lambda key: unit(1 + key),
    )
    return *moments(last(samples)), denoiser.asked


def moments(impulses):
    impulses = impulses.flatten(1)
    responses = impulses[1:] - impulses[0]
    return impulses[0], responses.T @ responses


def mean_error(steps, jump_length, resamplings):
    """How far the mean of the hidden pixels is from the true conditional's: the sample without noise is the mean."""
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
    repaint = RePaint(steps=steps, jump_length=jump_length, resamplings=resamplings)
    denoiser = CorrelatedDenoiser(SCHEDULE, [])
    out = last(repaint(denoiser, SCHEDULE, zero, known=KNOWN, mask=MASK, noise=lambda key: zero))
    return (out.flatten()[1:3] - true_conditional()[0]).abs().max().item()


# ------------------------------------------------------------------------------------------- masks


@given(
    height=st.integers(4, 64),
    width=st.integers(4, 64),
    kind=st.sampled_from(["any", "box", "stroke", "half"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_mask_has_known_and_hidden_pixels(height, width, kind, seed):
    mask = random_mask(seed, torch.arange(64), (height, width), kind)
    assert mask.shape == (64, 1, height, width)
    assert mask.dtype == torch.bool
    assert mask.any(dim=(1, 2, 3)).all()
    assert not mask.all(dim=(1, 2, 3)).any()


def test_a_stroke_over_everything_gives_way_to_a_half():
    """Of 40 million strokes on 4 x 4 pixels these two would hide all of them."""
    ordinals = torch.tensor([35_772_095, 40_193_838])
    mask = random_mask(0, ordinals, (4, 4), "stroke")
    assert torch.equal(mask, random_mask(0, ordinals, (4, 4), "half"))
    assert mask.sum((1, 2, 3)).tolist() == [8, 8]


def test_a_mask_is_a_function_of_seed_and_ordinal():
    whole = random_mask(3, torch.arange(100), (16, 12))
    part = torch.tensor([77, 5, 2**40])
    assert torch.equal(random_mask(3, part, (16, 12))[:2], whole[part[:2]])
    assert not torch.equal(random_mask(4, torch.arange(100), (16, 12)), whole)
    assert len(torch.unique(whole.flatten(1), dim=0)) > 60


def test_any_is_a_third_of_each_kind():
    n = torch.arange(3000)
    mixed = random_mask(0, n, (16, 16))
    for kind in ("box", "stroke", "half"):
        same = (random_mask(0, n, (16, 16), kind) == mixed).all(dim=(1, 2, 3)).double().mean().item()
        assert same == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 3000)), kind


def test_boxes_are_rectangles_of_a_quarter_to_three_quarters():
    hidden = ~random_mask(0, torch.arange(2000), (16, 24), "box")[:, 0]
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), rows * columns)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 12, 6, 18)
    starts = hidden.any(2).double().argmax(1)
    assert (starts.min(), starts.max()) == (0, 12)
    assert hidden.double().mean().item() == pytest.approx(1 / 4, abs=0.01)  # the mean side is half the image's


def test_halves_are_the_four_halves():
    hidden = ~random_mask(0, torch.arange(2000), (8, 6), "half")[:, 0]
    kinds, counts = torch.unique(hidden.flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 4
    assert (kinds.sum(1) == 24).all()
    assert (counts - 500).abs().max() < 80
    assert torch.equal(kinds.sum(0), torch.full((48,), 2))  # a pixel is in one of two halves, twice


def test_strokes_hide_a_fair_share_in_one_piece():
    hidden = ~random_mask(0, torch.arange(500), (32, 32), "stroke")
    share = hidden.double().mean((1, 2, 3))
    assert 0.15 < share.mean() < 0.35
    assert share.max() < 0.75
    grown = torch.zeros_like(hidden, dtype=torch.float32)
    grown.flatten(1)[torch.arange(500), hidden.flatten(1).double().argmax(1)] = 1
    for _ in range(200):  # flood from the first hidden pixel, through corners too
        grown = torch.nn.functional.max_pool2d(grown, 3, stride=1, padding=1) * hidden
    assert torch.equal(grown.bool(), hidden)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (((3, 8),), "4..16384"),
        (((8, 8), "circle"), "any, box, stroke, half"),
        (((8, 8, 8),), r"\(H, W\)"),
    ],
)
def test_random_mask_refuses_what_it_cannot_draw(arguments, says):
    with pytest.raises(ValueError, match=says):
        random_mask(0, torch.arange(2), *arguments)
    with pytest.raises(ValueError, match="flatten"):
        random_mask(0, torch.zeros(2, 2, dtype=torch.long), (8, 8))


# ------------------------------------------------------------------------------------------ levels


@given(data=st.data(), steps=st.integers(1, 120), resamplings=st.integers(1, 6))
def test_repaint_levels_jump_by_their_length_and_count_as_promised(data, steps, resamplings):
    jump_length = data.draw(st.integers(1, max(1, steps - 1)))
    resamplings = resamplings if steps > 1 else 1
    grid = SCHEDULE.timesteps(steps)
    levels = repaint_levels(grid, jump_length=jump_length, resamplings=resamplings)
    places = [grid.index(level) for level in levels]
    moves = [b - a for a, b in itertools.pairwise(places)]
    assert (levels[0], levels[-1]) == (SCHEDULE.num_steps, 0)
    assert set(moves) <= {1, -jump_length}
    assert levels.count(0) == 1
    jumps = (resamplings - 1) * ((steps - 1) // jump_length)
    assert moves.count(-jump_length) == jumps
    assert moves.count(1) == steps + jumps * jump_length


def test_repaint_levels_with_jumps_of_one_are_algorithm_1():
    levels = [4]
    for t in range(4, 0, -1):
        for u in range(3):
            levels.append(t - 1)
            if u < 2 and t > 1:
                levels.append(t)
            else:
                break
    assert repaint_levels([4, 3, 2, 1, 0], jump_length=1, resamplings=3) == levels


@pytest.mark.parametrize("steps, jump_length, resamplings", [(250, 10, 10), (100, 7, 3), (40, 1, 4)])
def test_repaint_levels_are_those_of_the_authors_code(steps, jump_length, resamplings):
    """diffusers has the list; there a jump is many rises of one, and index i is level i + 1."""
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps, jump_length=jump_length, jump_n_sample=resamplings)
    theirs = [index + 1 for index in scheduler.timesteps.tolist()] + [0]
    ours = [steps]
    for t, s in itertools.pairwise(
        repaint_levels(range(steps, -1, -1), jump_length=jump_length, resamplings=resamplings)
    ):
        ours += [s] if s < t else range(t + 1, s + 1)
    assert ours == theirs


@pytest.mark.parametrize(
    "grid, options, says",
    [
        ([3, 2, 1, 0], {"jump_length": 0, "resamplings": 2}, "jump_length=0"),
        ([3, 2, 1, 0], {"jump_length": 1, "resamplings": 0}, "resamplings=0"),
        ([3, 2, 1, 0], {"jump_length": 3, "resamplings": 2}, "jump_length <= 2"),
        ([3, 2, 1], {"jump_length": 1, "resamplings": 2}, "end at 0"),
        ([3, 3, 0], {"jump_length": 1, "resamplings": 1}, "fall strictly"),
        ([0], {"jump_length": 1, "resamplings": 1}, "fall"),
    ],
)
def test_repaint_levels_refuses_impossible_jumps(grid, options, says):
    with pytest.raises(ValueError, match=says):
        repaint_levels(grid, **options)


# ---------------------------------------------------------------------- replacement and RePaint


def test_repaint_approaches_the_conditional_that_replacement_misses():
    """Exact means and variances, no sampling error: see `law`."""
    mean, covariance = true_conditional()
    plain_mean, plain_covariance, _ = law(steps=100)
    mended_mean, mended_covariance, _ = law(steps=100, jump_length=5, resamplings=10)
    plain = (plain_mean[1:3] - mean).abs().max().item()
    mended = (mended_mean[1:3] - mean).abs().max().item()
    shift = (mean - MEAN[1:3]).abs().max().item()
    assert plain > 0.25 * shift  # replacement believes a quarter too little of what is known
    assert mended < 0.05 * shift
    plain = (plain_covariance[1:3, 1:3] / covariance - 1).abs().max().item()
    mended = (mended_covariance[1:3, 1:3] / covariance - 1).abs().max().item()
    assert plain > 1
    assert mended < 0.2


@pytest.mark.heavy
def test_more_resamplings_and_finer_steps_improve_the_fill_and_more_steps_alone_do_not():
    by_resamplings = [mean_error(50, 1, u) for u in (1, 2, 5, 20)]
    assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(by_resamplings))
    assert mean_error(100, 2, 20) < 0.6 * by_resamplings[-1]
    assert mean_error(1000, 1, 1) > 0.85 * by_resamplings[0]
    assert mean_error(50, 10, 10) > 4 * by_resamplings[-1]  # long jumps in few steps do little


def test_known_pixels_have_the_forward_process_at_every_level_jumps_included():
    """Exactly q(x_t | known), whose mean and variance are alpha_t known and sigma_t^2, whatever led to x_t."""
    _, _, asked = law(steps=20, jump_length=4, resamplings=3)
    known = MASK.flatten()
    assert len(asked) == 20 + 2 * 4 * 4
    for t, impulses in asked[1:]:
        mean, covariance = moments(impulses)
        expected = SCHEDULE.alpha(t) * KNOWN.flatten()[known]
        torch.testing.assert_close(mean[known], expected, rtol=1e-12, atol=1e-12)
        expected = SCHEDULE.sigma(t) ** 2 * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(covariance[known][:, known], expected, rtol=1e-12, atol=1e-12)


def test_a_jump_is_the_product_of_the_betas_between_its_levels():
    """beta[s + 1..t], not beta[t..] as in diffusers' `undo_step`; with noise in the jumps alone."""
    denoiser, jump = CorrelatedDenoiser(SCHEDULE, []), 4
    grid = SCHEDULE.timesteps(40)
    levels = repaint_levels(grid, jump_length=jump, resamplings=2)
    rises = [i for i, (t, s) in enumerate(itertools.pairwise(levels)) if s > t]
    ones, zeros = torch.ones(1, *SHAPE, dtype=torch.float64), torch.zeros(1, *SHAPE, dtype=torch.float64)
    samples = list(
        RePaint(steps=40, jump_length=jump, resamplings=2)(
            denoiser, SCHEDULE, zeros, known=KNOWN, mask=MASK, noise=lambda key: ones if key in rises else zeros
        )
    )
    assert len(rises) == 9
    for number, i in enumerate(rises):
        down = i - number  # steps down before this jump, and the number of the evaluation after it
        s, t = levels[i], levels[i + 1]
        assert (samples[down - 1].t, denoiser.asked[down][0]) == (s, t)
        keep = torch.prod(1 - SCHEDULE.betas[s:t])
        expected = keep.sqrt() * samples[down - 1].x_t + (1 - keep).sqrt()
        torch.testing.assert_close(denoiser.asked[down][1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pixels_come_back_bit_for_bit(dtype):
    images = torch.arange(5)
    known = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = random_mask(0, images, (4, 4))[:, :, 1:3, 1:3]
    x_T, noise = initial_noise(0, images, SHAPE).to(dtype), step_noise(0, images, SHAPE)
    denoiser = CorrelatedDenoiser(SCHEDULE, [])
    for samples in (
        Replacement(steps=10)(denoiser, SCHEDULE, x_T, known=known, mask=mask.float(), noise=noise),
        RePaint(steps=10, jump_length=2, resamplings=3)(denoiser, SCHEDULE, x_T, known=known, mask=mask, noise=noise),
    ):
        out = last(samples)
        assert out.dtype == dtype
        assert torch.equal(out[mask], known[mask])
        assert not (out == known)[~mask].any()


def test_no_two_transitions_share_a_key():
    keys = []

    def noise(key):
        keys.append(key)
        return torch.zeros(1, *SHAPE)

    last(
        RePaint(steps=30, jump_length=3, resamplings=4)(
            CorrelatedDenoiser(SCHEDULE, []), SCHEDULE, torch.zeros(1, *SHAPE), known=KNOWN, mask=MASK, noise=noise
        )
    )
    assert keys == list(range(len(keys)))
    assert len(keys) == 30 + 3 * 9 * (3 + 1) - 1  # the last step draws nothing


def test_without_jumps_and_known_pixels_it_is_ancestral_sampling():
    images = torch.arange(3)
    x_T, denoiser = initial_noise(0, images, SHAPE).double(), CorrelatedDenoiser(SCHEDULE, [])
    nothing = torch.zeros(3, *SHAPE, dtype=torch.bool)
    grid = SCHEDULE.timesteps(20)
    noise = step_noise(0, images, SHAPE)
    ours = Replacement()(
        denoiser, SCHEDULE, x_T, known=KNOWN.expand(3, *SHAPE), mask=nothing, timesteps=grid, noise=noise
    )
    theirs = Ancestral(steps=20)(denoiser, SCHEDULE, x_T, noise=lambda s: noise(grid.index(s) - 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one.t == other.t
        torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=0)


def test_a_sample_does_not_depend_on_its_batch():
    def run(images):
        return last(
            RePaint(steps=12, jump_length=3, resamplings=2)(
                CorrelatedDenoiser(SCHEDULE, []),
                SCHEDULE,
                initial_noise(5, images, SHAPE).double(),
                known=KNOWN.expand(len(images), *SHAPE),
                mask=MASK.expand(len(images), *SHAPE),
                noise=step_noise(5, images, SHAPE),
            )
        )

    torch.testing.assert_close(run(torch.arange(8))[5:6], run(torch.tensor([5])), rtol=1e-10, atol=1e-10)


def test_samples_through_step_noise_have_the_law_of_the_impulses():
    images = torch.arange(4000)
    mean, covariance, _ = law(steps=20, jump_length=2, resamplings=3)
    out = last(
        RePaint(steps=20, jump_length=2, resamplings=3)(
            CorrelatedDenoiser(SCHEDULE, []),
            SCHEDULE,
            initial_noise(0, images, SHAPE).double(),
            known=KNOWN.expand(4000, *SHAPE),
            mask=MASK.expand(4000, *SHAPE),
            noise=step_noise(0, images, SHAPE),
        )
    ).flatten(1)
    error = (covariance.diagonal() / 4000).sqrt()
    assert ((out.mean(0) - mean).abs() <= 4 * error + 1e-12).all()
    torch.testing.assert_close(out.T.cov()[1:3, 1:3], covariance[1:3, 1:3], rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"mask": MASK[:, 0]}, r"mask must be \[B, 1, H, W\] = \[1, 1, 2, 2\]"),
        ({"mask": MASK.expand(2, *SHAPE)}, r"got \[2, 1, 2, 2\]"),
        ({"mask": MASK * 0.5}, "mask > 0.5"),
        ({"known": KNOWN[..., :1]}, "one shape"),
        ({"known": KNOWN.long()}, "floating point"),
        ({"timesteps": [1000, 500, 10]}, "end at 0"),
        ({"steps": 1001}, "1..1000"),
        ({"jump_length": 10}, "jump_length <= 9"),
    ],
)
def test_repaint_refuses_what_does_not_fit(change, says):
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
    settings = {"steps": 10, "jump_length": 2, "resamplings": 2}
    arguments = {"x_T": zero, "known": KNOWN, "mask": MASK} | {k: v for k, v in change.items() if k not in settings}
    repaint = RePaint(**settings | {k: v for k, v in change.items() if k in settings})
    with pytest.raises(ValueError, match=says):
        last(repaint(CorrelatedDenoiser(SCHEDULE, []), SCHEDULE, noise=lambda key: zero, **arguments))


# ----------------------------------------------------------------------------- the fine-tuned model


def test_the_condition_shows_known_pixels_and_nothing_else():
    label = torch.tensor([3])
    cond = inpainting_condition(KNOWN, MASK.float(), Conditioning(label=label))
    assert torch.equal(cond.mask, MASK)
    assert torch.equal(cond.context.flatten(), torch.tensor([0.8, 0, 0, 0.5], dtype=torch.float64))
    assert cond.label is label
    assert inpainting_condition(KNOWN, MASK).label is None
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        inpainting_condition(KNOWN, MASK[0])


def test_paste_keeps_the_known_pixels_bit_for_bit():
    sample = torch.full_like(KNOWN, 7)
    expected = torch.tensor([0.8, 7, 7, 0.5], dtype=torch.float64).reshape(1, *SHAPE)
    assert torch.equal(paste(KNOWN, sample, MASK), expected)
    with pytest.raises(ValueError, match="one shape"):
        paste(KNOWN, sample[..., :1], MASK)


def small_unet(**options):
    torch.manual_seed(0)
    return UNet(
        UNetConfig(channels=(16, 16), attention=(False, True), layers_per_block=1, head_dim=8, norm_groups=8, **options)
    ).eval()


@pytest.mark.parametrize("out_channels", [3, 6])
def test_the_extended_network_starts_out_as_the_trained_one(out_channels):
    trained = small_unet(out_channels=out_channels, num_classes=4)
    extended = small_unet(out_channels=out_channels, num_classes=4, context_channels=3)
    weights = extended.config.extend_for_inpainting(trained.state_dict())
    extended.load_state_dict(weights)
    x_t, known = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 3.0, 500.0, 999.0])
    label = Conditioning(label=torch.arange(4))
    with torch.no_grad():
        expected = trained(x_t, t, label)
        for mask in (random_mask(0, torch.arange(4), (8, 8)), torch.ones(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)):
            out = extended(x_t, t, inpainting_condition(100 * known, mask, label))
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(extended(x_t, t, label), expected, rtol=1e-6, atol=1e-6)
    assert weights["conv_out.weight"].data_ptr() == trained.state_dict()["conv_out.weight"].data_ptr()
    assert trained.conv_in.weight.shape[1] == 3  # as it was


def test_the_new_channels_learn():
    """Zero weights with a non-zero gradient, or the fine-tuning would never see the mask."""
    unet = small_unet(context_channels=3)
    unet.load_state_dict(unet.config.extend_for_inpainting(small_unet().state_dict()))
    x_t, known = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    unet(x_t, torch.zeros(2), inpainting_condition(known, random_mask(0, torch.arange(2), (8, 8)))).sum().backward()
    assert (unet.conv_in.weight.grad[:, 3:].abs().amax(dim=(0, 2, 3)) > 0).all()


def test_weights_are_extended_once():
    weights, config = small_unet().state_dict(), small_unet(context_channels=3).config
    with pytest.raises(ValueError, match="extended already"):
        config.extend_for_inpainting(config.extend_for_inpainting(weights))
    with pytest.raises(ValueError, match=r"conv_in\.weight missing"):
        config.extend_for_inpainting({k: v for k, v in weights.items() if k != "conv_in.weight"})
    with pytest.raises(ValueError, match="context_channels"):
        small_unet().config.extend_for_inpainting(weights)


# -------------------------------------------------------------------------------------------- SDEdit


def edit(image, strength, steps=20):
    images = torch.arange(len(image))
    x_t0, timesteps = noised_start(SCHEDULE, image, strength, initial_noise(0, images, SHAPE).double(), steps=steps)
    return last(DDIM()(CorrelatedDenoiser(SCHEDULE, []), SCHEDULE, x_t0, timesteps=timesteps))


def test_sdedit_goes_from_the_image_itself_to_a_sample_without_it():
    image = torch.tensor([3.0, -3.0, 3.0, -3.0], dtype=torch.float64).reshape(1, *SHAPE)
    other = -image
    assert (edit(image, 1e-6) - image).abs().max() < 0.02
    fidelity = [(edit(image, strength) - image).abs().mean().item() for strength in (0.01, 0.1, 0.5, 1)]
    assert fidelity == sorted(fidelity)
    torch.testing.assert_close(edit(image, 1.0), edit(other, 1.0), rtol=0, atol=1e-3)


def test_sdedit_at_full_strength_starts_from_noise_and_takes_every_samplers_levels():
    images = torch.arange(4000)
    z = initial_noise(0, images, SHAPE).double()
    x_T, timesteps = noised_start(SCHEDULE, torch.ones_like(z), 1.0, z, steps=50)
    assert timesteps == SCHEDULE.timesteps(50)
    assert x_T.mean().item() == pytest.approx(0, abs=0.03)
    assert x_T.std().item() == pytest.approx(1, abs=0.03)


@given(strength=st.floats(1e-4, 1), steps=st.integers(1, 300))
def test_sdedit_levels_fall_from_its_strength_to_0(strength, steps):
    image = torch.zeros(1, *SHAPE, dtype=torch.float64)
    x_t0, levels = noised_start(SCHEDULE, image, strength, torch.ones_like(image), steps=steps)
    assert len(levels) == steps + 1
    assert levels[-1] == 0
    assert abs(levels[0] - strength * 1000) <= 0.5
    assert all(s < t for t, s in itertools.pairwise(levels))
    if strength * 1000 >= steps:
        assert levels == [round(level) for level in levels]
    torch.testing.assert_close(x_t0, SCHEDULE.sigma(levels[0]).expand_as(x_t0))


def test_every_sampler_takes_the_start():
    images, denoiser = torch.arange(2), CorrelatedDenoiser(SCHEDULE, [])
    image = torch.zeros(2, *SHAPE, dtype=torch.float64)
    x, grid = noised_start(SCHEDULE, image, 0.4, initial_noise(0, images, SHAPE).double(), steps=10)
    noise = step_noise(0, images, SHAPE)
    for samples in (
        DDIM()(denoiser, SCHEDULE, x, timesteps=grid),
        Ancestral()(denoiser, SCHEDULE, x, timesteps=grid, noise=noise),
        DPMSolver()(denoiser, SCHEDULE, x, timesteps=grid),
        Heun()(denoiser, SCHEDULE, x, timesteps=grid),
    ):
        out = list(samples)
        assert [sample.t for sample in out] == grid[1:]
        assert out[-1].x_t.abs().max() < 2


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 1.1}, {"strength": 0.5, "steps": 0}])
def test_sdedit_refuses_impossible_strengths(options):
    image = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match=r"strength in \(0, 1\]"):
        noised_start(SCHEDULE, image, noise=image, **options)
    with pytest.raises(ValueError, match="one shape"):
        noised_start(SCHEDULE, image, 0.5, image[..., :1])


# ------------------------------------------------------------------------------------------- metrics


def test_masked_error_sees_hidden_pixels_only():
    truth = torch.zeros(2, 3, 4, 4)
    sample = truth.clone()
    mask = torch.ones(2, 1, 4, 4)
    mask[0, :, :2] = 0
    mask[1, :, 0, 0] = 0
    sample[:, :, 2:] = 100  # known: of no concern
    sample[0, 1, :2] = 3
    sample[1, :, 0, 0] = -2
    torch.testing.assert_close(masked_error(sample, truth, mask), torch.tensor([math.sqrt(3), 2.0]))
    with pytest.raises(ValueError, match="no hidden pixel in image 1"):
        masked_error(sample, truth, torch.cat([mask[:1], torch.ones(1, 1, 4, 4)]))
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        masked_error(sample, truth, mask[:, 0])


def test_seam_error_is_the_difference_of_steps_across_the_edge():
    truth = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    mask[1, :, 2:4, 2:4] = False
    assert torch.equal(seam_error(truth, truth, mask), torch.zeros(2))
    lifted = truth + 0.25 * ~mask
    torch.testing.assert_close(seam_error(lifted, truth, mask), torch.full((2,), 0.25))
    inner = truth.clone()
    inner[0, :, :, 4:] += 1  # behind the edge: no seam
    inner[1, :, 2, 2] += 0.5  # two of the eight pairs
    torch.testing.assert_close(seam_error(inner, truth, mask), torch.tensor([0.0, 0.125]))
    with pytest.raises(ValueError, match="no edge of the mask in image 0"):
        seam_error(truth, truth, torch.ones_like(mask))
