"""Weights of the loss: the same error weighs the same in every parameterization."""

import pytest
import torch

from ddpm.gaussian import q_sample
from ddpm.prediction import PARAMETERIZATIONS, SIGMA_DATA, from_output, target
from ddpm.schedule import make_schedule
from ddpm.weights import P2, WEIGHTS, EDMWeight, FlowWeight, Uniform

SCHEDULE = make_schedule("cosine")
T = torch.tensor([1, 10, 300, 700, 999])


def test_p2_is_the_papers_formula():
    """lambda_t / (k + SNR)^gamma with lambda_t = 1 for the error of eps (Choi et al. 2022, eq. 8)."""
    bar = SCHEDULE.alphas_cumprod[T]
    expected = 1 / (0.7 + bar / (1 - bar)) ** 0.5
    torch.testing.assert_close(P2(gamma=0.5, k=0.7)(SCHEDULE, T, "eps"), expected)
    torch.testing.assert_close(P2(gamma=0.0)(SCHEDULE, T, "eps"), Uniform()(SCHEDULE, T, "eps"))


@pytest.mark.parametrize("name", ["min_snr", "p2", "edm", "flow"])
def test_the_same_error_weighs_the_same_in_every_parameterization(name):
    generator = torch.Generator().manual_seed(0)
    x_0, eps, error = torch.randn(3, len(T), 1, 4, 4, generator=generator, dtype=torch.float64)
    x_t = q_sample(x_0, T, eps, SCHEDULE)
    weighted = []
    for kind in PARAMETERIZATIONS:
        # The output that means the same wrong x_0 in this parameterization.
        wrong = from_output(x_0 + 0.1 * error, x_t, T, SCHEDULE, "x0")
        output = {"x0": wrong.x0, "eps": wrong.eps}.get(kind)
        if output is None:
            output = target(wrong.x0, wrong.eps, T, SCHEDULE, kind)
        loss = (output - target(x_0, eps, T, SCHEDULE, kind)).square().flatten(1).mean(1)
        weighted.append(WEIGHTS[name]()(SCHEDULE, T, kind) * loss)
    for other in weighted[1:]:
        torch.testing.assert_close(other, weighted[0], rtol=1e-9, atol=0)


def test_edms_weight_is_the_papers_formula_and_one_where_the_output_is_the_papers():
    """lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2 = 1 / c_out^2 on the error of D (Karras et al. 2022, table 1)."""
    sigma = SCHEDULE.ratio(T)
    torch.testing.assert_close(EDMWeight(sigma_data=0.7)(SCHEDULE, T, "x0"), (sigma**2 + 0.49) / (sigma * 0.7) ** 2)
    one = torch.ones(len(T), dtype=torch.float64)
    torch.testing.assert_close(EDMWeight(sigma_data=1.0)(SCHEDULE, T, "v"), one)
    torch.testing.assert_close(EDMWeight()(SCHEDULE, T, "x0_skip"), one / SIGMA_DATA**2)


def test_the_weight_of_the_velocity_is_jits_loss_of_a_predicted_image():
    """JiT divides both x_0 and its prediction, less z, by its 1 - t of at least 0.05, which is our tau."""
    tau = SCHEDULE.flow_time(T)
    expected = 1 / torch.maximum(tau, torch.tensor(0.05, dtype=torch.float64)) ** 2
    torch.testing.assert_close(FlowWeight()(SCHEDULE, T, "x0"), expected)
    assert FlowWeight(least_time=0.0)(SCHEDULE, T, "flow").tolist() == [1.0] * len(T)


def test_p2_is_finite_where_there_is_no_signal():
    schedule = make_schedule("cosine", zero_terminal_snr=True)
    weights = [P2()(schedule, torch.tensor([1000]), kind).item() for kind in PARAMETERIZATIONS]
    assert weights == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
