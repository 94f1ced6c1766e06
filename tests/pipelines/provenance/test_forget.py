"""A picture is taken out: no training reads it again, and one that had begun refuses to go on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.checkpoints import ModelError, check_resumable, load_checkpoint, newest_checkpoint
from pipelines.config import compose
from pipelines.presentation.progress import Silent
from pipelines.provenance.find import Query
from pipelines.provenance.forget import forget
from pipelines.provenance.seen import look
from pipelines.provenance.trained import read_trainings
from pipelines.shards.audit.check import check
from pipelines.shards.audit.recorded import IN_THREADS
from pipelines.shards.joined import read_data
from pipelines.shards.quarantine import read_quarantine
from pipelines.storage import Storage
from tests.pipelines.provenance.logged import BATCH, config_of, given, train_logged
from tests.pipelines.shards.tars import picture
from tests.pipelines.shards.test_joined import write_source

STORAGE = Storage()


@pytest.fixture
def root(tmp_path, home):
    """Run "first" on 30 pictures, in 40 of 100 images."""
    (tmp_path / "datasets").mkdir()
    uri = write_source(tmp_path / "datasets/one", ["cat", "dog"], np.arange(30), splits=("train", "test"))
    (tmp_path / "first").mkdir()
    train_logged(tmp_path, run(tmp_path, uri, "first"), log=tmp_path / "first", stop_after=2)
    return tmp_path


def run(root, uri, name, *overrides):
    return config_of(root, 5, f"data.uri={uri}", f"name={name}", *overrides)


def seen(root, value):
    path = root / "sought.png"
    path.write_bytes(picture(value, mode="L"))
    return look(Query.parse(str(path), STORAGE), configured(root), lambda: IN_THREADS, near=False)


def configured(root):
    return compose(["+experiment=digits", "storage=file", f"storage.root=file://{root}", "tracking.uri=null"])


def forgotten(root, value, **options):
    return forget(seen(root, value), configured(root), Silent(), lambda: None, notice=lambda text: None, **options)


def everything_below(root, *, but=("cache", "sought.png")):
    return {
        str(path): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not any(name in path.parts for name in but)
    }


def test_a_picture_that_was_forgotten_is_never_read_again_and_a_training_that_had_begun_does_not_go_on(root):
    uri = f"file://{root}/datasets/one"
    done = forgotten(root, 7)
    assert done.quarantined == {uri: 2}
    assert {problem.kind for problem in read_quarantine(uri, STORAGE).excluded} == {"forgotten"}
    log = root / "second"
    log.mkdir()
    train_logged(root, run(root, uri, "second"), log=log)
    read = given(log)
    assert len(read) == 5 * BATCH
    assert set(read.values()) == set(range(30)) - {7}
    config = run(root, uri, "first")
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": f"file://{root}"})})
    dataset, quarantine = read_data(config.data, STORAGE)
    with pytest.raises(ModelError) as refused:
        check_resumable(newest_checkpoint(config), config, dataset, quarantine)
    assert "2 of its samples must stay out" in str(refused.value)
    assert "ddpm forget` says from which checkpoint" in str(refused.value)


def test_a_second_request_changes_nothing_and_a_dry_run_does_not_either(root):
    before = everything_below(root)
    told = forgotten(root, 7, dry_run=True)
    assert everything_below(root, but=("cache", "sought.png", "prints")) == before
    done = forgotten(root, 7)
    assert (told.quarantined, told.record.trainings) == (done.quarantined, done.record.trainings)
    after = everything_below(root)
    again = forgotten(root, 7)
    assert set(again.quarantined.values()) == {0}
    assert everything_below(root) == after


def test_a_picture_that_was_erased_is_in_no_object_and_what_was_trained_on_it_is_still_known(root):
    uri, gone = f"file://{root}/datasets/one", picture(7, mode="L")
    before = seen(root, 7)
    shown = forgotten(root, 7, erase_bytes=True, dry_run=True)
    assert any(gone in content for content in everything_below(root).values())
    done = forgotten(root, 7, erase_bytes=True)
    assert shown.erased == done.erased == {uri: 2}
    assert not [name for name, content in everything_below(root).items() if gone in content]
    assert any("shard caches of nodes" in line for line in done.lines())
    assert check(uri, STORAGE).problems == ()
    after = seen(root, 7)
    assert [match.erased for match in after.matches] == [True, True]
    assert [match.sha256 for match in after.matches] == [match.sha256 for match in before.matches]
    assert [each.occurrences for each in after.exposures] == [each.occurrences for each in before.exposures]
    assert ", which was erased" in "\n".join(after.lines())
    kept = everything_below(root)
    again = forgotten(root, 7, erase_bytes=True)
    assert again.erased == {uri: 0}
    assert everything_below(root) == kept
    config = run(root, uri, "first")
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": f"file://{root}"})})
    with pytest.raises(ModelError, match="must stay out"):
        check_resumable(newest_checkpoint(config), config, *read_data(config.data, STORAGE))


def test_the_record_names_what_was_given_the_picture_from_when_on_and_not_the_picture(root):
    done = forgotten(root, 7)
    log = given(root / "first")
    (path,) = (root / "forgotten").glob("*.json")
    said = json.loads(json.loads(path.read_text())["record"])
    first = min((n for n, value in log.items() if value == 7), default=None)
    assert list(said["trainings"].values()) == ([] if first is None else [first])
    assert "sought" not in path.read_text()
    (start,) = done.starts
    assert (start.run, start.model, start.images_seen, start.lost) == ("first", None, 0, 2 * BATCH)


def test_what_is_in_no_dataset_is_said_to_be_nowhere_and_nothing_is_recorded(root):
    done = forgotten(root, 200)
    assert (done.record, done.quarantined) == (None, {})
    assert not (root / "forgotten").exists()


@pytest.mark.parametrize("erase_bytes", [False, True])
def test_two_who_forget_it_and_train_on_from_the_checkpoint_that_is_named_have_the_same_weights(
    tmp_path, home, erase_bytes
):
    def cleaned(name: str) -> tuple[str, dict[str, Tensor]]:
        root = tmp_path / name
        (root / "datasets").mkdir(parents=True)
        uri = write_source(root / "datasets/one", ["cat", "dog"], np.arange(30), splits=("train", "test"))
        (root / "first").mkdir()
        often = run(root, uri, "first", f"checkpoint.every={BATCH}", "checkpoint.keep=9")
        train_logged(root, often, log=root / "first", stop_after=3)
        values = list(given(root / "first").values())
        late = next(value for value in values if value not in values[:BATCH])
        (start,) = forgotten(root, late, erase_bytes=erase_bytes).starts
        assert (start.images_seen, start.lost) == (BATCH, 2 * BATCH)
        (root / "clean").mkdir()
        train_logged(root, run(root, uri, "clean", f"init_from={start.model}"), log=root / "clean")
        assert late not in given(root / "clean").values()
        (last,) = (kept for kept in trainings(root)["clean"].kept if not kept.published)
        assert last.images_seen == 5 * BATCH
        return start.run, load_checkpoint(Path(last.address.removeprefix("file://")))[1]

    (run_of_one, one), (run_of_two, two) = cleaned("one"), cleaned("two")
    assert run_of_one == run_of_two == "first"
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def trainings(root):
    return {training.run: training for training in read_trainings(f"file://{root}", STORAGE)}
