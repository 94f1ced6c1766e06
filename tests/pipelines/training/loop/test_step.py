import pytest

from pipelines.config import compose
from pipelines.training.loop.step import SkipGuard, StepResult, learning_rate


def test_the_learning_rate_warms_up_and_decays_by_images_seen():
    optim = compose(["+experiment=digits", "optim.warmup_images=1000", "optim.lr=1.0"]).optim
    assert learning_rate(optim, 0, 10_000) == pytest.approx(0.001)
    assert learning_rate(optim, 499, 10_000) == pytest.approx(0.5 * (1 - 499 / 10_000))
    assert learning_rate(optim, 5_000, 10_000) == pytest.approx(0.5)
    assert learning_rate(optim, 10_000, 10_000) == pytest.approx(0.02)
    constant = optim.model_copy(update={"decay": "constant"})
    assert learning_rate(constant, 9_999, 10_000) == 1.0
    cosine = optim.model_copy(update={"decay": "cosine"})
    assert learning_rate(cosine, 5_000, 10_000) == pytest.approx(0.5)
    root = optim.model_copy(update={"decay": "inverse_sqrt", "decay_images": 2_000})
    assert learning_rate(root, 1_999, 10_000) == 1.0
    assert learning_rate(root, 8_000, 10_000) == pytest.approx(0.5)


def test_only_updates_in_a_row_stop_a_run_and_the_samples_of_all_of_them_are_named():
    guard = SkipGuard(compose(["optim.max_skipped=3"]).optim, batch_size=10)
    bad, good = StepResult(float("nan"), 1.0, False, False, False), StepResult(1.0, 1.0, True, False, False)
    assert "samples 10..19 " in guard.check(bad, 20)
    assert guard.check(good, 30) is None
    guard.check(bad, 40)
    overflow = StepResult(1.0, float("inf"), False, False, False, rescaled=True)
    assert guard.check(overflow, 40) is None  # neither counted nor a success
    guard.check(bad, 50)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row .*samples 30\.\.59 "):
        guard.check(bad, 60)
