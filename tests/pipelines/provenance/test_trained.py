"""What a training was given is known without a log of it: compared with a log of real trainings."""

import numpy as np
import pytest

from ddpm.noise import uniform
from pipelines.provenance.find import Match
from pipelines.provenance.trained import UnknownOrderError, read_trainings, times_before
from pipelines.shards.index import read_dataset
from pipelines.shards.quarantine import Problem, make_quarantine, store_quarantine
from pipelines.storage import Storage
from tests.forked import start_ranks
from tests.pipelines.provenance.logged import BATCH, a_rank, config_of, given, given_at, train_logged, until_killed
from tests.pipelines.shards.test_joined import write_source

STORAGE = Storage()
PER_SHARD = 4


def source(folder, count, first=0):
    return write_source(folder, ["cat", "dog"], np.arange(first, first + count), splits=("train", "test"))


def match(uri, number, split="train"):
    shard = f"{split}-{number // PER_SHARD * PER_SHARD:06d}.tar"
    return Match(uri, split, shard, number % PER_SHARD, f"{number:04d}", "file")


def quarantined(uri, *numbers):
    dataset = read_dataset(uri, STORAGE)
    problems = [
        Problem(found.shard, found.index, found.key, "decode", "for a test")
        for found in (match(uri, number) for number in numbers)
    ]
    store_quarantine(make_quarantine(dataset, problems), uri, STORAGE)


def ordinals_of(training, matches):
    found = training.occurrences(matches, STORAGE)
    return [[each.ordinal for each in found if each.sample == at] for at in range(len(matches))]


def as_logged(log, value):
    return sorted(ordinal for ordinal, there in log.items() if there == value)


def test_every_time_that_three_workers_that_were_killed_twice_were_given_a_sample_is_known(tmp_path):
    uri = source(tmp_path / "data", 46)
    quarantined(uri, 5, 6, 17)
    root = tmp_path / "root"
    config = config_of(root, 40, f"data.uri={uri}", f"checkpoint.every={2 * BATCH}")
    root.mkdir()
    for at, steps in enumerate((9, 20)):
        until_killed(3, tmp_path / f"rendezvous-{at}", root, config, steps)
    start_ranks(a_rank, (3, tmp_path / "rendezvous", root, config, None), 3)
    log = given(root)
    assert sorted(log) == list(range(40 * BATCH))
    (training,) = read_trainings(f"file://{root}", STORAGE)
    assert training.images_seen == 40 * BATCH
    matches = [match(uri, number) for number in range(46)]
    assert ordinals_of(training, matches) == [as_logged(log, number) for number in range(46)]
    assert ordinals_of(training, [match(uri, 5), match(uri, 6, "test")]) == [[], []]
    found = training.occurrences(matches[:1], STORAGE)
    assert times_before(found, 0) == 0
    assert times_before(found, training.images_seen) == len(as_logged(log, 0)) > 3


def test_a_mixture_says_of_which_source_a_sample_was_given_when(tmp_path):
    one, other = source(tmp_path / "one", 30), source(tmp_path / "other", 18, first=100)
    quarantined(other, 3)
    root = tmp_path / "root"
    root.mkdir()
    sources = f"data.sources=[{{name:one,uri:'{one}',weight:0.7}},{{name:other,uri:'{other}',weight:1.5}}]"
    config = config_of(root, 8, f"data.uri={one}", sources)
    train_logged(root, config)
    log = given(root)
    (training,) = read_trainings(f"file://{root}", STORAGE)
    assert training.data == [one, other]
    matches = [match(one, 7), match(other, 0), match(other, 3), match(other, 17)]
    assert ordinals_of(training, matches) == [as_logged(log, value) for value in (7, 100, 103, 117)]
    assert {each.source for each in training.occurrences(matches[1:], STORAGE)} == {"other"}


def test_flips_and_dropped_labels_are_those_that_the_training_drew(tmp_path, monkeypatch):
    from pipelines.training.loop import losses as loop

    uri, root, drawn = source(tmp_path / "data", 20), tmp_path / "root", {}
    config = config_of(root, 4, f"data.uri={uri}")
    root.mkdir()

    def spied(seed, n, purpose):
        found = uniform(seed, n, purpose)
        drawn.setdefault(purpose.name, {}).update(zip(n.tolist(), found[:, 0].tolist(), strict=True))
        return found

    monkeypatch.setattr(loop, "uniform", spied)
    train_logged(root, config)
    (training,) = read_trainings(f"file://{root}", STORAGE)
    for each in training.occurrences([match(uri, number) for number in range(20)], STORAGE):
        assert each.mirrored == (drawn["FLIP"][each.ordinal] < 0.5)
        assert each.label_dropped == (drawn["LABEL_DROP"][each.ordinal] < 0.3)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (["objective.timesteps=uniform"], True),
        (["objective.timesteps=stratified", "schedule=cosine"], True),
        (["objective.timesteps=log_normal", "objective.log_normal_p_mean=-0.5"], True),
        (["objective.timesteps=importance"], False),
    ],
)
def test_the_timestep_is_that_of_the_training_where_it_does_not_depend_on_losses(tmp_path, settings, known):
    uri, root = source(tmp_path / "data", 20), tmp_path / "root"
    root.mkdir()
    train_logged(root, config_of(root, 6, f"data.uri={uri}", *settings))
    (training,) = read_trainings(f"file://{root}", STORAGE)
    found = training.occurrences([match(uri, number) for number in range(20)], STORAGE)
    logged = {ordinal: t if known else None for ordinal, (_, t) in given_at(root).items()}
    assert {each.ordinal: each.timestep for each in found} == logged


def test_an_earlier_quarantine_is_still_known_and_a_dataset_that_was_written_again_is_said_to_be_another(tmp_path):
    uri, root = source(tmp_path / "data", 20), tmp_path / "root"
    root.mkdir()
    train_logged(root, config_of(root, 3, f"data.uri={uri}"))
    log = given(root)
    quarantined(uri, 2)  # after the training
    (training,) = read_trainings(f"file://{root}", STORAGE)
    assert ordinals_of(training, [match(uri, 2)]) == [as_logged(log, 2)]
    (tmp_path / "data").rename(tmp_path / "moved")
    source(tmp_path / "data", 24)
    with pytest.raises(UnknownOrderError, match="written again"):
        training.occurrences([match(uri, 2)], STORAGE)
