import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import prediction
from ddpm.conditioning import Conditioning
from ddpm.gaussian import q_sample
from ddpm.prediction import (
    PARAMETERIZATIONS,
    Clipped,
    DynamicThreshold,
    NetworkDenoiser,
    Prediction,
    clip_x0,
    coefficients,
    computes_bf16,
    eps_from_x0,
    from_output,
    network_input,
    target,
)
from ddpm.schedule import make_schedule
from tests.ddpm.exact import GaussianDenoiser, MixtureDenoiser

SCHEDULE = make_schedule("cosine")


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@given(t=st.integers(1, 990), seed=st.integers(0, 100))
def test_every_parameterization_recovers_the_image_and_the_noise(kind, t, seed):
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pred = from_output(target(x_0, eps, t, SCHEDULE, kind), q_sample(x_0, t, eps, SCHEDULE), t, SCHEDULE, kind)
    torch.testing.assert_close(pred.x0, x_0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-7, atol=1e-7)


def test_v_and_velocity_determine_the_image_from_pure_noise_and_eps_does_not():
    schedule = make_schedule("linear", zero_terminal_snr=True)
    x_0, eps = torch.randn(2, 2, 1, 4, 4)
    x_T = q_sample(x_0, 1000, eps, schedule)
    assert torch.equal(x_T, eps)
    for kind in ("v", "flow"):
        recovered = from_output(target(x_0, eps, 1000, schedule, kind), x_T, 1000, schedule, kind)
        torch.testing.assert_close(recovered.x0, x_0)
    with pytest.raises(ValueError, match="predict v or x0"):
        from_output(eps, x_T, 1000, schedule, "eps")


def test_clipping_keeps_image_and_noise_on_the_line_through_x_t():
    x_t = 3 * torch.randn(4, 1, 4, 4)
    pred = clip_x0(from_output(torch.randn_like(x_t), x_t, 500, SCHEDULE, "eps"), x_t, 500, SCHEDULE, 1.0)
    alpha, sigma = coefficients(SCHEDULE, 500, x_t)
    assert pred.x0.abs().max() <= 1
    torch.testing.assert_close(alpha * pred.x0 + sigma * pred.eps, x_t)


def test_unknown_parameterizations_are_named():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="allowed: eps, x0, v, score, x0_skip"):
        from_output(x, x, 1, SCHEDULE, "noise")
    with pytest.raises(ValueError, match="allowed: eps, x0, v, score, x0_skip"):
        target(x, x, 1, SCHEDULE, "noise")


def test_a_network_is_given_the_table_index_of_t():
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x_t, t, cond):
            seen.append(t)
            return torch.zeros_like(x_t)

    NetworkDenoiser(Probe(), SCHEDULE)(torch.zeros(3, 1, 2, 2), torch.tensor([1.0, 500.0, 1000.0]))
    assert seen[0].tolist() == [0, 499, 999]


def test_a_network_of_the_velocity_is_given_the_straight_path_and_its_time():
    """z = (1 - tau) x_0 + tau eps and 1,000 tau, as flow matching defines them, at every SNR of any schedule."""
    x_0, eps = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.3, 1.0, 250.0, 700.5, 1000.0], dtype=torch.float64)
    for schedule in (SCHEDULE, make_schedule("flow"), make_schedule("edm")):
        z, time = network_input(q_sample(x_0, t, eps, schedule), t, schedule, "flow")
        tau = (time.double() / 1000).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(z, (1 - tau) * x_0 + tau * eps, rtol=1e-6, atol=1e-6)  # the time is float32
    assert network_input(x_0, t, make_schedule("flow"), "flow")[1].tolist() == pytest.approx(t.tolist())


@given(t=st.floats(0, 1000), seed=st.integers(0, 100))
def test_the_velocity_is_linear_in_v(t, seed):
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alpha, sigma = coefficients(SCHEDULE, t, x_0)
    v, u = (target(x_0, eps, t, SCHEDULE, kind) for kind in ("v", "flow"))
    torch.testing.assert_close(u, (sigma - alpha) * q_sample(x_0, t, eps, SCHEDULE) + (alpha + sigma) * v)


def test_the_velocity_of_a_mixture_is_that_of_the_continuity_equation():
    """In z the density is a mixture of N((1 - tau) m, (1 - tau)^2 s^2 + tau^2); its flow is written down directly.

    One component with mean M and variance V is transported by dM/dtau + (dV/dtau / 2 V) (z - M); a mixture by the mean
    of those under the posterior of the components.
    """
    schedule, means, std = make_schedule("flow"), torch.tensor([[-1.0], [0.4], [1.5]], dtype=torch.float64), 0.3
    tau = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.95], dtype=torch.float64)
    z = torch.linspace(-1.2, 1.4, 5, dtype=torch.float64)
    variance = (1 - tau) ** 2 * std**2 + tau**2
    slope = -2 * (1 - tau) * std**2 + 2 * tau
    away = z[:, None] - (1 - tau)[:, None] * means[:, 0]
    share = (-(away**2) / variance[:, None] / 2).softmax(1)
    expected = (share * (-means[:, 0] + (slope / 2 / variance)[:, None] * away)).sum(1)

    alpha, sigma = coefficients(schedule, 1000 * tau, z)
    pred = MixtureDenoiser(schedule, means, std)((z * (alpha + sigma)).reshape(5, 1, 1, 1), 1000 * tau)
    torch.testing.assert_close((pred.eps - pred.x0).flatten(), expected)


def test_conditions_move_together_and_drops_add_up():
    cond = Conditioning(label=torch.arange(3), drop=torch.tensor([True, False, False]))
    both = cond.dropped(torch.tensor([False, False, True]))
    assert both.drop is not None
    assert both.drop.tolist() == [True, False, True]
    doubled = cond.map(lambda v: torch.cat([v, v])).to("cpu")
    assert doubled.label is not None
    assert doubled.label.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_clipped_denoiser_is_the_clipped_prediction_at_any_t():
    x_t = 3 * torch.randn(5, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 300.0, 700.5, 1000.0])
    exact = GaussianDenoiser(SCHEDULE, std=2.0)
    plain, clipped = exact(x_t, t), Clipped(exact, SCHEDULE, 0.7)(x_t, t)
    torch.testing.assert_close(clipped.x0, plain.x0.clamp(-0.7, 0.7))
    alpha, sigma = coefficients(SCHEDULE, t, x_t)
    torch.testing.assert_close((alpha * clipped.x0 + sigma * clipped.eps)[1:], x_t[1:])
    with pytest.raises(ValueError, match="bound must be > 0"):
        Clipped(exact, SCHEDULE, 0.0)


def test_dynamic_thresholding_scales_only_images_that_leave_the_range():
    """Imagen, sec. 2.3: each image by its own quantile, and those within [-1, 1] not at all."""
    x_t, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.full((2,), 500.0)
    x_0 = torch.stack([torch.linspace(-0.9, 0.9, 64), torch.linspace(-4, 4, 64)]).reshape(2, 1, 8, 8).double()

    def denoiser(x, t, cond=None):
        return Prediction(x_0, eps_from_x0(x_0, x, t, SCHEDULE))

    pred = DynamicThreshold(denoiser, SCHEDULE, 0.9)(x_t, t)
    torch.testing.assert_close(pred.x0[0], x_0[0])
    s = x_0[1].abs().flatten().quantile(0.9)
    torch.testing.assert_close(pred.x0[1], x_0[1].clamp(-s, s) / s)
    alpha, sigma = coefficients(SCHEDULE, t, x_t)
    torch.testing.assert_close(alpha * pred.x0 + sigma * pred.eps, x_t)
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="quantile must be in"):
            DynamicThreshold(denoiser, SCHEDULE, bad)


def test_dynamic_thresholding_keeps_the_precision_of_the_image():
    x_0 = torch.linspace(1.1, 3.3, 16, dtype=torch.float64).reshape(1, 1, 4, 4)

    def denoiser(x_t, t, cond=None):
        return Prediction(x_0, torch.zeros_like(x_0))

    out = DynamicThreshold(denoiser, SCHEDULE, 1.0)(x_0, torch.tensor([500.0]))
    torch.testing.assert_close(out.x0, x_0 / 3.3, rtol=1e-15, atol=0)


@given(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), kind=st.sampled_from(["eps", "x0", "v"]))
def test_predictions_and_noised_images_keep_the_dtype_of_the_images(dtype, kind):
    x_0, eps = torch.randn(2, 3, 1, 2, 2).to(dtype)
    t = torch.tensor([1, 400, 900])
    x_t = q_sample(x_0, t, eps, SCHEDULE)
    pred = from_output(target(x_0, eps, t, SCHEDULE, kind), x_t, t, SCHEDULE, kind)
    assert x_t.dtype == pred.x0.dtype == pred.eps.dtype == dtype


def test_a_network_with_twice_the_channels_gives_a_variance_fraction():
    class Network(torch.nn.Module):
        def forward(self, x_t, t, cond):
            return torch.cat([x_t, torch.full_like(x_t, -1.0)], dim=1)

    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([5.0, 6.0])
    pred = NetworkDenoiser(Network(), SCHEDULE, "eps")(x_t, t)
    torch.testing.assert_close(pred.eps, x_t)
    assert pred.variance_fraction.eq(0).all()
    assert pred.variance_fraction.shape == x_t.shape


def test_conditions_are_cut_counted_and_freed_of_label_and_text():
    mask, context = torch.ones(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    cond = Conditioning(label=torch.arange(3), mask=mask, context=context)
    assert len(cond) == 3
    assert cond[1:].label.tolist() == [1, 2]
    assert cond[torch.tensor([2, 0])].label.tolist() == [2, 0]
    assert cond.null().label is None
    assert cond.null().context is context
    with pytest.raises(ValueError, match="no length"):
        len(Conditioning())


@pytest.mark.parametrize(
    ("amx", "instructions", "maker", "faster"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),
        (False, True, "AuthenticAMD", True),
        (False, True, "", True),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_a_processor_computes_bf16_where_its_instructions_for_it_are_the_faster_ones(
    monkeypatch, amx, instructions, maker, faster
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(prediction, "_processor_maker", lambda: maker)
    assert computes_bf16(torch.device("cpu")) == faster


@pytest.mark.parametrize(
    ("text", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
        (None, ""),
    ],
)
def test_the_maker_of_a_processor_is_read_where_linux_says_it(tmp_path, text, maker):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert prediction._processor_maker(tmp_path / "cpuinfo") == maker
