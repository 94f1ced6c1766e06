"""The plan as a function of facts: four kinds of sources, a GPU, what is set by hand, little time and few images."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.methods import METHODS
from benchmarks.results import ROOT
from pipelines.config import ConfigError, compose, override_settings
from pipelines.config.build import network_config
from pipelines.plan import clock
from pipelines.plan.advice import more_time
from pipelines.plan.calibration import CALIBRATION
from pipelines.plan.choose import drawing_precision, methods
from pipelines.plan.facts import Mirror, UserOverrides
from pipelines.plan.lines import source_name
from pipelines.plan.measure import trial_config
from pipelines.plan.networks import Candidate, candidates
from pipelines.plan.propose import propose
from tests.pipelines.plan.cases import (
    CARDS,
    CATALOGUE,
    CLUSTER,
    DIGITS,
    GPU,
    LAPTOP,
    PHOTOS,
    PICTOGRAMS,
    SOURCES,
    UNLABELLED,
    machine,
)

HALF_HOUR = 1_800.0


def composed(plan, *overrides):
    return compose([*plan.overrides(), *overrides])


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("facts", [LAPTOP, GPU], ids=["laptop", "gpu"])
@pytest.mark.parametrize("budget_s", [300.0, 4 * 3600.0])
def test_every_plan_is_a_valid_configuration_that_fits_its_budget_and_says_why(kind, facts, budget_s):
    plan = propose(SOURCES[kind], facts, budget_s)
    config = composed(plan)
    capped = plan.images > 1_000 * SOURCES[kind].train_images - config.batch_size
    assert capped or 0.3 * budget_s < plan.total_s
    assert plan.total_s <= budget_s
    assert config.images == plan.images == plan.images // config.batch_size * config.batch_size
    assert config.training_s == (None if capped else round(plan.seconds["train"]))
    assert config.objective.prediction == "v"
    assert config.optim.decay == "linear"
    assert config.optim.ema_half_life <= config.images / 10
    assert config.optim.warmup_images < config.images / 4
    assert config.tracking.grid_every <= config.images
    assert config.checkpoint.every <= config.images
    assert all(line.reason and line.value for line in plan.lines)
    settings = [key for line in plan.lines for key in line.settings]
    assert len(settings) == len(set(settings))


def test_digits_keep_their_size_are_grey_conditioned_and_never_mirrored():
    config = composed(propose(DIGITS, LAPTOP, HALF_HOUR))
    assert (config.data.image_size, config.data.channels, config.data.geometry) == (28, 1, "keep")
    assert (config.data.flip, config.data.num_classes, config.model.class_conditional) == (False, 10, True)
    assert (config.evaluation.evaluator, config.guidance.scale) == ("classifier", 1.5)
    line = next(line for line in propose(DIGITS, LAPTOP, HALF_HOUR).lines if line.title == "mirroring")
    assert line.reason.startswith("a small network tells 93% of 500 unseen images")


@pytest.mark.parametrize("batch", [16, 128])
def test_workers_on_cores_exchange_the_gradients_of_the_network_in_every_step(batch):
    speed, gpus = LAPTOP.speeds["wide@32"], machine(cores=16, gpus=2)
    exchanged_s = CALIBRATION.exchange.seconds_per_million * speed.parameters / 1e6
    step_s = batch / clock.training_rate(speed, LAPTOP, 2, batch)
    assert step_s == pytest.approx(batch / 2 / (speed.train * CALIBRATION.workers.shared_speed) + exchanged_s)
    alone = clock.training_rate(speed, LAPTOP, 1, batch)
    assert alone == pytest.approx(speed.train / LAPTOP.together * CALIBRATION.exchange.alone_speed)
    assert clock.training_rate(speed, gpus, 2, batch) == pytest.approx(
        2 * speed.train * CALIBRATION.exchange.alone_speed
    )


@pytest.mark.parametrize("source", [DIGITS, PICTOGRAMS, PHOTOS], ids=["digits", "pictograms", "photos"])
def test_a_short_training_is_guided_more_than_a_long_one_and_a_set_scale_stays(source):
    slow = machine(factor=0.3)
    plans = [propose(source, slow, budget_s) for budget_s in (600.0, 1_800.0, 7_200.0, 100_000.0)]
    scales = {}
    for plan in plans:
        larger = max(1.0, (plan.settings["data.image_size"] / 32) ** 2)
        scales.setdefault(plan.images < 30_000 * larger, set()).add(plan.settings["guidance.scale"])
        assert f"guidance {plan.settings['guidance.scale']:g}" in next(
            x.value for x in plan.lines if x.title == "sampler"
        )
    assert scales == {True: {2.0}, False: {1.5}}
    assert "guidance.scale" not in propose(source, slow, 600.0, {"guidance.scale": 3.0}).settings


def test_captioned_pictures_are_conditioned_on_their_captions():
    config = composed(propose(PICTOGRAMS, LAPTOP, HALF_HOUR))
    assert (config.model.text_dim, config.model.class_conditional) == (384, False)
    assert config.data.text_encoder == "sentence-transformers/all-MiniLM-L6-v2"
    assert (config.evaluation.evaluator, config.data.num_classes) == ("contrastive", 0)
    both = composed(propose(replace(PICTOGRAMS, class_counts={"a": 1500, "b": 1500}), LAPTOP, HALF_HOUR))
    assert (both.model.text_dim, both.model.class_conditional) == (384, True)
    sided = propose(replace(PICTOGRAMS, names_sides=True), LAPTOP, HALF_HOUR)
    assert composed(sided).data.flip is False
    assert composed(propose(PICTOGRAMS, LAPTOP, HALF_HOUR)).data.flip is True


def test_prompts_are_judged_by_a_network_that_is_trained_as_long_as_the_evaluator_when_scores_are_computed():
    narrow = Candidate(32, "narrow")
    alone, both = (
        clock.judging(PICTOGRAMS, LAPTOP, narrow, 4 * 3600.0, 30, texts, compared=False) for texts in (False, True)
    )
    assert both.passes == alone.passes
    assert both.seconds["evaluator"] == pytest.approx(alone.seconds["evaluator"])
    encoded = PICTOGRAMS.images * CALIBRATION.judging.encode_share * LAPTOP.judge_step_s["32"] / clock.JUDGE_BATCH
    encoded /= 2 * clock.together(LAPTOP)
    trained = alone.seconds["evaluator"] - CALIBRATION.stages.evaluator_s
    assert both.seconds["scores"] - alone.seconds["scores"] == pytest.approx(trained + encoded, rel=0.01)


def test_captions_are_left_out_by_hand_and_the_plan_says_so():
    plan = propose(PICTOGRAMS, LAPTOP, HALF_HOUR, override_settings(["data.text_encoder=null"]))
    config = composed(plan, "data.text_encoder=null")
    assert (config.data.text_encoder, config.model.text_dim, config.guidance.scale) == (None, 0, 1.0)
    assert "the captions of 3,000 images are not used" in plan.warnings


@pytest.mark.parametrize(
    ("budget_s", "hand", "size", "geometry"),
    [
        (HALF_HOUR, [], (24, 32), "crop"),
        (24 * 3600.0, [], (48, 64), "keep"),
        (24 * 3600.0, ["data.image_size=48x64"], (48, 64), "keep"),
        (24 * 3600.0, ["data.image_size=32x24"], (32, 24), "crop"),
    ],
)
def test_small_pictures_of_one_size_keep_their_proportions(budget_s, hand, size, geometry):
    speeds = LAPTOP.speeds | {key.replace("@24x32", "@32x24"): speed for key, speed in LAPTOP.speeds.items()}
    plan = propose(CARDS, replace(LAPTOP, speeds=speeds), budget_s, override_settings(hand))
    config = composed(plan, *hand)
    assert (config.data.image_size, config.data.geometry) == (size, geometry)
    assert all(side % network_config(config).downsampling == 0 for side in size)
    assert f"{size[0]}x{size[1]}" in next(line.value for line in plan.lines if line.title == "image size")
    assert f"{size[0]}x{size[1]}px" in config.data.uri


def test_a_cluster_that_sees_what_a_published_training_saw_follows_its_recipe():
    plan = propose(CATALOGUE, CLUSTER, 8 * 3600.0)
    config, published = composed(plan), compose(["+experiment=imagenet256", "data.source=x"])
    network = next(line for line in plan.lines if line.title == "network")
    assert network.value == "JiT-B/16, 131.0 M parameters"
    assert f"this budget sees {plan.images:,} images, and its recipe 256,233,400 (Li & He 2025" in network.reason
    assert plan.images >= 256_233_400
    for group in ("model", "objective", "schedule", "guidance"):
        assert getattr(config, group) == getattr(published, group)
    assert config.optim.model_dump(exclude={"warmup_images", "ema_half_life"}) == published.optim.model_dump(
        exclude={"warmup_images", "ema_half_life"}
    )
    assert (config.sampler.kind, config.sampler.steps, config.sampler.time) == ("heun", 50, "flow")
    assert (config.batch_size, config.data.image_size) == (published.batch_size, 256)


@pytest.mark.parametrize(
    ("source", "facts", "budget_s", "hand", "reason"),
    [
        (
            CATALOGUE,
            CLUSTER,
            3600.0,
            [],
            "no transformer: the recipe of JiT-B/16 sees 256,233,400 images (Li",
        ),
        (CATALOGUE, CLUSTER, 8 * 3600.0, ["optim=muon"], "no transformer: the recipe of JiT-B/16 has its own loss"),
        (PHOTOS, CLUSTER, 8 * 3600.0, [], "no transformer: the recipe of JiT-B/16 sees"),  # and the photographs are few
        (DIGITS, LAPTOP, HALF_HOUR, [], "no transformer: JiT-B/16, the one with a recipe, is for 256x256 (Li & He"),
    ],
)
def test_elsewhere_the_network_is_a_unet_and_the_plan_says_why(source, facts, budget_s, hand, reason):
    plan = propose(source, facts, budget_s, override_settings(hand))
    assert composed(plan, *hand).model.kind == "unet"
    assert reason in next(line.reason for line in plan.lines if line.title == "network")


def test_photographs_of_mixed_sizes_are_cropped_mirrored_and_conditioned_on_their_folders():
    config = composed(propose(PHOTOS, LAPTOP, HALF_HOUR))
    assert (config.data.geometry, config.data.flip, config.data.channels) == ("crop", True, 3)
    assert (config.data.num_classes, config.model.class_conditional) == (2, True)
    assert config.data.image_size == 32
    assert config.name == "my-photos-30m"
    assert config.registry.model == "my-photos"


@pytest.mark.parametrize(
    ("together", "workers", "reason"),
    [
        (1.0, 2, "1.87 times as fast as one"),
        (0.7, 2, "1.31 times as fast as one"),
        (0.55, 1, "2 would be 1.03 times as fast: they share physical cores"),
        (0.5, 1, "2 would be 0.94 times as fast: they share physical cores"),
    ],
)
def test_as_many_workers_train_as_are_faster_than_one_on_cores_that_may_share_their_units(together, workers, reason):
    facts = machine(together=together)
    plan = propose(DIGITS, facts, HALF_HOUR)
    assert composed(plan).cluster.num_workers == workers
    assert next(line.reason for line in plan.lines if line.title == "workers") == reason


def test_pictures_without_labels_or_captions_have_no_guidance():
    config = composed(propose(UNLABELLED, LAPTOP, HALF_HOUR))
    assert (config.model.class_conditional, config.data.num_classes, config.guidance.scale) == (False, 0, 1.0)
    assert config.evaluation.evaluator == "contrastive"
    one = composed(propose(replace(UNLABELLED, class_counts={"all": 900}), LAPTOP, HALF_HOUR))
    assert (one.model.class_conditional, one.evaluation.evaluator) == (False, "contrastive")


def test_a_gpu_gets_larger_images_a_larger_network_and_more_of_them():
    here, there = (composed(propose(PHOTOS, facts, HALF_HOUR)) for facts in (LAPTOP, GPU))
    assert there.data.image_size > here.data.image_size
    assert there.model.channels[0] >= here.model.channels[0]
    assert (there.cluster.num_workers, there.cluster.gpus_per_worker) == (1, 1)
    assert (here.cluster.num_workers, here.cluster.gpus_per_worker) == (2, 0)
    cluster = composed(propose(PHOTOS, machine(cores=64, gpus=8, factor=150.0), HALF_HOUR))
    assert cluster.cluster.num_workers == 8
    assert cluster.images > 3 * there.images or cluster.model.channels[0] > there.model.channels[0]


@pytest.mark.parametrize(
    "facts, hand, expected",
    [
        (GPU, ["batch_size=512"], 128),
        (GPU, ["batch_size=128"], None),
        (GPU, ["batch_size=512", "micro_batch_size=64"], 64),
        (machine(cores=16, gpus=3, factor=150.0), ["batch_size=512"], 128),
        (machine(cores=16, gpus=4, factor=150.0), ["batch_size=512"], None),
        (LAPTOP, ["batch_size=512"], None),
    ],
)
def test_a_gpu_computes_no_more_images_at_once_than_it_was_measured_with(facts, hand, expected):
    plan = propose(DIGITS, facts, HALF_HOUR, override_settings(hand))
    assert composed(plan, *hand).micro_batch_size == expected


def test_many_gpus_that_share_a_batch_are_not_planned_as_fast_as_each_was_with_all_of_it():
    def trained(gpus, step_s):
        facts = machine(cores=16, gpus=gpus, factor=150.0)
        speeds = {key: replace(speed, piece=128, step_s=step_s / speed.train) for key, speed in facts.speeds.items()}
        hand = ["batch_size=128", "model.channels=[32,32]", "model.attention=[false,true]", "data.image_size=32"]
        many = replace(DIGITS, images=10_000_000, test_images=1_000_000)
        plan = propose(many, replace(facts, speeds=speeds), HALF_HOUR, override_settings(hand))
        return plan.images / plan.seconds["train"]

    assert trained(8, 0.0) == pytest.approx(8 * trained(1, 0.0), rel=0.05)
    assert trained(1, 127.0) == trained(1, 0.0)
    assert trained(8, 127.0) == pytest.approx(trained(1, 127.0), rel=0.1)
    assert trained(1, 127.0) < trained(8, 64.0) < 2.1 * trained(1, 64.0)


def test_a_batch_larger_than_measured_on_a_gpu_is_processed_in_parts():
    plan = propose(DIGITS, machine(cores=16, gpus=1, factor=3_000.0), 12 * 3600.0)
    line = next(line for line in plan.lines if line.title == "batch")
    assert line.settings == {"batch_size": 512, "micro_batch_size": 128}
    assert line.reason.endswith("steps; a GPU processes 128 images at once, which were measured to fit its memory")


def test_more_time_never_gives_a_smaller_network_at_the_same_size():
    widths = {}
    for minutes in (5, 10, 30, 60, 240, 960):
        config = composed(propose(PHOTOS, LAPTOP, 60.0 * minutes))
        widths.setdefault(config.data.image_size, []).append(sum(config.model.channels))
    assert all(found == sorted(found) for found in widths.values())
    assert list(widths) == sorted(widths)


@pytest.mark.parametrize(
    "override, field",
    [
        ("data.image_size=16", lambda config: config.data.image_size == 16),
        ("batch_size=48", lambda config: config.batch_size == 48 and config.images % 48 == 0),
        ("batch_size=50", lambda config: config.batch_size == 50 and config.data.lanes == 2),
        ("batch_size=25", lambda config: config.batch_size == 25 and config.data.lanes == 1),
        ("images=960", lambda config: config.images == 960 and config.training_s is None),
        ("training_s=120", lambda config: config.training_s == 120 and 2 <= config.images < 120 * 200),
        ("optim.lr=0.5", lambda config: config.optim.lr == 0.5),
        ("objective=ddpm", lambda config: config.objective.prediction == "eps"),
        ("model.channels=[32,32]", lambda config: config.model.channels == (32, 32)),
        ("model=unet_small", lambda config: config.model.channels == (64, 128, 128)),
        ("model.class_conditional=false", lambda config: not config.model.class_conditional),
        ("sampler=ddim", lambda config: config.sampler.kind == "ddim"),
        ("name=mine", lambda config: config.name == "mine"),
    ],
)
def test_settings_of_the_user_are_kept_and_the_plan_says_so(override, field):
    hand = [override] + (["model.attention=[false,true]"] if "channels" in override else [])
    plan = propose(
        replace(DIGITS, shorter_sides=(32, 32, 32), one_size=(32, 32)), LAPTOP, HALF_HOUR, override_settings(hand)
    )
    assert field(composed(plan, *hand))
    key = override.partition("=")[0]
    assert key not in plan.settings
    assert any(line.reason == "set by hand" and override.split("=")[0] in line.value for line in plan.lines)


@pytest.mark.parametrize(
    ("hand", "kind", "learned"),
    [
        ([], "muon", True),
        (["optim.kind=radam"], "radam", True),
        (["optim=adamw"], "adamw", True),
        (["cluster.parallel=fsdp"], "muon", True),
        (["objective=ddpm"], "muon", False),
        (["objective.loss=hybrid", "model.learned_variance=true"], "muon", False),
        (["objective.learned_weight=false"], "muon", False),
        (["objective.weight=min_snr"], "muon", True),
    ],
)
def test_the_best_methods_are_planned_where_the_users_settings_allow_them(hand, kind, learned):
    settings = override_settings(hand)
    config = composed(propose(DIGITS, LAPTOP, HALF_HOUR, settings), *hand)
    assert (config.optim.kind, config.objective.learned_weight) == (kind, learned)
    trial = trial_config(
        candidates(DIGITS, UserOverrides(settings))[0], DIGITS, UserOverrides(settings), 32, torch.device("cpu")
    )
    assert (trial.optim.kind, trial.objective.learned_weight) == (kind, learned)


@pytest.mark.parametrize("name", ["methods", "methods_mnist", "methods_cifar10"])
def test_the_planned_methods_win_the_comparison_on_each_data_set_or_do_not_differ_from_the_winner(name):
    table = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["methods"]
    planned = {
        key: value
        for key, value in methods(UserOverrides()).items()
        if key not in ("objective", "objective.prediction")
    }
    (own,) = [method for method, changes in METHODS.items() if override_settings(changes) == planned]
    repeated = {method: row for method, row in table.items() if row["seeds"] > 1}
    best = min(repeated.values(), key=lambda row: row["distance"])
    error = math.hypot(*(row["distance_standard_error"] for row in (repeated[own], best)))
    assert repeated[own]["distance"] <= best["distance"] + 2 * error
    assert repeated[own]["difference_to_base"] + 2 * repeated[own]["difference_to_base_standard_error"] < 0


@pytest.mark.parametrize(
    "trains_in, hand, drawn_in",
    [
        ("bf16", [], "bf16"),
        ("bf16", ["sampler.precision=fp32"], "fp32"),
        ("bf16", ["sampler=ddim"], "fp32"),
        ("fp16", [], "fp32"),
        ("fp32", [], "fp32"),
        ("fp32", ["sampler.precision=bf16"], "bf16"),
    ],
)
def test_samples_are_drawn_in_bf16_where_the_machine_trains_in_it(trains_in, hand, drawn_in):
    plan = propose(DIGITS, replace(LAPTOP, precision=trains_in), HALF_HOUR, override_settings(hand))
    assert composed(plan, *hand).sampler.precision == drawn_in
    assert drawing_precision(trains_in, UserOverrides(override_settings(hand))) == drawn_in


def test_a_first_version_is_trained_in_the_time_that_the_gates_samples_would_take():
    first, further = (propose(DIGITS, LAPTOP, HALF_HOUR, compared=compared) for compared in (False, True))
    assert first.images > further.images
    assert first.seconds["scores"] < further.seconds["scores"]
    assert first.settings["evaluation.n"] == further.settings["evaluation.n"]
    assert first.total_s == pytest.approx(further.total_s, rel=0.01)


@pytest.mark.parametrize("budget_s", [200.0, HALF_HOUR])
def test_the_time_of_a_training_has_room_for_its_grids(budget_s):
    plan = propose(DIGITS, LAPTOP, budget_s)
    config, speed = composed(plan), LAPTOP.speeds[plan.network]
    drawn = (config.images // config.tracking.grid_every + 1) * config.tracking.grid_images
    evaluations = config.sampler.steps * 2
    steps_s = config.images / clock.training_rate(speed, LAPTOP, 2, config.batch_size)
    grids_s = drawn * evaluations / (speed.draw * clock.together(LAPTOP))
    assert plan.seconds["train"] == pytest.approx(steps_s + grids_s, rel=0.02)
    assert drawn >= 2 * 8


@pytest.mark.parametrize("kind", SOURCES)
def test_a_training_ends_when_what_comes_after_it_still_fits(kind):
    plan = propose(SOURCES[kind], LAPTOP, HALF_HOUR)
    before = sum(plan.seconds[stage] for stage in ("look and measure", "start", "ingest", "evaluator"))
    ends = before - CALIBRATION.stages.workers_s + plan.seconds["train"]  # the workers' start does not count
    assert clock.training_ends_s(plan) == pytest.approx(ends, rel=0.01)
    assert clock.training_ends_s(plan) + plan.seconds["scores"] + plan.seconds["register"] < HALF_HOUR


def test_more_real_images_take_longer_to_look_at():
    few, many = (propose(replace(DIGITS, images=count), LAPTOP, HALF_HOUR) for count in (10_000, 20_000))
    of_image = CALIBRATION.judging.encode_share * LAPTOP.judge_step_s["28"] / clock.JUDGE_BATCH
    more = 10_000 * of_image / (2 * clock.together(LAPTOP))
    assert many.seconds["scores"] - few.seconds["scores"] == pytest.approx(more, rel=0.01)


def test_images_that_take_long_to_write_are_planned_on_all_cores():
    one, four = (propose(PHOTOS, machine(cores=count), HALF_HOUR).seconds["ingest"] for count in (1, 4))
    assert PHOTOS.images * PHOTOS.write_s / 4 < four < one / 2


@pytest.mark.parametrize("budget_s", [1.0, 20.0, 45.0])
def test_a_budget_without_time_to_train_is_refused_with_the_least_that_is_enough(budget_s):
    with pytest.raises(ConfigError, match=r"leaves no time to train: .* give budget=\w+ or more") as refused:
        propose(DIGITS, LAPTOP, budget_s)
    from pipelines.plan.budget import parse_budget

    least = parse_budget(str(refused.value).split("give budget=")[1].split(" ")[0])
    assert propose(DIGITS, LAPTOP, least).total_s <= least


def test_a_short_training_is_said_to_be_one():
    plan = propose(DIGITS, LAPTOP, 210.0)
    assert any("are a short training" in text for text in plan.warnings)
    assert not any("are a short training" in text for text in propose(DIGITS, LAPTOP, 3600.0).warnings)


def test_few_images_are_warned_of_and_not_shown_for_ever():
    few = replace(UNLABELLED, images=220, test_images=20)
    plan = propose(few, GPU, 10 * 3600.0)
    assert any("memorises them" in text for text in plan.warnings)
    assert plan.images <= 1_000 * 200
    assert plan.total_s < 10 * 3600.0
    line = next(line for line in plan.lines if line.title == "length")
    assert "memorise them" in line.reason
    assert not any("memorises them" in text for text in propose(DIGITS, LAPTOP, HALF_HOUR).warnings)
    rare = propose(replace(PHOTOS, class_counts={"beach": 3_990, "forest": 10}), LAPTOP, HALF_HOUR)
    assert any(text.startswith("class forest has 10 images") for text in rare.warnings)


def test_too_few_test_images_for_the_gate_are_warned_of():
    few = replace(UNLABELLED, images=190, test_images=19)
    assert any(text.startswith("19 test images are too few") for text in propose(few, GPU, 3600.0).warnings)
    enough = replace(few, test_images=20)
    assert not any("test images are too few" in text for text in propose(enough, GPU, 3600.0).warnings)


@pytest.mark.parametrize(
    "mirror, flips",
    [(Mirror(0.5, 500), True), (Mirror(0.5, 40), False), (Mirror(0.6, 100), False), (Mirror(0.95, 500), False)],
)
def test_mirroring_needs_evidence_that_mirrored_images_look_alike(mirror, flips):
    assert composed(propose(replace(PHOTOS, mirror=mirror), LAPTOP, HALF_HOUR)).data.flip is flips


def test_sources_that_cannot_be_trained_or_scored_are_refused():
    with pytest.raises(ConfigError, match="each split needs at least two"):
        propose(replace(UNLABELLED, images=5, test_images=1), LAPTOP, HALF_HOUR)
    with pytest.raises(ConfigError, match="none of the 900 images that were opened can be read"):
        propose(replace(UNLABELLED, unreadable=900), LAPTOP, HALF_HOUR)
    with pytest.raises(ConfigError, match="no network could be measured"):
        propose(DIGITS, replace(LAPTOP, speeds={}), HALF_HOUR)


def test_runs_of_other_settings_are_other_datasets_and_the_same_model():
    small, large = (composed(propose(PHOTOS, facts, HALF_HOUR)) for facts in (LAPTOP, GPU))
    assert small.data.uri != large.data.uri
    assert small.registry.model == large.registry.model
    hour = composed(propose(PHOTOS, LAPTOP, 3600.0))
    assert (hour.name, hour.data.image_size == small.data.image_size) == (
        "my-photos-1h",
        hour.data.uri == small.data.uri,
    )


@pytest.mark.parametrize(
    "source, name",
    [
        ("/home/ada/photos", "photos"),
        ("/home/ada/photos/train", "photos"),
        ("/home/ada/photos/data/Images/", "photos"),
        ("/home/ada/photos/train.zip", "photos"),
        ("/home/ada/photos/metadata.csv", "photos"),
        ("/home/ada/photos/trains", "trains"),
        ("s3://birds/data", "birds"),
        ("/data", "data"),
        ("/data/train", "data"),
        ("s3://images", "images"),
        ("/home/été/train", "t"),
        ("/home/写真/train", "train"),
        ("/写真", "pictures"),
        ("digits", "digits"),
    ],
)
def test_a_folder_with_a_name_that_any_has_is_called_as_the_one_that_it_is_in(source, name):
    assert source_name(source) == name
    plan = propose(replace(PHOTOS, source=source), LAPTOP, HALF_HOUR)
    assert (plan.settings["name"], plan.settings["registry.model"]) == (f"{name}-30m", name)
    assert plan.settings["data.uri"].startswith(f"${{storage.root}}/datasets/{name}-")


def test_advice_on_more_time_says_what_it_would_train():
    plan = propose(PHOTOS, LAPTOP, HALF_HOUR)
    told = more_time(plan, PHOTOS, LAPTOP)
    assert told.startswith(f"this training saw {plan.images:,} images; budget=1h trains on ")
    slower = more_time(plan, PHOTOS, LAPTOP, trained=plan.images // 2)
    assert slower.startswith(f"this training saw {plan.images // 2:,} images; budget=1h trains on ")
    assert told.split("trains on ")[1] != slower.split("trains on ")[1]
    few = replace(UNLABELLED, images=220, test_images=20)
    assert more_time(propose(few, GPU, 7200.0), few, GPU).endswith("add images")
