import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import schedule as schedules
from ddpm.schedule import NoiseSchedule, from_betas, from_log_snr, make_schedule

KINDS = sorted([*schedules.SCHEDULES, "betas"])


def make(kind, num_steps=1000, **options):
    if kind == "betas":
        return make_schedule(kind, betas=torch.linspace(1e-3, 20 / num_steps, num_steps).tolist(), **options)
    return make_schedule(kind, num_steps=num_steps, **options)


@pytest.mark.parametrize("kind", KINDS)
@given(num_steps=st.integers(25, 2000))
def test_a_table_starts_clean_falls_strictly_and_agrees_with_its_betas(kind, num_steps):
    schedule = make(kind, num_steps)
    table = schedule.alphas_cumprod
    assert schedule.num_steps == num_steps
    assert table[0] == 1
    assert (table.diff() < 0).all()
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), table[1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps, expected", [(100, 2.04e-5), (1000, 4.04e-5), (4000, 4.25e-5)])
def test_linear_betas_are_scaled_so_that_the_end_is_noise_at_any_length(num_steps, expected):
    assert make_schedule("linear", num_steps=num_steps).alphas_cumprod[-1].item() == pytest.approx(expected, rel=5e-3)


def test_linear_and_cosine_tables_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="comes with the dev extra")
    linear = diffusers.DDPMScheduler(beta_schedule="linear").alphas_cumprod
    cosine = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(make_schedule("linear").alphas_cumprod[1:].float(), linear, rtol=2e-5, atol=0)
    torch.testing.assert_close(make_schedule("cosine").alphas_cumprod[1:].float(), cosine, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@given(fraction=st.floats(0, 1))
def test_signal_and_noise_levels_keep_unit_variance_between_table_points(kind, fraction):
    schedule = make(kind)
    t = fraction * schedule.num_steps
    assert (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_is_monotone_and_meets_the_table(kind, zero_terminal_snr):
    schedule = make(kind, 50, zero_terminal_snr=zero_terminal_snr)
    fine = schedule.alpha_bar(torch.linspace(0, 50, 5001, dtype=torch.float64))
    assert (fine.diff() < 0).all()
    torch.testing.assert_close(fine[::100], schedule.alphas_cumprod, rtol=1e-9, atol=1e-15)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    plain, rescaled = make_schedule("linear"), make_schedule("linear", zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.snr(1000.0) == 0
    torch.testing.assert_close(rescaled.alphas_cumprod[1], plain.alphas_cumprod[1])


@given(steps=st.integers(1, 1000))
def test_respacing_keeps_the_marginals_at_the_chosen_timesteps(steps):
    schedule = make_schedule("cosine")
    chosen = schedule.timesteps(steps)
    assert chosen[0] == 1000
    assert chosen[-1] == 0
    assert all(a > b for a, b in schedule.pairs(steps))
    assert torch.equal(schedule.respace(steps).alphas_cumprod, schedule.alphas_cumprod[chosen[::-1]])


def test_a_log_snr_gives_a_schedule_with_that_log_snr_at_any_time():
    schedule = from_log_snr(lambda u: 10 - 20 * u, num_steps=100)
    t = torch.tensor([0.5, 20.0, 33.3, 100.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(t), 10 - 20 * t / 100)
    assert schedule.alpha_bar(0.0) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_schedule("quadratic"),
        lambda: make_schedule("linear", num_steps=10),
        lambda: make_schedule("cosine", s=-1),
        lambda: make_schedule("sigmoid", start=3, end=-3),
        lambda: from_betas([0.1, 1.2]),
        lambda: from_betas([]),
        lambda: NoiseSchedule(torch.tensor([0.9, 0.5], dtype=torch.float64)),
        lambda: NoiseSchedule(torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)),
        lambda: NoiseSchedule(torch.tensor([1.0, math.nan], dtype=torch.float64)),
        lambda: NoiseSchedule(torch.tensor([1.0, 0.5])),
        lambda: make_schedule("cosine").timesteps(0),
        lambda: make_schedule("cosine").timesteps(1001),
        lambda: make_schedule("cosine").alpha_bar(1000.5),
        lambda: make_schedule("cosine").alpha_bar(-1.0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match=r"\w"):
        make()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_angle_rises_and_timestep_is_its_inverse(kind, zero_terminal_snr):
    schedule = make(kind, 200, zero_terminal_snr=zero_terminal_snr)
    t = torch.linspace(0, 200, 777, dtype=torch.float64)
    angle = schedule.angle(t)
    assert (angle.diff() > 0).all()
    torch.testing.assert_close(angle.cos(), schedule.alpha(t))
    torch.testing.assert_close(angle.sin(), schedule.sigma(t))
    torch.testing.assert_close(schedule.timestep(angle), t, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="angles must be in"):
        schedule.timestep(2.0)


def test_a_closed_form_is_inverted_between_the_points_too():
    schedule = from_log_snr(lambda u: 8 - 16 * u, 16)
    t = torch.tensor([0.5, 3.3, 15.9], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep(schedule.angle(t)), t, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("shift", [-2.0, 0.7])
def test_a_shift_moves_the_log_snr_by_the_same_at_every_step_and_keeps_the_ends(kind, shift):
    plain, moved = make_schedule(kind, num_steps=100), make_schedule(kind, num_steps=100, log_snr_shift=shift)
    t = torch.arange(1, 101)
    torch.testing.assert_close(moved.log_snr(t), plain.log_snr(t) + shift)
    assert moved.alpha_bar(0) == 1
    ended = make_schedule(kind, num_steps=100, log_snr_shift=shift, zero_terminal_snr=True)
    assert ended.alpha_bar(100) == 0
    there_and_back = moved.shifted(-shift)
    torch.testing.assert_close(there_and_back.alphas_cumprod, plain.alphas_cumprod, rtol=1e-12, atol=1e-15)


def test_a_shift_moves_a_closed_form_too():
    plain = from_log_snr(lambda u: 5 - 10 * u, 50)
    t = torch.tensor([0.5, 3.25, 49.9])
    torch.testing.assert_close(plain.shifted(1.5).log_snr(t), plain.log_snr(t) + 1.5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
def test_the_timestep_without_noise_is_zero_exactly(kind):
    assert make_schedule(kind).timestep(torch.tensor([0.0, 0.1]))[0] == 0


def test_edm_has_the_papers_levels_and_ends_at_80():
    """Eq. 5 of Karras et al. 2022: (max^(1/7) + i / (N - 1) (min^(1/7) - max^(1/7)))^7, i counted from the top."""
    schedule = make_schedule("edm", num_steps=18)
    t = torch.arange(1, 19)
    i = 1 - t.double() / 18
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.sigma(t) / schedule.alpha(t), expected, rtol=1e-9, atol=0)
    assert (schedule.sigma(18) / schedule.alpha(18)).item() == pytest.approx(80)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        make_schedule("edm", sigma_min=100.0)


def test_flow_is_the_straight_path_divided_by_its_standard_deviation():
    schedule, t = make_schedule("flow", num_steps=50), torch.tensor([0.0, 0.5, 1.0, 25.0, 49.5, 50.0])
    tau = t.double() / 50
    length = ((1 - tau) ** 2 + tau**2).sqrt()
    torch.testing.assert_close(schedule.alpha(t), (1 - tau) / length)
    torch.testing.assert_close(schedule.sigma(t), tau / length)
    torch.testing.assert_close(schedule.flow_time(t), tau)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_of_flow_is_sd3s_and_one_of_the_log_snr(shift):
    """t_m = s t_n / (1 + (s - 1) t_n), s = sqrt(m / n) (Esser et al. 2024, eq. 23)."""
    plain, moved = make_schedule("flow"), make_schedule("flow", shift=shift)
    t = torch.tensor([0.5, 1.0, 400.0, 999.0, 1000.0])
    tau = plain.flow_time(t)
    torch.testing.assert_close(moved.flow_time(t), shift * tau / (1 + (shift - 1) * tau))
    torch.testing.assert_close(moved.alphas_cumprod, plain.shifted(-2 * math.log(shift)).alphas_cumprod)
    with pytest.raises(ValueError, match="shift must be > 0"):
        make_schedule("flow", shift=0.0)
