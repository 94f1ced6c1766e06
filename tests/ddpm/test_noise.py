import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm.noise import Purpose, integers, normal, philox, slerp, uniform, words


def tensors(*values):
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # the known-answer vectors of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    assert tuple(int(w) for w in philox(tensors(*counter), key)) == expected


@given(seed=st.integers(0, 2**64 - 1), n=st.integers(0, 2**62), count=st.integers(1, 9))
def test_philox_is_bit_equal_to_a_scalar_reference(seed, n, count):
    def reference(c, k):
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = ((p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF)
            k = ((k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF)
        return c

    expected = [
        w
        for block in range(3)
        for w in reference((block, Purpose.NOISE, n & 0xFFFFFFFF, n >> 32), (seed & 0xFFFFFFFF, seed >> 32))
    ]
    assert words(seed, torch.tensor([n]), Purpose.NOISE, count)[0].tolist() == expected[:count]


def test_a_sample_does_not_depend_on_its_batch_and_streams_differ():
    n = torch.arange(1000)
    whole = normal(7, n, Purpose.NOISE, (1, 8, 8))
    assert torch.equal(whole[[3, 999]], normal(7, torch.tensor([3, 999]), Purpose.NOISE, (1, 8, 8)))
    assert not torch.equal(whole, normal(8, n, Purpose.NOISE, (1, 8, 8)))
    assert not torch.equal(whole, normal(7, n, Purpose.SAMPLING, (1, 8, 8)))
    assert normal(7, n, Purpose.NOISE, (3,)).shape == (1000, 3)
    assert normal(7, n, Purpose.NOISE, ()).shape == (1000,)


def test_normals_are_normal():
    z = np.sort(normal(0, torch.arange(20_000), Purpose.NOISE, (5,)).double().numpy().ravel())
    from scipy.stats import kstest

    assert kstest(z, "norm").pvalue > 1e-3
    assert np.isfinite(z).all()


def test_uniforms_lie_inside_and_integers_cover_their_range():
    n = torch.arange(50_000)
    u = uniform(1, n, Purpose.LABEL_DROP)[:, 0]
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    counts = integers(1, n, Purpose.TIMESTEP, 10).bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 5000).abs().max() < 400


@pytest.mark.parametrize("call", [lambda n: words(-1, n, Purpose.NOISE, 1), lambda n: integers(0, n, Purpose.NOISE, 0)])
def test_seeds_and_ranges_are_checked(call):
    with pytest.raises(ValueError, match="must be in"):
        call(torch.arange(2))


def test_a_seed_for_each_ordinal_gives_what_that_seed_gives_alone():
    seeds, n = [0, 7, 2**63 - 1], torch.tensor([5, 0, 2**40])
    together = normal(torch.tensor(seeds), n, Purpose.NOISE, (1, 4, 4))
    alone = [normal(seed, n[i : i + 1], Purpose.NOISE, (1, 4, 4)) for i, seed in enumerate(seeds)]
    assert torch.equal(together, torch.cat(alone))
    for wrong in (torch.tensor([1, 2]), torch.tensor([1, 2, -3])):
        with pytest.raises(ValueError, match="one for each of 3 ordinals"):
            normal(wrong, n, Purpose.NOISE, (2,))


def test_an_arc_between_draws_has_their_ends_and_stays_at_their_norm():
    a, b = (normal(seed, torch.arange(4), Purpose.NOISE, (1, 32, 32)) for seed in (0, 1))
    assert torch.equal(slerp(a, b, torch.zeros(4)), a)
    assert torch.equal(slerp(a, b, torch.ones(4)), b)
    middle = slerp(a, b, torch.full((4,), 0.5))
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.full((4,), 32.0), rtol=0.1, atol=0)
    assert (torch.lerp(a, b, 0.5).flatten(1).norm(dim=1) < 25).all()  # a line leaves the shell
    torch.testing.assert_close(slerp(a, a, torch.full((4,), 0.3)), a)
