import pytest

from pipelines.config import compose
from pipelines.training.loop.optimizer import learning_rate


def run(*overrides):
    return compose(["+experiment=digits", "optim.warmup_images=1000", "optim.lr=1.0", "images=10000", *overrides])


def test_the_learning_rate_warms_up_and_decays_by_images_seen():
    assert learning_rate(run(), 0) == pytest.approx(0.001)
    assert learning_rate(run(), 499) == pytest.approx(0.5 * (1 - 499 / 10_000))
    assert learning_rate(run(), 5_000) == pytest.approx(0.5)
    assert learning_rate(run(), 10_000) == pytest.approx(0.02)
    assert learning_rate(run("optim.decay=constant"), 9_999) == 1.0
    assert learning_rate(run("optim.decay=cosine"), 5_000) == pytest.approx(0.5)
    root = run("optim.decay=inverse_sqrt", "optim.decay_images=2000")
    assert learning_rate(root, 1_999) == 1.0
    assert learning_rate(root, 8_000) == pytest.approx(0.5)


@pytest.mark.parametrize("rule, factor", [("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_is_scaled_from_the_batch_that_it_is_given_for(rule, factor):
    scaled, plain = run("batch_size=512", f"optim.lr_scaling=[{rule},128]"), run("batch_size=512")
    for seen in (0, 5_000):
        assert learning_rate(scaled, seen) == pytest.approx(factor * learning_rate(plain, seen))
    assert learning_rate(run("batch_size=128", f"optim.lr_scaling=[{rule},128]"), 5_000) == learning_rate(run(), 5_000)
    assert scaled.identity()["optim.lr_scaling"] == [rule, 128]
    assert "optim.lr_scaling" not in plain.identity()
