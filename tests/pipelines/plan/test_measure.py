"""Measuring this machine, and plans that are kept and written."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from pipelines.config import ConfigError, compose, from_dict, read_config
from pipelines.environment import cgroups
from pipelines.plan import make
from pipelines.plan import measure as measuring
from pipelines.plan.facts import UserOverrides
from pipelines.plan.keep import PlanBook, StoredPlan, to_yaml
from pipelines.plan.make import compose_plan
from pipelines.plan.measure import (
    LongerMeasurement,
    MeasuredLonger,
    Measurement,
    measure,
    measure_longer,
    others_busy,
    speed_together,
)
from pipelines.plan.networks import candidates, unet
from pipelines.plan.propose import propose
from pipelines.storage import Storage
from pipelines.training.loop.speed import MeasuredSpeed
from tests.pipelines.plan.brief import measure_briefly
from tests.pipelines.plan.cases import DIGITS, GPU, LAPTOP, PHOTOS, PICTOGRAMS


@pytest.mark.heavy
def test_a_real_step_is_measured_for_each_network_that_the_budget_could_train(monkeypatch):
    measure_briefly(monkeypatch, 0.1)
    small = replace(DIGITS, shorter_sides=(8, 8, 8), one_size=(8, 8))
    found = measure(small, {"model.channels": [32], "model.attention": [False], "model.layers_per_block": 1}, 600.0)
    (speed,) = found.speeds.values()
    assert (list(found.speeds), found.cores >= 1, found.gpus) == (["hand@8"], True, 0)
    assert speed.train > 1
    assert speed.draw > speed.train
    assert 10_000 < speed.parameters < 200_000
    assert found.judge_step_s["8"] > 0
    assert found.looking_s > 0
    plan = propose(small, found, 600.0, {"model.channels": [32], "model.attention": [False]})
    assert plan.network == "hand@8"


@pytest.mark.parametrize("raised", [None, ConfigError("stopped")])
def test_a_measurement_leaves_no_memory_of_a_gpu_to_its_process(monkeypatch, raised):
    released = []

    def measured(self, device):
        assert device.type == "cuda"
        if raised is not None:
            raise raised

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(True))
    monkeypatch.setattr(Measurement, "_measured", measured)
    with nullcontext() if raised is None else pytest.raises(ConfigError):
        Measurement(DIGITS, {}, 600.0, 1)()
    assert released == [True]


def test_a_container_with_a_share_of_its_machine_is_planned_for_as_that_share(monkeypatch):
    measure_briefly(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cgroups, "limit", lambda kind: 2.0)
    small = replace(DIGITS, shorter_sides=(8, 8, 8), one_size=(8, 8))
    found = measure(small, {"model.channels": [32], "model.attention": [False]}, 1.0)
    assert (found.cores, found.gpus) == (2, 0)


def test_the_time_in_which_a_cluster_is_busy_is_not_that_of_the_measurement(monkeypatch):
    measure_briefly(monkeypatch)

    def after_a_while(measurement, gpus):
        time.sleep(0.3)
        return measurement()

    small, began = replace(DIGITS, shorter_sides=(8, 8, 8), one_size=(8, 8)), time.monotonic()
    settings = {"model.channels": [32], "model.attention": [False]}
    found = measure(small, settings, 1.0, nodes=[{"CPU": 2.0}], run=after_a_while)
    assert 0 < found.looking_s <= time.monotonic() - began - 0.3


@pytest.mark.parametrize("free", [True, False])
def test_a_measurement_says_that_it_waits_for_a_busy_cluster_before_it_does(monkeypatch, free):
    said, needed = [], []

    def is_free(needs):
        needed.append(needs)
        return free

    monkeypatch.setattr(make, "is_free", is_free)
    remote = SimpleNamespace(remote=lambda measurement: measurement)
    monkeypatch.setattr(make, "ray", SimpleNamespace(remote=lambda **asked: lambda call: remote))
    monkeypatch.setattr(make, "finished", lambda tasks, needs, *rest, **bounds: [(0, list(said))])
    said_before = make.on_ray(Measurement(DIGITS, {}, 1.0, 1), 1, notice=lambda *line: said.append(line))
    assert needed == [{"CPU": 1.0, "GPU": 1.0}]
    waits = ("measure", "waiting for free CPUs: all of the Ray cluster are in use")
    assert said_before == said == ([] if free else [waits])


@pytest.mark.parametrize(
    ("step_s", "image_s"), [(0.02, 1e-4), (0.0, 1e-3), (0.01, 0.0)], ids=["both", "images only", "steps only"]
)
@pytest.mark.parametrize(("gpu", "piece"), [(True, 128), (False, 32)], ids=["gpu", "cpu"])
def test_the_time_of_a_step_is_separated_from_that_of_its_images(monkeypatch, gpu, piece, step_s, image_s):
    def measured(config, device, seconds):
        rate = config.batch_size / (step_s + config.batch_size * image_s)
        return MeasuredSpeed(rate, 1e5, 1e5, 1_000_000, "bf16")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measuring, "measure_speed", measured)
    monkeypatch.setattr(measuring, "measure_training", lambda *arguments: measured(*arguments).train)
    monkeypatch.setattr(measuring, "speed_together", lambda cores, precision: 1.0)
    monkeypatch.setattr(measuring, "resolve_precision", lambda optim, device: "bf16")
    monkeypatch.setattr(measuring, "judge_step_seconds", lambda config, classes, device: 0.01)
    speed = Measurement(DIGITS, {}, 600.0, 1)().speeds["narrow@28"]
    for images in (1, 8, 16, piece // 2, piece):
        assert speed.train_in_steps_of(images) == pytest.approx(images / (step_s + images * image_s))
    assert speed.train_in_steps_of(512) == pytest.approx(speed.train_in_steps_of(piece))


def test_a_network_that_could_not_see_enough_images_if_it_were_as_fast_as_the_smaller_one_is_not_measured(monkeypatch):
    tried = []

    def measured(config, device, seconds):
        tried.append(tuple(config.model.channels)[0:2])
        return MeasuredSpeed(60.0, 240.0, 240.0, 1_000_000, "fp32")

    monkeypatch.setattr(measuring, "measure_speed", measured)
    monkeypatch.setattr(measuring, "measure_training", lambda *arguments: 60.0)
    monkeypatch.setattr(measuring, "speed_together", lambda cores, precision: 1.0)
    monkeypatch.setattr(measuring, "judge_step_seconds", lambda config, classes, device: 0.01)
    # 60 images/s are 18,000 in 300 seconds, and 21,000 in 350: half of the 40,000 that the second network needs.
    assert list(Measurement(DIGITS, {}, 300.0, 1)().speeds) == ["narrow@28"]
    assert tried == [(32, 64)]
    assert list(Measurement(DIGITS, {}, 350.0, 1)().speeds) == ["narrow@28", "plain@28"]


@pytest.mark.parametrize(("drawing", "judging"), [(1.0, 1.3), (0.8, 1.0), (1.1, 0.7)])
def test_stages_after_the_training_are_planned_by_longer_measurements(drawing, judging):
    asked = []

    def run(measurement: LongerMeasurement, gpus: int) -> MeasuredLonger:
        asked.append((measurement, gpus))
        known = before.speeds[measurement.candidate.key]
        return MeasuredLonger(drawing * known.draw, before.judge_step_s["28"] / judging, 3.0)

    before = replace(
        LAPTOP, speeds={key: replace(speed, piece=32, step_s=0.01) for key, speed in LAPTOP.speeds.items()}
    )
    found = measure_longer(DIGITS, {}, 600.0, before, compared=True, run=run)
    ((measurement, gpus),) = asked
    assert (measurement.candidate.key, measurement.piece, gpus) == (propose(DIGITS, before, 600.0).network, 32, 0)
    assert measurement.seconds == 1.5
    assert found.looking_s == before.looking_s + 3.0
    for key, speed in found.speeds.items():
        known = before.speeds[key]
        assert (speed.train, speed.step_s) == (known.train, known.step_s)  # a training corrects its own length
        assert (speed.draw, speed.evaluate) == pytest.approx((drawing * known.draw, drawing * known.evaluate))
    for size, seconds in before.judge_step_s.items():
        assert found.judge_step_s[size] == pytest.approx(seconds / judging)


def test_a_gpu_is_not_measured_again():
    assert measure_longer(DIGITS, {}, 600.0, GPU, compared=True, run=None) is GPU


def test_drawing_is_measured_beside_busy_cores_and_the_evaluator_alone(monkeypatch):
    done = []

    @contextmanager
    def others_busy(device, precision):
        done.append("busy")
        yield
        done.append("free")

    def known(name, value):
        def call(*arguments):
            done.append(name)
            return value

        return call

    monkeypatch.setattr(measuring, "others_busy", others_busy)
    monkeypatch.setattr(measuring, "measure_drawing", known("measure_drawing", 7.0))
    monkeypatch.setattr(measuring, "judge_step_seconds", known("judge_step_seconds", 0.5))
    found = LongerMeasurement(DIGITS, {}, candidates(DIGITS, UserOverrides())[0], 8, 0.8)()
    assert done == ["busy", "measure_drawing", "free", "judge_step_seconds"]
    assert (found.draw, found.judge_step_s) == (7.0, 0.5)


def test_a_longer_measurement_gives_speeds_of_this_machine():
    small = replace(DIGITS, shorter_sides=(8, 8, 8), one_size=(8, 8))
    found = LongerMeasurement(small, {}, candidates(small, UserOverrides())[0], 8, 0.2)()
    assert found.draw > 1
    assert 0 < found.judge_step_s < 1
    assert found.took_s >= 0.4


def test_the_other_cores_are_busy_only_while_something_is_measured():
    def threads() -> int:
        return sum("ThreadPoolExecutor" in thread.name for thread in threading.enumerate())

    before = threads()
    with others_busy(torch.device("cpu"), "fp32"):
        assert threads() == before + cgroups.whole_cores() - 1
    assert threads() == before
    with others_busy(torch.device("cuda"), "bf16"):
        assert threads() == before


@pytest.mark.heavy
def test_candidates_that_a_budget_cannot_train_are_not_measured(monkeypatch):
    measure_briefly(monkeypatch)
    small = replace(DIGITS, shorter_sides=(8, 8, 8), one_size=(8, 8))
    assert list(measure(small, {}, 1.0).speeds) == ["narrow@8"]


@pytest.mark.heavy
def test_two_threads_on_one_core_are_each_slower_than_one_alone(monkeypatch):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert 0.2 < speed_together(2, "fp32") < 0.85
    finally:
        os.sched_setaffinity(0, allowed)
    measure_briefly(monkeypatch)
    assert speed_together(1, "bf16") == 1.0
    assert 0 < speed_together(2, "bf16") <= 1.0


def test_every_candidate_is_a_network_for_its_images():
    for size in (8, 12, 16, 20, 24, 28, 32, 64, 128, 256):
        for widths in ((32, 64), (128, 256)):
            settings = unet(size, *widths)
            assert 4 <= size >> (len(settings["model.channels"]) - 1) <= 16
            assert sum(settings["model.attention"]) == 1
            assert len(settings["model.attention"]) == len(settings["model.channels"])
    sizes = [candidate.size for candidate in candidates(PHOTOS, UserOverrides())]
    assert sorted(set(sizes)) == [32, 64, 128, 256]
    assert {candidate.size for candidate in candidates(DIGITS, UserOverrides())} == {28}
    assert {c.key for c in candidates(PHOTOS, UserOverrides({"data.image_size": 48, "model": "dit_small"}))} == {
        "hand@48"
    }


def test_a_plan_is_kept_for_the_command_that_it_was_made_for(tmp_path):
    book = PlanBook(Storage(), f"file://{tmp_path}")
    made = compose_plan(PHOTOS, LAPTOP, 1800.0, [], key="one")
    assert book.find("my-photos", "one") is None
    book.add(made)
    assert book.find("my-photos", "one") == StoredPlan.from_json(made.to_json())
    assert book.find("my-photos", "two") is None
    assert book.free_name("my-photos-30m") == "my-photos-30m-2"
    assert book.free_name("my-photos-1h") == "my-photos-1h"
    (tmp_path / "plans" / "my-photos-30m.json").write_text("{}")
    assert book.find("my-photos", "one") is None


def test_a_kept_plan_has_the_configuration_and_facts_of_the_one_that_was_made():
    made = compose_plan(PICTOGRAMS, LAPTOP, 1800.0, ["optim.lr=0.5"], key="one")
    read = StoredPlan.from_json(made.to_json())
    assert read is not None
    assert (read.source, read.machine) == (PICTOGRAMS, LAPTOP)
    assert from_dict(read.config) == from_dict(made.config)
    assert read.plan.overrides() == made.plan.overrides()
    assert from_dict(read.config).optim.lr == 0.5
    assert StoredPlan.from_json(b"{}") is None


def test_a_saved_plan_is_a_whole_configuration_with_its_reasons(tmp_path):
    made = compose_plan(PHOTOS, LAPTOP, 1800.0, ["data.flip=false"])
    path = tmp_path / "photos.yaml"
    path.write_text(to_yaml(made.plan, from_dict(made.config)))
    assert read_config(path) == compose([*made.plan.overrides(), "data.flip=false"])
    assert yaml.safe_load(path.read_text())["data"]["flip"] is False
    assert "# image size: 32x32. " in path.read_text()
