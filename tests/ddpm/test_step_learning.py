"""The generalized solver, and levels and weights that are learned for a model from the ends of its own trajectories."""

import json

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.generate import Sampling
from ddpm.samplers import DDIM, DPMSolver, GeneralizedSolver, Heun, UniPC, initial_noise, last
from ddpm.samplers.generalized import weights_of
from ddpm.samplers.spacing import SPACINGS
from ddpm.schedule import make_schedule
from ddpm.step_learning import StepLearning
from tests.ddpm.exact import GaussianConsistency, GaussianDenoiser, MixtureDenoiser

SCHEDULE = make_schedule("cosine")
ZERO_SNR = make_schedule("cosine", zero_terminal_snr=True)
SHAPE = (1, 4, 4)
SOLVERS = (DDIM, DPMSolver, UniPC)
X_T = initial_noise(0, torch.arange(64), SHAPE).double()
FRESH = initial_noise(7, torch.arange(200), SHAPE).double()


def generalized(solver, levels, schedule=SCHEDULE):
    weights = weights_of(solver(steps=len(levels) - 1), schedule, levels)
    return GeneralizedSolver(steps=len(levels) - 1, timesteps=tuple(levels), weights=weights)


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["snr", "zero terminal snr"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_with_the_weights_of_a_solver_it_is_that_solver(solver, steps, schedule):
    denoiser, levels = GaussianDenoiser(schedule), SPACINGS["trailing"](schedule, steps)
    own = list(solver(steps=steps)(denoiser, schedule, X_T, timesteps=levels))
    same = list(generalized(solver, levels, schedule)(denoiser, schedule, X_T))
    assert [s.t for s in same] == [s.t for s in own]
    for ours, theirs in zip(same, own, strict=True):
        torch.testing.assert_close(ours.x_t, theirs.x_t, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=0, atol=1e-12)


def test_without_weights_it_is_ddim():
    denoiser = GaussianDenoiser(SCHEDULE)
    ours = last(GeneralizedSolver(steps=7)(denoiser, SCHEDULE, X_T))
    torch.testing.assert_close(ours, last(DDIM(steps=7)(denoiser, SCHEDULE, X_T)), rtol=0, atol=1e-12)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weights belong to timesteps"):
        GeneralizedSolver(steps=1, weights=(0.0, 1.0))
    with pytest.raises(ValueError, match="weights must be 5 numbers for 2 steps, got 4"):
        GeneralizedSolver(steps=2, timesteps=(9.0, 4.0, 0.0), weights=(0.0, 1.0, 0.0, 1.0))
    learned = GeneralizedSolver(steps=1, timesteps=(1000.0, 0.0), weights=(0.0, 1.0))
    with pytest.raises(ValueError, match="it cannot begin or end elsewhere: use another sampler"):
        list(learned(GaussianDenoiser(SCHEDULE), SCHEDULE, X_T, timesteps=[500.0, 0.0]))
    with pytest.raises(ValueError, match="Heun has more than one evaluation a step"):
        weights_of(Heun(steps=4), SCHEDULE, SPACINGS["trailing"](SCHEDULE, 4))


def test_weights_go_where_kind_or_number_of_steps_change_and_are_stored_where_they_are_set():
    settings = Sampling(generalized(DPMSolver, SPACINGS["karras"](SCHEDULE, 3)))
    assert Sampling.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.with_fields(scale=2.0).sampler == settings.sampler
    assert settings.with_fields(steps=4).sampler == GeneralizedSolver(steps=4)
    assert settings.with_fields(kind="ddim").sampler == DDIM(steps=3)
    assert settings.key()["weights"] == list(settings.sampler.weights)  # type: ignore[attr-defined]
    assert "weights" not in Sampling(GeneralizedSolver(steps=4)).key()


@pytest.mark.parametrize("solver", SOLVERS)
def test_on_gaussian_data_the_learned_solver_is_exact(solver):
    """There every trajectory is a multiple of its noise, so that weights which end where it does exist."""
    exact = GaussianConsistency(SCHEDULE)
    top, levels = torch.tensor(1000.0), SPACINGS["trailing"](SCHEDULE, 3)
    ends, fresh = (exact(x, top.expand(len(x))).x0 for x in (X_T, FRESH))
    known = generalized(solver, levels)
    learned = StepLearning().learn(GaussianDenoiser(SCHEDULE), levels, known.weights, X_T, ends)
    before = rms(last(known(GaussianDenoiser(SCHEDULE), SCHEDULE, FRESH)) - fresh)
    after = rms(last(learned(GaussianDenoiser(SCHEDULE), SCHEDULE, FRESH)) - fresh)
    assert after < 1e-4 < before
    assert learned.timesteps[0] == 1000
    assert all(s < t for t, s in zip(learned.timesteps, learned.timesteps[1:], strict=False))


@pytest.mark.heavy
def test_where_trajectories_part_and_conditions_guide_it_ends_nearer_than_any_known_solver():
    """On a mixture in the plane with guidance, from noise that nothing was learned from."""
    means = torch.tensor([[-0.6, 0.2], [0.5, 0.5], [0.3, -0.7]], dtype=torch.float64)
    guided = Sampling.of(scale=2.0, clip=None).wrap(MixtureDenoiser(SCHEDULE, means, std=0.1), SCHEDULE)
    noise, fresh = (initial_noise(seed, torch.arange(240), (1, 1, 2)).double() for seed in (0, 5))
    cond = Conditioning(label=torch.arange(240) % 3)
    fine = DPMSolver(steps=200, spacing="karras")
    ends, fresh_ends = (last(fine(guided, SCHEDULE, x, cond)) for x in (noise, fresh))
    levels = SPACINGS["karras"](SCHEDULE, 4)
    learned = StepLearning(updates=150).learn(
        guided, levels, weights_of(DPMSolver(steps=4), SCHEDULE, levels), noise, ends, cond
    )
    known = [
        rms(last(solver(steps=4, spacing=spacing)(guided, SCHEDULE, fresh, cond)) - fresh_ends)
        for solver in SOLVERS
        for spacing in SPACINGS
    ]
    assert rms(last(learned(guided, SCHEDULE, fresh, cond)) - fresh_ends) < 0.7 * min(known)


def test_a_solver_that_learning_makes_worse_is_kept_as_it_was():
    levels = SPACINGS["trailing"](SCHEDULE, 3)
    known, denoiser = generalized(DPMSolver, levels), GaussianDenoiser(SCHEDULE)
    ends = last(known(denoiser, SCHEDULE, X_T))
    ends[:48] = 1.0  # what it learns from leads away from the quarter that is held out
    said = []
    kept = StepLearning(updates=4, check_every=2).learn(
        denoiser, levels, known.weights, X_T, ends, on_check=lambda update, distance: said.append((update, distance))
    )
    assert kept.weights == pytest.approx(known.weights, abs=1e-6)
    assert kept.timesteps == pytest.approx(known.timesteps, abs=1e-3)
    assert [update for update, _ in said] == [0, 2, 4]
    assert said[0][1] < 1e-10 < said[1][1]


def test_the_same_call_learns_the_same_and_leaves_the_network_alone():
    levels = SPACINGS["trailing"](SCHEDULE, 2)
    weights = weights_of(DDIM(steps=2), SCHEDULE, levels)
    network = torch.nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)

    def denoiser(x_t, t, cond=None):
        x_0 = network(x_t)
        return GaussianDenoiser(SCHEDULE)(x_0, t, cond)

    learn = lambda: StepLearning(updates=3).learn(denoiser, levels, weights, X_T, X_T.tanh())  # noqa: E731
    assert learn() == learn()
    assert network.weight.grad is None
    one = StepLearning(updates=2).learn(denoiser, [1000.0, 0.0], [0.0, 1.0], X_T, X_T.tanh())
    assert (one.steps, one.timesteps) == (1, (1000, 0))
    with pytest.raises(ValueError, match="2 trajectories or more, got 1"):
        StepLearning().learn(denoiser, levels, weights, X_T[:1], X_T[:1])
