import itertools
import math
from functools import partial

import pytest
import torch

from ddpm.prediction import Clipped, NetworkDenoiser, coefficients
from ddpm.samplers import DDIM, DPM2, DPMSolver, Heun, UniPC, initial_noise, last
from ddpm.schedule import NoiseSchedule, from_log_snr, make_schedule
from tests.ddpm.exact import GaussianDenoiser, PointDenoiser

SHAPE = (1, 4, 4)
COSINE = make_schedule("cosine")
FLOW = make_schedule("flow")
FlowHeun = partial(Heun, time="flow")
SOLVERS = [DPMSolver, Heun, FlowHeun, DPM2]
# log-SNR from 8 down to -8, linear in t: even steps in t are even steps in log-SNR.
UNIFORM = from_log_snr(lambda u: 8 - 16 * u, 1024)
END = 128


def noise(count=16):
    return initial_noise(0, torch.arange(count), SHAPE).double()


def exact(denoiser, schedule, x_T, t, start=None):
    """The probability-flow ODE's solution at t for N(m, s^2) data: x_t keeps its standard score under q(x_t)."""

    def moments(u):
        alpha, sigma = schedule.alpha(u), schedule.sigma(u)
        return alpha * denoiser.mean, (alpha**2 * denoiser.std**2 + sigma**2).sqrt()

    (mean_T, std_T), (mean, std) = moments(schedule.num_steps if start is None else start), moments(t)
    return mean + (x_T - mean_T) * std / std_T


def error(x, y):
    return (x - y).square().mean().sqrt().item()


def even(steps):
    return [1024 - i * (1024 - END) / steps for i in range(steps + 1)]


def by_timesteps(solver):
    return lambda denoiser, x_T, steps: last(solver()(denoiser, UNIFORM, x_T, timesteps=even(steps)))


def by_ddim(denoiser, x_T, steps):
    """DDIM's sample at END on its way to 0: `steps` steps of the same length as the others'."""
    samples = DDIM(steps=steps * 1024 // (1024 - END))(denoiser, UNIFORM, x_T)
    return next(s.x_t for s in samples if s.t == END)


@pytest.mark.parametrize(
    ("run", "order"),
    [(by_ddim, 1), *((by_timesteps(solver), 2) for solver in (DPMSolver, Heun, FlowHeun, DPM2))],
    ids=["ddim", "dpm_solver", "heun", "flow_heun", "dpm2"],
)
@pytest.mark.parametrize(("mean", "std"), [(0.2, 0.3), (-0.5, 1.5)])
def test_the_error_against_the_exact_ode_falls_with_the_order(run, order, mean, std):
    denoiser = GaussianDenoiser(UNIFORM, mean, std)  # at std = 0.1 DPM-Solver's leading error happens to vanish here
    x_T = noise()
    truth = exact(denoiser, UNIFORM, x_T, END)
    counts = [28, 56, 112, 224]
    errors = [error(run(denoiser, x_T, n), truth) for n in counts]
    logs = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(counts, errors, strict=True)], dtype=torch.float64)
    n, e = (logs - logs.mean(0)).T
    slope = -((n * e).sum() / n.square().sum()).item()
    assert slope == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_second_order_beats_ddim_of_as_many_evaluations(solver, kind, zero_terminal_snr):
    schedule = make_schedule(kind, zero_terminal_snr=zero_terminal_snr)
    denoiser = GaussianDenoiser(schedule, -0.8, 1.0)
    truth = exact(denoiser, schedule, noise(), 0)
    evaluations = 1 if solver is DPMSolver else 2
    ours = error(last(solver(steps=20)(denoiser, schedule, noise())), truth)
    ddims = error(last(DDIM(steps=20 * evaluations)(denoiser, schedule, noise())), truth)
    assert ours < ddims / 2
    assert ours < 0.03


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_only_image_there_is_comes_out_in_float32(solver, steps):
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    out = last(solver(steps=steps)(PointDenoiser(COSINE, image), COSINE, noise(3).float()))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, image.expand(3, *SHAPE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("clip", [None, 0.25])
def test_the_step_to_zero_returns_x0_and_the_first_step_of_many_is_on_the_way(solver, clip):
    exact = GaussianDenoiser(COSINE)
    denoiser = exact if clip is None else Clipped(exact, COSINE, clip)
    steps = list(solver(steps=7)(denoiser, COSINE, noise()))
    assert [s.t for s in steps] == COSINE.timesteps(7)[1:]
    torch.testing.assert_close(steps[-1].x_t, steps[-1].x0, rtol=0, atol=1e-12)
    assert (steps[-1].x0.abs().max().item() == 0.25) == (clip is not None)


def test_dpm_solver_starts_with_a_step_of_ddim():
    denoiser = GaussianDenoiser(COSINE)
    ours = list(DPMSolver(steps=10)(denoiser, COSINE, noise()))
    theirs = list(DDIM(steps=10)(denoiser, COSINE, noise()))
    torch.testing.assert_close(ours[0].x_t, theirs[0].x_t)
    assert error(ours[4].x_t, theirs[4].x_t) > 1e-3


def test_dpm_solver_agrees_with_diffusers_from_the_same_noise():
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    denoiser = GaussianDenoiser(COSINE)
    theirs = x_T = noise(4)
    for index in scheduler.timesteps:
        eps = denoiser(theirs, torch.full((4,), float(index) + 1)).eps
        theirs = scheduler.step(eps, index, theirs).prev_sample
    ours = last(DPMSolver(steps=20)(denoiser, COSINE, x_T))
    assert error(ours, theirs) < 2e-4  # their tables are float32
    assert error(ours, last(DDIM(steps=20)(denoiser, COSINE, x_T))) > 5e-3


def test_heun_evaluates_twice_a_step_except_at_the_ends():
    seen = []

    def counting(denoiser):
        def counted(x_t, t, cond):
            seen.append(t[0].item())
            return denoiser(x_t, t, cond)

        return counted

    last(Heun(steps=4)(counting(GaussianDenoiser(UNIFORM)), UNIFORM, noise()))
    assert seen == [1024, 768, 768, 512, 512, 256, 256]
    seen.clear()
    last(Heun(steps=4)(counting(GaussianDenoiser(COSINE)), COSINE, noise()))  # sigma / alpha is 20,000 at T
    assert seen == [1000, 750, 500, 500, 250, 250]


@pytest.mark.parametrize("solver", SOLVERS)
def test_real_levels_may_start_below_the_top_and_lie_between_the_tables(solver):
    """The ODE can be joined half-way: from its solution at 500.5 to 0, and only as far as 20.25."""
    denoiser = GaussianDenoiser(COSINE)
    half_way = exact(denoiser, COSINE, noise(), 500.5)
    grid = [500.5 * (1 - i / 60) ** 1.5 for i in range(60)]
    for end in (0.0, 1e-3):
        steps = list(solver()(denoiser, COSINE, half_way, timesteps=[*grid, end]))
        assert [s.t for s in steps] == [*grid[1:], end]
        assert error(steps[-1].x_t, exact(denoiser, COSINE, half_way, end, start=500.5)) < 2e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1001},
        {"timesteps": [1000]},
        {"timesteps": [10, 10, 0]},
        {"timesteps": [0, 500, 1000]},
        {"timesteps": [1000.5, 0]},
        {"timesteps": [1000, -1]},
        {"timesteps": [1000, float("nan"), 0]},
    ],
)
def test_levels_that_cannot_be_visited_are_refused(solver, options):
    timesteps, settings = options.get("timesteps"), {k: v for k, v in options.items() if k != "timesteps"}
    with pytest.raises(ValueError, match="steps"):
        last(solver(**settings)(GaussianDenoiser(COSINE), COSINE, noise(), timesteps=timesteps))


def edm_grid(steps, low=0.002, high=80.0, rho=7.0):
    """EDM's levels sigma / alpha (Karras et al. 2022, eq. 5), 0 last."""
    i = torch.arange(steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*levels.tolist(), 0.0]


def edm_algorithm_1(denoise, y, levels):
    """EDM's algorithm 1 in its own variables: Heun's steps on y = x / alpha, Euler's to level 0."""
    for k, k_next in itertools.pairwise(levels):
        slope = (y - denoise(y, k)) / k
        euler = y + (k_next - k) * slope
        y = euler if k_next == 0 else y + (k_next - k) * (slope + (euler - denoise(euler, k_next)) / k_next) / 2
    return y


@pytest.mark.parametrize("kind", ["linear", "cosine", "edm"])
def test_heun_is_edms_algorithm_1_from_level_80_on(kind):
    """Its grid begins at sigma / alpha = 80 exactly, where the paper takes Heun's step: 19 evaluations in 10 steps."""
    levels = edm_grid(10)
    if kind == "edm":  # a schedule whose table is that grid
        schedule = NoiseSchedule(1 / (1 + torch.tensor(levels[::-1], dtype=torch.float64).square()))
        grid = [10.0 - i for i in range(11)]
    else:
        schedule = make_schedule(kind)
        grid = [schedule.timestep(math.atan(k)).item() for k in levels]
    denoiser = GaussianDenoiser(schedule, 0.3, 0.5)
    seen = []

    def counting(x_t, t, cond=None):
        seen.append(t[0].item())
        return denoiser(x_t, t, cond)

    def denoise(y, k):
        return 0.3 + 0.25 / (0.25 + k**2) * (y - 0.3)

    theirs = edm_algorithm_1(denoise, 80 * noise(4), levels)
    ours = last(Heun()(counting, schedule, 80 * schedule.alpha(grid[0]).item() * noise(4), timesteps=grid))
    assert len(seen) == 19
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def flow_matching(velocity, z, times, order):
    """Euler's or Heun's method on dz/dtau = u(z, tau); the step to tau = 0 is Euler's (JiT, algorithm 2)."""
    for tau, end in itertools.pairwise(times):
        u = velocity(z, tau)
        if order == 2 and end > 0:
            u = (u + velocity(z + (end - tau) * u, end)) / 2
        z = z + (end - tau) * u
    return z


def exact_velocity(z, tau, mean=0.3, std=0.5):
    """Of N(mean, std^2) data, from the density of z, which is N((1 - tau) mean, (1 - tau)^2 std^2 + tau^2)."""
    variance = (1 - tau) ** 2 * std**2 + tau**2
    return -mean + (tau - (1 - tau) * std**2) / variance * (z - (1 - tau) * mean)


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(steps=10), 1), (FlowHeun(steps=10), 2)], ids=["ddim", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_is_eulers_method_of_flow_matching_and_heun_is_its_heun(sampler, order, shift):
    schedule = make_schedule("flow", shift=shift)
    times = schedule.flow_time(torch.tensor(schedule.timesteps(10))).tolist()
    theirs = flow_matching(exact_velocity, noise(4), times, order)
    ours = last(sampler(GaussianDenoiser(schedule, 0.3, 0.5), schedule, noise(4)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_schedule_and_ddim_are_diffusers_flow_matching_scheduler(shift):
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule, steps = make_schedule("flow", shift=shift), 20
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    seen = []

    def network(z, time, cond):
        seen.append(time[0].item())
        return exact_velocity(z, (time[0] / 1000).item())

    z = noise(4)
    for time in scheduler.timesteps:
        z = scheduler.step(exact_velocity(z, time.item() / 1000), time, z).prev_sample
    ours = last(DDIM(steps=steps)(NetworkDenoiser(network, schedule, "flow"), schedule, noise(4)))
    assert seen == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    assert error(ours, z) < 1e-5  # their times are float32


@pytest.mark.parametrize("solver", [DDIM, DPMSolver, UniPC, Heun, FlowHeun, DPM2])
def test_one_denoiser_given_as_velocity_and_as_v_is_sampled_to_the_same_images(solver):
    schedule = make_schedule("flow")
    exact = GaussianDenoiser(schedule, 0.3, 0.5)

    def v_network(x_t, row, cond):
        alpha, sigma = coefficients(schedule, (row[0] + 1).item(), x_t)
        pred = exact(x_t, row.double() + 1)
        return alpha * pred.eps - sigma * pred.x0

    def flow_network(z, time, cond):
        return exact_velocity(z, (time[0] / 1000).item())

    networks = {"v": v_network, "flow": flow_network}
    by_v, by_flow = (
        last(solver(steps=10)(NetworkDenoiser(networks[k], schedule, k), schedule, noise())) for k in networks
    )
    assert error(by_v, by_flow) < 1e-5


def test_second_order_gains_on_the_straight_path():
    denoiser = GaussianDenoiser(FLOW, -0.8, 1.0)
    truth = exact(denoiser, FLOW, noise(), 0)
    ddims = error(last(DDIM(steps=40)(denoiser, FLOW, noise())), truth)
    for solver, steps in ((DPMSolver, 40), (UniPC, 40), (Heun, 20), (FlowHeun, 20), (DPM2, 20)):
        assert error(last(solver(steps=steps)(denoiser, FLOW, noise())), truth) < ddims / 2, solver


def k_diffusion_dpm_2(denoise, y, levels):
    """k-diffusion's sample_dpm_2 without churn: the midpoint in log sigma, Euler's step to level 0."""
    for k, k_next in itertools.pairwise(levels):
        slope = (y - denoise(y, k)) / k
        if k_next == 0:
            y = y + slope * (k_next - k)
        else:
            k_mid = math.sqrt(k * k_next)
            y_mid = y + slope * (k_mid - k)
            y = y + (y_mid - denoise(y_mid, k_mid)) / k_mid * (k_next - k)
    return y


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_dpm2_is_that_of_k_diffusion(kind):
    levels, schedule = edm_grid(10), make_schedule(kind)
    grid = [schedule.timestep(math.atan(k)).item() for k in levels]

    def denoise(y, k):
        return 0.3 + 0.25 / (0.25 + k**2) * (y - 0.3)

    theirs = k_diffusion_dpm_2(denoise, 80 * noise(4), levels)
    alpha = schedule.alpha(grid[0]).item()
    ours = last(DPM2()(GaussianDenoiser(schedule, 0.3, 0.5), schedule, 80 * alpha * noise(4), timesteps=grid))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
