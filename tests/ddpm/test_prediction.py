import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.gaussian import q_sample
from ddpm.prediction import (
    PARAMETERIZATIONS,
    Conditioning,
    NetworkDenoiser,
    clip_x0,
    coefficients,
    from_output,
    target,
)
from ddpm.schedule import make_schedule

SCHEDULE = make_schedule("cosine")


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@given(t=st.integers(1, 990), seed=st.integers(0, 100))
def test_every_parameterization_recovers_the_image_and_the_noise(kind, t, seed):
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pred = from_output(target(x_0, eps, t, SCHEDULE, kind), q_sample(x_0, t, eps, SCHEDULE), t, SCHEDULE, kind)
    torch.testing.assert_close(pred.x0, x_0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-7, atol=1e-7)


def test_v_determines_the_image_from_pure_noise_and_eps_does_not():
    schedule = make_schedule("linear", zero_terminal_snr=True)
    x_0, eps = torch.randn(2, 2, 1, 4, 4)
    x_T = q_sample(x_0, 1000, eps, schedule)
    assert torch.equal(x_T, eps)
    recovered = from_output(target(x_0, eps, 1000, schedule, "v"), x_T, 1000, schedule, "v")
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
    with pytest.raises(ValueError, match="allowed: eps, x0, v, score"):
        from_output(x, x, 1, SCHEDULE, "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: eps, x0, v, score"):
        target(x, x, 1, SCHEDULE, "noise")  # type: ignore[arg-type]


def test_a_network_is_given_the_table_index_of_t():
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x_t, t, cond):
            seen.append(t)
            return torch.zeros_like(x_t)

    NetworkDenoiser(Probe(), SCHEDULE)(torch.zeros(3, 1, 2, 2), torch.tensor([1.0, 500.0, 1000.0]))
    assert seen[0].tolist() == [0, 499, 999]


def test_conditions_move_together_and_drops_add_up():
    cond = Conditioning(label=torch.arange(3), drop=torch.tensor([True, False, False]))
    both = cond.dropped(torch.tensor([False, False, True]))
    assert both.drop is not None
    assert both.drop.tolist() == [True, False, True]
    doubled = cond.map(lambda v: torch.cat([v, v])).to("cpu")
    assert doubled.label is not None
    assert doubled.label.tolist() == [0, 1, 2, 0, 1, 2]
