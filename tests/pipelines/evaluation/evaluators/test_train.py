import numpy as np
import pytest
import torch
from safetensors.torch import load

from pipelines.evaluation.evaluators import classifier, stored, train
from pipelines.evaluation.evaluators import share as shares
from pipelines.evaluation.evaluators.train import Training, train_on_ray, untrained
from pipelines.evaluation.images import to_levels
from pipelines.shards.cache import ShardCache
from pipelines.shards.fetch import ShardFetcher
from pipelines.shards.read import ShardReader, read_split
from pipelines.storage import Storage


@pytest.fixture
def halves(monkeypatch):
    """Share out the few images of these tests as if they were many."""
    monkeypatch.setattr(shares, "ENOUGH", 2)


@pytest.fixture
def seen(monkeypatch):
    """Collect the images that a training is given, and the numbers of samples that are read at a time."""
    found = {"images": [], "read": []}
    for name in ("train_classifier", "train_contrastive"):
        whole = getattr(train, name)

        def short(images, *args, whole=whole, **settings):
            found["images"].append(images)
            return whole(images, *args, passes=1, **settings)

        monkeypatch.setattr(train, name, short)
    batch = ShardReader.batch

    def counted(self, located):
        found["read"].append(len(located.shards))
        return batch(self, located)

    monkeypatch.setattr(ShardReader, "batch", counted)
    return found


def split(dataset, name, folder):
    fetcher = ShardFetcher(dataset.uri, Storage(), ShardCache(folder / "other", 2**30))
    try:
        return read_split(ShardReader(dataset, name, fetcher))
    finally:
        fetcher.close()


def test_it_is_trained_on_its_share_alone_and_judged_by_the_test_split(labelled, config, halves, seen, tmp_path):
    trained = Training("classifier", labelled, config())()
    images = to_levels(split(labelled, "train", tmp_path).images)
    assert trained.share.count == len(images) // 2
    assert torch.equal(seen["images"][0], images[trained.share.trained(torch.arange(len(images)))])
    network = untrained("classifier", labelled, 8)
    network.load_state_dict(load(trained.weights))
    test = split(labelled, "test", tmp_path)
    predicted = network(to_levels(test.images)).probabilities.argmax(1)
    assert trained.accuracy == (predicted == test.labels).double().mean().item()


def test_memory_is_bounded_whatever_the_size_of_the_dataset(labelled, config, halves, seen, monkeypatch):
    monkeypatch.setattr(shares, "MAX_IMAGES", 9)
    monkeypatch.setattr(train, "READ_BYTES", 5 * 8 * 8 * 4 + 1)
    trained = Training("classifier", labelled, config())()
    assert len(seen["images"][0]) == trained.share.count == 9
    assert max(seen["read"]) <= 5


def test_large_images_are_reduced_once_and_at_every_judgement(labelled, config, seen, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "MAX_SIDE", 6)
    trained = Training("classifier", labelled, config())()
    images = to_levels(split(labelled, "train", tmp_path).images)
    assert seen["images"][0].shape[1:] == (1, 6, 6)
    found = stored.store("classifier", trained, labelled, config())
    assert found.preparation.startswith("reduced to 6 pixels")
    assert torch.equal(found.encoder(images).features, found.encoder(seen["images"][0]).features)
    again = stored.find("classifier", labelled, config())
    assert torch.equal(again.encoder(images).features, found.encoder(images).features)


def test_data_without_labels_train_a_network_without_classes(unlabelled, config, seen):
    trained = Training("contrastive", unlabelled, config())()
    assert trained.accuracy is None
    assert seen["images"][0].dtype == torch.uint8
    assert trained.share.count == unlabelled.samples("train")


def test_it_is_the_same_every_time_and_leaves_the_threads_of_the_process_alone(labelled, config, seen):
    before = torch.get_num_threads()
    one, other = (Training("classifier", labelled, config())() for _ in range(2))
    assert one.weights == other.weights
    assert torch.get_num_threads() == before


def test_levels_are_those_that_the_shards_hold(labelled, tmp_path):
    images = split(labelled, "train", tmp_path).images
    assert np.array_equal(to_levels(images).float() / 127.5 - 1, images)


@pytest.mark.integration
def test_a_ray_task_trains_the_same_network(labelled, config):
    import ray

    training = Training("classifier", labelled, config())
    here = training()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        assert train_on_ray(training, use_gpu=False) == here
    finally:
        ray.shutdown()
