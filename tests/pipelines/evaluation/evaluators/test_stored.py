import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pipelines.config import compose
from pipelines.evaluation.evaluators import stored
from pipelines.evaluation.evaluators.share import TrainShare
from pipelines.evaluation.evaluators.train import Trained, untrained
from pipelines.shards.index import DatasetError, read_dataset
from pipelines.storage import Storage
from tests.forked import FORKING

pytestmark = pytest.mark.usefixtures("home")  # whose key signs

EARLIER = Path(__file__).parents[3] / "fixtures" / "earlier" / "dataset"


@pytest.fixture
def dataset(labelled):
    return labelled


def trained(dataset, seed, kind="classifier"):
    torch.manual_seed(seed)
    total = dataset.samples("train")
    weights = save(dict(untrained(kind, dataset, dataset.image_size).state_dict()))
    return Trained(weights, TrainShare(dataset.digest, total, total // 2), 0.5 if kind == "classifier" else None)


def config(*overrides):
    return compose(["+experiment=digits", *overrides])


def find(kind, dataset, *overrides):
    return stored.find(kind, dataset, config(*overrides))


def store(kind, made, dataset):
    return stored.store(kind, made, dataset, config())


def record_of(dataset, kind="classifier"):
    return Path(dataset.uri.removeprefix("file://")) / "evaluator" / dataset.digest[:16] / kind / "evaluator.json"


def files(dataset):
    folder = f"{dataset.uri}/evaluator/{dataset.digest[:16]}/"
    return [entry.uri.removeprefix(folder) for entry in Storage().list(folder.rstrip("/"))]


def test_what_was_stored_is_found_with_its_record(dataset):
    assert find("classifier", dataset) is None
    kept = store("classifier", trained(dataset, 0), dataset)
    found = find("classifier", dataset)
    assert (found.digest, found.accuracy, found.share) == (kept.digest, 0.5, trained(dataset, 0).share)
    assert found.labels
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(found.encoder(images).features, kept.encoder(images).features)
    assert len(kept.digest) == 64


def test_kinds_lie_beside_one_another(dataset):
    one, other = (store(kind, trained(dataset, 0, kind), dataset) for kind in ("classifier", "contrastive"))
    assert one.digest != other.digest
    assert find("contrastive", dataset).digest == other.digest
    assert not other.labels
    assert [name for name in files(dataset) if name.endswith(".json")] == [
        "classifier/evaluator.json",
        "contrastive/evaluator.json",
    ]


def test_the_second_takes_the_first_ones_and_leaves_nothing(dataset):
    first, second = (store("classifier", trained(dataset, seed), dataset) for seed in (0, 1))
    assert second.digest == first.digest
    assert len(files(dataset)) == 2


def test_a_second_one_with_the_same_weights_leaves_them(dataset):
    first, second = (store("classifier", trained(dataset, 0), dataset) for _ in range(2))
    assert second.digest == first.digest
    assert find("classifier", dataset).digest == first.digest


def test_an_interrupted_one_counts_as_none(dataset):
    store("classifier", trained(dataset, 0), dataset)
    record_of(dataset).unlink()
    assert find("classifier", dataset) is None


def test_weights_that_are_not_those_of_the_record_are_refused(dataset):
    store("classifier", trained(dataset, 0), dataset)
    (weights,) = record_of(dataset).parent.glob("*.safetensors")
    weights.write_bytes(trained(dataset, 1).weights)
    with pytest.raises(DatasetError, match=r"not those that evaluator.json records; delete this folder"):
        find("classifier", dataset)


def unsigned(content):
    return json.loads(content)["record"].encode()


def of_another_accuracy(content):
    return content.replace(rb"\"test_accuracy\": 0.5", rb"\"test_accuracy\": 0.9")


@pytest.mark.parametrize(
    "edit, reason",
    [(unsigned, "it is damaged, or not signed"), (of_another_accuracy, "it was changed after it was signed")],
)
def test_one_that_nobody_who_is_trusted_has_signed_is_named_and_not_used(dataset, edit, reason):
    digest = store("classifier", trained(dataset, 0), dataset).digest
    record = record_of(dataset)
    before = record.read_bytes()
    record.write_bytes(edit(before))
    assert record.read_bytes() != before
    with pytest.raises(DatasetError, match=reason) as refused:
        find("classifier", dataset)
    believed = hashlib.sha256(record.read_bytes()).hexdigest()
    assert f"registry.trusted_evaluators=[{believed}]" in str(refused.value)
    assert digest[:12] in str(refused.value)
    assert find("classifier", dataset, f"registry.trusted_evaluators=[{believed}]").digest == digest
    with pytest.raises(DatasetError, match=reason):
        find("classifier", dataset, f"registry.trusted_evaluators=[{'0' * 64}]")


def test_the_signed_one_of_another_dataset_is_a_copy(dataset, tmp_path):
    store("classifier", trained(dataset, 0), dataset)
    other = replace(dataset, digest="f" * 64)
    record_of(other).parent.parent.mkdir()
    shutil.copytree(record_of(dataset).parent, record_of(other).parent)
    with pytest.raises(DatasetError, match=f"it is a copy of evaluator/{dataset.digest[:16]}/classifier"):
        find("classifier", other)


def test_one_of_an_earlier_release_is_found_where_it_is_named_and_was_trained_on_everything(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "earlier")
    dataset = read_dataset(f"file://{tmp_path}/earlier", Storage())
    path = next((EARLIER / "evaluator").glob("*/evaluator.json"))
    with pytest.raises(DatasetError, match="this evaluator decides every score, and is not believed"):
        find("classifier", dataset)
    believed = f"registry.trusted_evaluators=[{hashlib.sha256(path.read_bytes()).hexdigest()}]"
    found, record = find("classifier", dataset, believed), json.loads(path.read_text())
    assert (found.digest, found.accuracy) == (record["digest"], record["test_accuracy"])
    assert found.share.count == found.share.total == dataset.samples("train")
    assert found.share.reference(torch.arange(found.share.total)).all()
    assert find("contrastive", dataset) is None


def race(uri, seed, home, ready, answers):
    os.environ["DDPM_HOME"] = home  # the server that forks this process began before the test had its own
    dataset = read_dataset(uri, Storage())
    mine = trained(dataset, seed)
    ready.wait()
    answers.put((seed, store("classifier", mine, dataset).digest))


@pytest.mark.integration
def test_of_two_first_evaluations_at_once_one_wins_and_nothing_mixes(dataset, home):
    ready, answers = FORKING.Barrier(2), FORKING.Queue()
    racers = [FORKING.Process(target=race, args=(dataset.uri, seed, str(home), ready, answers)) for seed in (0, 1)]
    for racer in racers:
        racer.start()
    found = dict(answers.get(timeout=200) for _ in racers)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert found[0] == found[1] == find("classifier", dataset).digest
    assert len(files(dataset)) == 2
