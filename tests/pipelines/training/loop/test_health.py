"""Signs of a training that does not work: each on curves that have it, and none on those that have not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.config import compose, groups
from pipelines.presentation.progress import NOT_WORKING
from pipelines.training.loop import health
from pipelines.training.loop.health import Health, SkipGuard, blank, expected_faults
from pipelines.training.loop.progress import StepResult
from tests.docs.modules import load
from tests.pipelines.training.loop.ranks import tiny_config, train_here

NEEDED = load("experiments").NEEDED


def of_digits(*overrides):
    return compose(["+experiment=digits", *overrides])


def fed(config, curve, norm=lambda share: 0.3, resumed_at=0):
    """Return what is said on the way of a run whose loss and gradient norm are functions of its share."""
    judge, said, every = Health(config, resumed_at), [], config.tracking.log_every
    for n in range(5):
        judge.step(curve(n / 1000))
    for seen in range(every, config.images + 1, every):
        share = seen / config.images
        said += judge.curves(seen, curve(share), norm(share))
    return said


def falling(share):
    return 0.15 + 0.8 * math.exp(-20 * share) + 0.01 * math.sin(300 * share)


def test_a_consistency_model_sampled_as_a_denoiser_or_guided_twice_is_reported_before_it_starts():
    tuned = ["+experiment=digits_consistency", "init_from=/m"]
    assert "set sampler=consistency" in expected_faults(compose([*tuned, "sampler=ddim"]))[0]
    guided = ["guidance.scale=1.5", "objective.label_drop=0.1"]
    twice = compose([*tuned, "objective.consistency_guidance=2", *guided])
    assert "folded in by objective.consistency_guidance = 2: set guidance.scale=1" in expected_faults(twice)[0]
    assert expected_faults(compose([*tuned, *guided])) == []


def test_losses_and_predictions_of_a_consistency_model_are_no_faults():
    """Gradients grow from stage to stage as gaps shrink, and f of noise is one image, not the mean of all."""
    config = compose(["+experiment=digits_consistency", "init_from=/m", "images=640000"])
    assert fed(config, lambda share: 1 + share, lambda share: 1 + 200 * share) == []
    assert Health(config, 0).prediction(config.images, 2.0, 1.0, 0.5) == []


@pytest.mark.parametrize("name", groups()["experiment"])
def test_no_shipped_experiment_is_expected_to_fail_and_a_loss_that_falls_is_no_fault(name):
    config = compose([f"+experiment={name}", *NEEDED.get(name, [])])
    assert expected_faults(config) == []
    assert fed(config, falling) == []


def test_a_loss_that_does_not_fall_is_reported_once_with_a_rate_to_try():
    (said,) = fed(of_digits(), lambda share: 0.95 + 0.01 * math.sin(99 * share))
    assert said.startswith(f"{NOT_WORKING}the loss is 0.9")
    assert "try optim.lr=0.006" in said
    assert "ddpm check s3://ddpm/datasets/digits" in said


def test_a_run_that_goes_on_or_is_fine_tuned_need_not_fall():
    assert fed(of_digits(), lambda share: 0.2, resumed_at=10) == []
    assert fed(of_digits("init_from=/model"), lambda share: 0.2) == []


def test_a_loss_and_gradient_that_rise_ask_for_a_lower_rate():
    def rising(share):
        return falling(share) if share < 0.5 else 0.16 * (1 + 4 * (share - 0.5))

    (said,) = fed(of_digits("optim.lr=0.03"), rising, lambda share: 0.3 if share < 0.5 else 3.0)
    assert "set optim.lr=0.01 in a new run" in said
    assert fed(of_digits(), rising, lambda share: 0.3) == []  # a harder part of the data
    assert fed(of_digits(), falling, lambda share: 9.0 * share) == []


def test_steps_that_are_not_finite_are_left_to_the_skip_guard():
    judge = Health(of_digits(), 0)
    assert [judge.curves(200 * 128 * n, math.nan, math.inf) for n in range(1, 9)] == [[]] * 8


# Squared errors of predicted images of MNIST at a signal-to-noise ratio of about 1 / 400; the mean image has 0.19.
@pytest.mark.parametrize("prediction, error, told", [("eps", 0.7, True), ("v", 0.22, False), ("v", 0.9, True)])
def test_predictions_worse_than_the_mean_image_are_reported_with_the_remedy(prediction, error, told):
    judge = Health(of_digits(f"objective.prediction={prediction}"), 0)
    assert judge.prediction(10_240, error, 0.19, 0.3) == []  # it is early
    assert judge.prediction(51_200, error, 0.19, 0.0) == []  # no sample shows it
    said = judge.prediction(51_200, error, 0.19, 0.3)
    assert bool(said) is told
    assert judge.prediction(102_400, error, 0.19, 0.3) == []  # once
    if told:
        assert ("objective.prediction=v in a new run" in said[0]) is (prediction == "eps")


def real(count=32):
    pictures = np.zeros((count, 8, 8, 1), np.uint8)
    pictures[:, 2:6, 2:6] = np.random.default_rng(0).integers(120, 256, (count, 4, 4, 1))
    return pictures


@pytest.mark.parametrize("level, colour", [(127, "grey"), (250, "white")])
def test_samples_without_a_picture_are_reported_with_their_colour(level, colour):
    judge = Health(of_digits(), 0)
    drawn = np.full((32, 8, 8, 1), level, np.uint8)
    assert judge.samples(10_240, drawn, real()) == []
    (said,) = judge.samples(102_400, drawn, real())
    assert "100% of the samples" in said
    assert f"nearly {colour}" in said
    assert judge.samples(102_400, drawn, real()) == []


def test_samples_like_real_images_are_no_fault_and_neither_is_a_classifier():
    assert blank(real()[::-1], real()) == 0
    assert Health(of_digits(), 0).samples(102_400, real(), real()) == []
    noise = np.random.default_rng(1).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    assert blank(noise, real()) > 0.5
    classifier = Health(compose(["+experiment=digits_classifier"]), 0)
    assert classifier.samples(51_200, np.full((32, 8, 8, 1), 127, np.uint8), real()) == []


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (["objective.label_drop=0"], "set objective.label_drop=0.1, or guidance.scale=1"),
        (["optim.warmup_images=200_000"], "set optim.warmup_images=2560"),
    ],
)
def test_faults_of_the_configuration_are_found_before_anything_starts(overrides, remedy):
    (said,) = expected_faults(of_digits(*overrides))
    assert remedy in said
    assert expected_faults(of_digits(*overrides, *remedy.removeprefix("set ").split(", or ")[:1])) == []


def test_no_label_drop_is_fine_without_guidance_or_condition():
    assert expected_faults(of_digits("objective.label_drop=0", "guidance=none")) == []
    assert expected_faults(of_digits("objective.label_drop=0", "model.class_conditional=false")) == []


@pytest.mark.heavy
def test_a_short_training_of_eps_reports_a_fault_and_one_of_v_does_not(digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "LEAST_STEPS", 20)
    short = ["data.lanes=4", "optim.lr=0.004", "optim.warmup_images=160", "tracking.log_every=320"]
    said = {}
    for prediction in ("eps", "v"):
        caplog.clear()
        folder = tmp_path / prediction
        config = tiny_config(folder, 60 * 32, 32, *short, f"objective.prediction={prediction}")
        train_here(folder, digits, config)
        said[prediction] = [record.getMessage() for record in caplog.records if NOT_WORKING in record.getMessage()]
    assert said["v"] == []
    assert any("as far off as the mean image" in text and "objective.prediction=v" in text for text in said["eps"])


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
