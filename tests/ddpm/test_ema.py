import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm.ema import (
    CACHED,
    EMA,
    WIDEST,
    PowerEMA,
    PowerSnapshot,
    gamma_from_sigma_rel,
    posthoc_weights,
    power_decay,
    reconstruct,
    sigma_rel_from_gamma,
)


def test_after_a_half_life_half_of_the_old_average_is_left():
    module = nn.Linear(1, 1)
    ema = EMA(module, half_life=1000, ramp=1e9)
    start = ema.shadow["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    for step in range(10):
        ema.update(module, (step + 1) * 100, 100)
    torch.testing.assert_close(ema.shadow["weight"], start + 0.5)


def test_two_batches_of_half_the_size_move_as_far_as_one():
    ema = EMA(nn.Linear(1, 1), half_life=1000, ramp=1e9)
    assert ema.decay(5000, 64) ** 2 == pytest.approx(ema.decay(5000, 128))


def test_early_weights_are_forgotten_fast():
    ema = EMA(nn.Linear(1, 1), half_life=1_000_000, ramp=0.05)
    assert ema.decay(128, 128) < 1e-5
    assert ema.decay(20_000_000, 128) == pytest.approx(0.5 ** (128 / 1_000_000))


def test_the_average_round_trips_and_foreign_names_are_refused():
    module = nn.Linear(2, 2)
    ema, other = EMA(module, 100), EMA(nn.Linear(2, 2), 100)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.shadow["weight"], module.weight)
    with pytest.raises(ValueError, match="names differ"):
        ema.load_state_dict({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be > 0"):
        EMA(module, half_life=0)


# Power-function averages.


class Weights(nn.Module):
    """A network that is only its weights, for trajectories that are written down."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(values.clone())

    def set(self, values):
        with torch.no_grad():
            self.w.copy_(values)


def trajectory(steps, size=2000, seed=0):
    """Drift, as of a network that learns, and the noise of its gradients: [steps, size]."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(steps, size, generator=generator).cumsum(0) / steps**0.5
    return drift + 0.3 * torch.randn(steps, size, generator=generator)


def follow(path, ema, batch_size=10, every=None):
    """Average along a path; snapshots after every so many steps."""
    module, snapshots = Weights(path[0]), []
    for step, values in enumerate(path, 1):
        module.set(values)
        ema.update(module, ema.images_seen + batch_size, batch_size)
        if every and step % every == 0:
            snapshots += ema.snapshot()
    return snapshots


def test_gamma_and_sigma_rel_are_inverse():
    for gamma in (0.0, 0.3, 1.0, 6.94, 16.97, 1e3, 1e5):
        assert gamma_from_sigma_rel(sigma_rel_from_gamma(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)
    for sigma_rel in (1e-4, 0.01, 0.05, 0.1, 0.2, WIDEST):
        assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    # The paper's table: widths 0.05 and 0.10 are gamma = 16.97 and 6.94 (EDM2, sec. 3.2).
    assert [round(gamma_from_sigma_rel(s), 2) for s in (0.05, 0.10)] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, WIDEST])
def test_the_profile_is_as_wide_as_asked(sigma_rel):
    images, batch = 100_000, 20
    module, ema = Weights(torch.zeros(2)), PowerEMA(Weights(torch.zeros(2)), [sigma_rel])
    # Averaging the time left and its square gives the profile's moments.
    for ordinal in range(batch, images + 1, batch):
        u = 1 - (ordinal - batch / 2) / images
        module.set(torch.tensor([u, u * u]))
        ema.update(module, ordinal, batch)
    mean, square = ema.shadows[0]["w"].double().tolist()
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=2e-3)


def test_the_average_is_the_mean_weighted_by_a_power_of_time():
    path = trajectory(50, 8)
    sizes = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    module, ema = Weights(torch.full((8,), 99.0)), PowerEMA(Weights(torch.full((8,), 99.0)), (0.05, 0.2))
    ends = [sum(sizes[: k + 1]) for k in range(50)]
    for values, end, size in zip(path, ends, sizes, strict=True):
        module.set(values)
        ema.update(module, end, size)
    for gamma, shadow in zip(ema.gammas, ema.shadows, strict=True):
        power = torch.tensor([0, *ends], dtype=torch.float64) ** (gamma + 1)
        expected = (power.diff()[:, None] * path.double()).sum(0) / power[-1]
        torch.testing.assert_close(shadow["w"], expected.float(), rtol=1e-5, atol=1e-6)


def test_the_first_batch_replaces_whatever_was_there():
    module, ema = Weights(torch.ones(3)), PowerEMA(Weights(torch.full((3,), 5.0)))
    ema.update(module, 64, 64)
    assert all(torch.equal(shadow["w"], torch.ones(3)) for shadow in ema.shadows)


def test_the_batch_size_does_not_matter():
    path = trajectory(40, 8)
    whole, parts = PowerEMA(Weights(path[0])), PowerEMA(Weights(path[0]))
    follow(path, whole, batch_size=30)
    follow(path.repeat_interleave(3, dim=0), parts, batch_size=10)
    assert whole.images_seen == parts.images_seen
    for a, b in zip(whole.shadows, parts.shadows, strict=True):
        torch.testing.assert_close(a["w"], b["w"], rtol=1e-4, atol=1e-5)
    assert power_decay(9.0, 3000, 20) * power_decay(9.0, 2980, 10) == pytest.approx(power_decay(9.0, 3000, 30))


def test_weights_from_before_the_first_update_count_for_the_images_that_made_them():
    module = Weights(torch.zeros(1))
    ema = PowerEMA(module, [WIDEST], images_seen=300)
    module.set(torch.ones(1))
    ema.update(module, 400, 100)
    assert ema.shadows[0]["w"].item() == pytest.approx(0.25)


@pytest.mark.parametrize("sigma_rel, tolerance", [(0.06, 1e-3), (0.07, 1e-3), (0.08, 1e-3), (0.12, 1e-3), (0.15, 5e-3)])
@pytest.mark.parametrize("part", [1.0, 0.8])
def test_a_width_that_was_not_tracked_is_reconstructed(sigma_rel, tolerance, part):
    """From 10 snapshots of two widths: relative error below 1e-3 between them, 5e-3 at half as wide again."""
    path = trajectory(1000)
    steps = round(part * len(path))
    direct = PowerEMA(Weights(path[0]), [sigma_rel])
    follow(path[:steps], direct)
    snapshots = follow(path, PowerEMA(Weights(path[0])), every=100)
    wanted = direct.shadows[0]["w"]
    error = (reconstruct(snapshots, 10 * steps, sigma_rel)["w"] - wanted).norm() / wanted.norm()
    nearest = min((s.weights["w"] - wanted).norm() / wanted.norm() for s in snapshots)
    assert error < tolerance
    assert error < nearest / 20


def test_times_between_snapshots_are_reconstructed_too():
    path = trajectory(1000)
    direct = PowerEMA(Weights(path[0]), [0.1])
    follow(path[:875], direct)
    snapshots = follow(path, PowerEMA(Weights(path[0])), every=50)
    wanted = direct.shadows[0]["w"]
    error = (reconstruct(snapshots, 8750, 0.1)["w"] - wanted).norm() / wanted.norm()
    nearest = min((s.weights["w"] - wanted).norm() / wanted.norm() for s in snapshots)
    assert error < nearest / 3


def test_denser_snapshots_reconstruct_better():
    path = trajectory(960)
    direct = PowerEMA(Weights(path[0]), [0.07])
    follow(path, direct)
    wanted = direct.shadows[0]["w"]
    errors = [
        (reconstruct(follow(path, PowerEMA(Weights(path[0])), every=960 // k), 9600, 0.07)["w"] - wanted).norm()
        for k in (2, 4, 8, 16)
    ]
    assert all(denser < 0.5 * sparser for sparser, denser in itertools.pairwise(errors))


def test_a_target_that_is_a_snapshot_is_that_snapshot():
    times, widths = [100, 100, 200, 200, 300, 300], [0.05, 0.1] * 3
    for i in range(6):
        assert posthoc_weights(times, widths, times[i], widths[i]) == [float(j == i) for j in range(6)]
    snapshots = follow(trajectory(40, 5), PowerEMA(Weights(torch.zeros(5))), every=10)
    for snapshot in snapshots:
        found = reconstruct(snapshots, snapshot.images_seen, snapshot.sigma_rel)
        assert torch.equal(found["w"], snapshot.weights["w"])


def test_coefficients_solve_the_normal_equations_of_the_profiles():
    """The residual is orthogonal to every profile, checked by quadrature instead of the closed form."""
    times, widths = [400, 400, 700, 700, 1000, 1000], [0.05, 0.1] * 3
    weights = posthoc_weights(times, widths, 900, 0.08)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def profile(time, sigma_rel):
        gamma, u = gamma_from_sigma_rel(sigma_rel), tau * 1000 / time
        return torch.where(u <= 1, (gamma + 1) * u**gamma / time * 1000, torch.zeros_like(u))

    basis = torch.stack([profile(t, s) for t, s in zip(times, widths, strict=True)])
    target = profile(900, 0.08)
    best = torch.linalg.lstsq(basis @ basis.T, (basis @ target)[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), best / best.sum(), rtol=1e-3, atol=1e-4)


def test_weights_that_never_changed_are_met_whatever_is_asked():
    snapshots = follow(torch.ones(20, 4), PowerEMA(Weights(torch.ones(4))), every=2)
    assert sum(posthoc_weights([10, 500, 1000], [0.05, 0.1, 0.05], 700, 0.2)) == pytest.approx(1)
    torch.testing.assert_close(reconstruct(snapshots, 137, 0.17)["w"], torch.ones(4))


def test_hundreds_of_snapshots_stay_well_conditioned():
    times = [k * 100 for k in range(1, 201) for _ in range(2)]
    weights = posthoc_weights(times, [0.05, 0.1] * 200, 20_000, 0.073)
    assert sum(weights) == pytest.approx(1)
    assert max(map(abs, weights)) < 2


def test_a_snapshot_does_not_follow_the_averages():
    ema = PowerEMA(Weights(torch.zeros(3)))
    before = follow(torch.ones(1, 3), ema, every=1)
    follow(torch.full((5, 3), 7.0), ema)
    assert [s.images_seen for s in before] == [10, 10]
    assert [s.sigma_rel for s in before] == [0.05, 0.1]
    assert all(torch.equal(s.weights["w"], torch.ones(3)) for s in before)


def test_power_averages_resume_from_a_file(tmp_path):
    path = trajectory(30, 6)
    whole, first = PowerEMA(Weights(path[0])), PowerEMA(Weights(path[0]))
    follow(path, whole)
    follow(path[:12], first)
    save_file(first.state_dict(), tmp_path / "ema.safetensors")
    second = PowerEMA(Weights(torch.zeros(6)))
    second.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    follow(path[12:], second)
    assert second.images_seen == 300
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(whole.shadows, second.shadows, strict=True))


def test_states_that_do_not_fit_are_refused_whole():
    ema = PowerEMA(Weights(torch.zeros(3)))
    state = PowerEMA(Weights(torch.ones(3))).state_dict()
    with pytest.raises(ValueError, match="a run keeps the widths"):
        ema.load_state_dict(PowerEMA(Weights(torch.ones(3)), (0.05, 0.2)).state_dict())
    with pytest.raises(ValueError, match=r"names differ: \['0\.bias'"):
        ema.load_state_dict(PowerEMA(nn.Linear(3, 1)).state_dict())
    with pytest.raises(ValueError, match=r"1\.w: shape \(4,\), expected \(3,\)"):
        ema.load_state_dict({**state, "1.w": torch.ones(4)})
    assert torch.equal(ema.shadows[0]["w"], torch.zeros(3))


def test_steps_that_leave_a_gap_are_refused():
    module = Weights(torch.zeros(3))
    ema = PowerEMA(module)
    ema.update(module, 64, 64)
    for images_seen, batch_size in ((192, 64), (64, 64), (64, 0)):
        with pytest.raises(ValueError, match="does not follow an average at 64"):
            ema.update(module, images_seen, batch_size)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: gamma_from_sigma_rel(0.3), r"in \(0, 0\.2887\], got 0\.3"),
        (lambda: gamma_from_sigma_rel(0.0), r"got 0\.0"),
        (lambda: gamma_from_sigma_rel(math.nan), "got nan"),
        (lambda: sigma_rel_from_gamma(-0.5), r"gamma must be >= 0, got -0\.5"),
        (lambda: PowerEMA(nn.Linear(1, 1), ()), "at least one width"),
        (lambda: PowerEMA(nn.Linear(1, 1), (0.05, 0.05)), "none twice"),
        (lambda: PowerEMA(nn.Linear(1, 1), (0.05, 0.5)), r"got 0\.5"),
        (lambda: PowerEMA(nn.Linear(1, 1), images_seen=-1), "images_seen must be >= 0"),
        (lambda: PowerEMA(nn.Linear(1, 1)).snapshot(), "before the first update"),
        (lambda: posthoc_weights([], [], 10, 0.1), "at least one snapshot"),
        (lambda: posthoc_weights([10, 10], [0.1, 0.1], 10, 0.1), "none twice"),
        (lambda: posthoc_weights([0, 10], [0.1, 0.1], 10, 0.1), "images_seen must be >= 1, got 0"),
        (lambda: posthoc_weights([10, 20], [0.1, 0.1], 21, 0.1), "is at 21 images, the last snapshot at 20"),
        (lambda: posthoc_weights([10, 20], [0.1, 0.1], 20, 0.4), r"got 0\.4"),
    ],
)
def test_mistakes_are_explained(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_snapshots_of_different_networks_are_refused():
    one, two = PowerSnapshot({"a": torch.ones(1)}, 10, 0.1), PowerSnapshot({"a": torch.ones(2)}, 20, 0.1)
    with pytest.raises(ValueError, match=r"they differ in \['a'\]"):
        reconstruct([one, two], 20, 0.1)


# Late in a run.


def late_average(kind, device="cpu", images=200_000_000, updates=2_000, batch=128):
    """(average, exact float64 average) of weights that go from 1.0 to 1.001 late in a long run."""
    module = Weights(torch.ones(4, device=device))
    ema = EMA(module, half_life=500_000) if kind == "half-life" else PowerEMA(module, (0.05,), images_seen=images)
    module.set(torch.full((4,), 1.001, device=device))
    target, exact = float(torch.tensor(1.001)), 1.0
    for seen in range(images + batch, images + batch * (updates + 1), batch):
        ema.update(module, seen, batch)
        keep = ema.decay(seen, batch) if kind == "half-life" else power_decay(ema.gammas[0], seen, batch)
        exact += (1 - keep) * (target - exact)
    shadow, residual = (ema.shadow, ema.residual) if kind == "half-life" else (ema.shadows[0], ema.residuals[0])
    return shadow["w"].double() + residual["w"].double(), shadow["w"], exact


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_tensor_is_averaged_as_its_parts_are(layout):
    torch.manual_seed(0)
    first, second = (torch.randn(65, 64, 3, 7).to(memory_format=layout) for _ in range(2))  # more than is done at once
    whole, parts = Weights(first), [Weights(row) for row in first]
    averages = [EMA(module, half_life=100) for module in (whole, *parts)]
    for seen in (10, 20, 30):
        for module, new in zip((whole, *parts), (second * seen, *(second * seen)), strict=True):
            module.set(new)
        for average, module in zip(averages, (whole, *parts), strict=True):
            average.update(module, seen, 10)
    assert first.numel() > CACHED
    assert torch.equal(averages[0].shadow["w"], torch.stack([average.shadow["w"] for average in averages[1:]]))
    assert torch.equal(averages[0].residual["w"], torch.stack([average.residual["w"] for average in averages[1:]]))


@pytest.mark.parametrize("kind", ["half-life", "power"])
def test_an_average_does_not_stall_late_in_a_run(kind):
    """Each update is below float32's resolution at 1.0; the right averages are 1.000299 and 1.0000227."""
    average, shadow, exact = late_average(kind)
    assert exact == pytest.approx({"half-life": 1.000299, "power": 1.0000227}[kind], abs=1e-6)
    torch.testing.assert_close(average, torch.full_like(average, exact), rtol=0, atol=1e-9)
    torch.testing.assert_close(shadow, torch.full_like(shadow, exact), rtol=0, atol=6e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["half-life", "power"])
def test_an_average_does_not_stall_on_a_gpu_either(kind):
    average, _, exact = late_average(kind, "cuda")
    torch.testing.assert_close(average.cpu(), torch.full((4,), exact, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_average_follows_the_float64_one_over_thousands_of_updates(scale):
    path = scale * trajectory(3_000, 50)
    module, ema = Weights(path[0]), EMA(Weights(path[0]), half_life=20_000)
    exact = path[0].double()
    for step, values in enumerate(path, 1):
        module.set(values)
        ema.update(module, 1_000_000 + 10 * step, 10)
        exact += (1 - ema.decay(1_000_000 + 10 * step, 10)) * (values.double() - exact)
    average = ema.shadow["w"].double() + ema.residual["w"].double()
    # A step's weight is rounded to float32, which is as if the half-life were longer by 6e-8 of itself.
    torch.testing.assert_close(average, exact, rtol=0, atol=6e-8 * scale)


def test_the_residuals_round_trip_and_a_state_of_an_older_release_has_none():
    path = trajectory(50, 8)
    ema, other = PowerEMA(Weights(path[0])), PowerEMA(Weights(path[0]))
    follow(path, ema)
    assert ema.residuals[0]["w"].abs().max() > 0
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.residuals[1]["w"], ema.residuals[1]["w"])
    older = {name: tensor for name, tensor in ema.state_dict().items() if not name.startswith("residual.")}
    other.load_state_dict(older)
    assert torch.equal(other.shadows[1]["w"], ema.shadows[1]["w"])
    assert other.residuals[1]["w"].abs().max() == 0
