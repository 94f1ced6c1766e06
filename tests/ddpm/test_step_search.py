"""Time steps that are chosen by the local errors of a model's own trajectories."""

import itertools
import math

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.samplers import SAMPLERS, DPMSolver, initial_noise, last
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import make_schedule
from ddpm.step_search import ORDERS, StepSearch, local_errors
from tests.ddpm.exact import GaussianConsistency, GaussianDenoiser, MixtureDenoiser

SCHEDULE = make_schedule("cosine")
SHAPE = (1, 4, 4)
DENOISER = GaussianDenoiser(SCHEDULE)
SEARCH = StepSearch()


@pytest.fixture(scope="module")
def found():
    return SEARCH.trajectories(DENOISER, SCHEDULE, initial_noise(0, torch.arange(64), SHAPE).double(), batch_size=24)


def error(denoiser, exact, kind, levels, seed=7):
    """Root mean square distance of samples to the ends of their trajectories, on noise that no search has seen."""
    x_T = initial_noise(seed, torch.arange(200), SHAPE).double()
    drawn = last(SAMPLERS[kind](steps=len(levels) - 1)(denoiser, SCHEDULE, x_T, timesteps=levels))  # type: ignore[call-arg]
    return (drawn - exact(x_T, torch.full((200,), levels[0], dtype=torch.float64)).x0).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ORDERS)
def test_a_local_error_is_that_of_the_samplers_own_step(found, kind):
    """From the trajectory's states, with the exact denoiser, whose prediction at a state is the trajectory's."""
    x_T = initial_noise(0, torch.arange(64), SHAPE).double()
    states = [x_T, *(s.x_t for s in DPMSolver(steps=60)(DENOISER, SCHEDULE, x_T, timesteps=list(found.levels)))]
    errors = local_errors(found, SCHEDULE, kind)
    for i, j in ((0, 5), (10, 11), (20, 45), (50, 60)):
        step = last(
            SAMPLERS[kind](steps=1)(DENOISER, SCHEDULE, states[i], timesteps=[found.levels[i], found.levels[j]])  # type: ignore[call-arg]
        )
        assert errors[i, i, j].item() == pytest.approx(
            (step - states[j]).square().mean().sqrt().item(), rel=1e-4, abs=1e-8
        )
    first, second = 20, 26  # a step from a state reaches the next one of the trajectory where they are neighbours
    two = list(
        DPMSolver(steps=2)(DENOISER, SCHEDULE, states[19], timesteps=[found.levels[n] for n in (19, first, second)])
    )
    if kind == "dpm_solver":
        expected = (two[-1].x_t - states[second]).square().mean().sqrt().item()
        assert errors[19, first, second].item() == pytest.approx(expected, rel=0.1)
        assert errors[19, first, second] < 0.5 * errors[first, first, second]
    else:
        assert errors[19, first, second] == errors[first, first, second]


def test_the_dynamic_programme_finds_what_trying_all_schedules_finds(found):
    small = StepSearch(grid=9)
    trajectories = small.trajectories(DENOISER, SCHEDULE, initial_noise(1, torch.arange(8), SHAPE).double())
    for kind in ORDERS:
        costs = local_errors(trajectories, SCHEDULE, kind)
        best = math.inf
        for middle in itertools.combinations(range(1, 9), 3):
            before, total = 0, 0.0
            for number, (i, j) in enumerate(itertools.pairwise([0, *middle, 9])):
                total += 1.15**number * costs[before, i, j].item()
                before = i
            best = min(best, total)
        levels, cost = small.find(trajectories, SCHEDULE, kind, 4)
        assert cost == pytest.approx(best, rel=1e-12)
        assert len(levels) == 5
        assert (levels[0], levels[-1]) == (trajectories.levels[0], 0)


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
@pytest.mark.parametrize("kind", ORDERS)
def test_chosen_steps_beat_uniform_ones_on_gaussian_data(found, kind, steps):
    levels, _ = SEARCH.find(found, SCHEDULE, kind, steps)
    exact = GaussianConsistency(SCHEDULE)
    chosen = error(DENOISER, exact, kind, levels)
    for spacing in ("trailing", "karras", "exponential"):
        assert chosen < error(DENOISER, exact, kind, SPACINGS[spacing](SCHEDULE, steps)), spacing


def test_they_beat_uniform_ones_where_trajectories_part_and_conditions_guide():
    """On a mixture in the plane, with guidance, against its own finest trajectories."""
    denoiser = MixtureDenoiser(
        SCHEDULE, torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], dtype=torch.float64), std=0.1
    )
    guided = Sampling.of(scale=2.0, clip=None).wrap(denoiser, SCHEDULE)
    labels = Conditioning(label=torch.arange(150) % 3)
    x_T = initial_noise(0, torch.arange(150), (1, 1, 2)).double()
    trajectories = SEARCH.trajectories(guided, SCHEDULE, x_T, labels)
    fresh = initial_noise(5, torch.arange(150), (1, 1, 2)).double()
    fine = SPACINGS["karras"](SCHEDULE, 400)
    ends = last(DPMSolver(steps=400)(guided, SCHEDULE, fresh, labels, timesteps=fine))
    for kind in ORDERS:
        levels, _ = SEARCH.find(trajectories, SCHEDULE, kind, 5)
        errors = []
        for grid in (levels, SPACINGS["trailing"](SCHEDULE, 5), SPACINGS["karras"](SCHEDULE, 5)):
            drawn = last(SAMPLERS[kind](steps=5)(guided, SCHEDULE, fresh, labels, timesteps=grid))  # type: ignore[call-arg]
            errors.append((drawn - ends).square().mean().sqrt().item())
        assert errors[0] < min(errors[1:]), (kind, errors)


def test_what_cannot_be_searched_is_refused(found):
    with pytest.raises(ValueError, match=r"the steps of 'heun' cannot be chosen; allowed: ddim, dpm_solver"):
        SEARCH.find(found, SCHEDULE, "heun", 4)
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.60"):
        SEARCH.find(found, SCHEDULE, "ddim", 61)
    with pytest.raises(ValueError, match="unknown spacing"):
        StepSearch(spacing="even")


def test_a_schedule_that_ends_in_pure_noise_can_be_searched():
    schedule = make_schedule("cosine", zero_terminal_snr=True)
    search = StepSearch(spacing="trailing", grid=50)
    x_T = initial_noise(0, torch.arange(32), SHAPE).double()
    levels, cost = search.find(
        search.trajectories(GaussianDenoiser(schedule), schedule, x_T), schedule, "dpm_solver", 5
    )
    assert levels[0] == 1000
    assert math.isfinite(cost)
