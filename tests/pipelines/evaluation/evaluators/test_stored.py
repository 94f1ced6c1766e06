import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pipelines.evaluation.evaluators.share import Share
from pipelines.evaluation.evaluators.stored import find, store
from pipelines.evaluation.evaluators.train import Trained, untrained
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.storage import Storage
from tests.forked import FORKING

EARLIER = Path(__file__).parents[3] / "fixtures" / "earlier" / "dataset"


@pytest.fixture
def dataset(labelled):
    return labelled


def trained(dataset, seed, kind="classifier"):
    torch.manual_seed(seed)
    total = dataset.samples("train")
    weights = save(dict(untrained(kind, dataset, dataset.image_size).state_dict()))
    return Trained(weights, Share(dataset.digest, total, total // 2), 0.5 if kind == "classifier" else None)


def files(dataset):
    folder = f"{dataset.uri}/evaluator/{dataset.digest[:16]}/"
    return [entry.uri.removeprefix(folder) for entry in Storage().list(folder.rstrip("/"))]


def test_what_was_stored_is_found_with_its_record(dataset):
    assert find("classifier", dataset, Storage()) is None
    stored = store("classifier", trained(dataset, 0), dataset, Storage())
    found = find("classifier", dataset, Storage())
    assert (found.digest, found.accuracy, found.share) == (stored.digest, 0.5, trained(dataset, 0).share)
    assert found.labels
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(found.encoder(images).features, stored.encoder(images).features)
    assert len(stored.digest) == 64


def test_kinds_lie_beside_one_another(dataset):
    one, other = (store(kind, trained(dataset, 0, kind), dataset, Storage()) for kind in ("classifier", "contrastive"))
    assert one.digest != other.digest
    assert find("contrastive", dataset, Storage()).digest == other.digest
    assert not other.labels
    assert [name for name in files(dataset) if name.endswith(".json")] == [
        "classifier/evaluator.json",
        "contrastive/evaluator.json",
    ]


def test_the_second_takes_the_first_ones_and_leaves_nothing(dataset):
    first, second = (store("classifier", trained(dataset, seed), dataset, Storage()) for seed in (0, 1))
    assert second.digest == first.digest
    assert len(files(dataset)) == 2


def test_a_second_one_with_the_same_weights_leaves_them(dataset):
    first, second = (store("classifier", trained(dataset, 0), dataset, Storage()) for _ in range(2))
    assert second.digest == first.digest
    assert find("classifier", dataset, Storage()).digest == first.digest


def test_an_interrupted_one_counts_as_none(dataset):
    store("classifier", trained(dataset, 0), dataset, Storage())
    record = Path(dataset.uri.removeprefix("file://")) / "evaluator" / dataset.digest[:16] / "classifier/evaluator.json"
    record.unlink()
    assert find("classifier", dataset, Storage()) is None


def test_weights_that_are_not_those_of_the_record_are_refused(dataset):
    store("classifier", trained(dataset, 0), dataset, Storage())
    folder = Path(dataset.uri.removeprefix("file://")) / "evaluator" / dataset.digest[:16] / "classifier"
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(trained(dataset, 1).weights)
    with pytest.raises(DatasetError, match=r"not those that evaluator.json records; delete this folder"):
        find("classifier", dataset, Storage())


def test_one_of_an_earlier_release_is_found_and_was_trained_on_everything(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "earlier")
    dataset = read_dataset(f"file://{tmp_path}/earlier", Storage())
    found = find("classifier", dataset, Storage())
    record = json.loads(next((EARLIER / "evaluator").glob("*/evaluator.json")).read_text())
    assert (found.digest, found.accuracy) == (record["digest"], record["test_accuracy"])
    assert found.share.count == found.share.total == dataset.samples("train")
    assert found.share.reference(torch.arange(found.share.total)).all()
    assert find("contrastive", dataset, Storage()) is None


def race(uri, seed, ready, answers):
    dataset = read_dataset(uri, Storage())
    mine = trained(dataset, seed)
    ready.wait()
    answers.put((seed, store("classifier", mine, dataset, Storage()).digest))


@pytest.mark.integration
def test_of_two_first_evaluations_at_once_one_wins_and_nothing_mixes(dataset):
    ready, answers = FORKING.Barrier(2), FORKING.Queue()
    racers = [FORKING.Process(target=race, args=(dataset.uri, seed, ready, answers)) for seed in (0, 1)]
    for racer in racers:
        racer.start()
    found = dict(answers.get(timeout=200) for _ in racers)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert found[0] == found[1] == find("classifier", dataset, Storage()).digest
    assert len(files(dataset)) == 2
