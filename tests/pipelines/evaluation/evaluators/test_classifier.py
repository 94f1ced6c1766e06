import pickle

import torch

from pipelines.evaluation.evaluators.classifier import Classifier, reduced, reduced_size, train_classifier
from tests.pipelines.evaluation.evaluators.bars import bars


def test_it_learns_its_classes_the_same_way_every_time():
    images, labels = bars(160)
    network = train_classifier(images[:128], labels[:128], 2, seed=0, passes=6)
    found = network(images[128:])
    assert (found.probabilities.argmax(1) == labels[128:]).float().mean() > 0.95
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(32))
    assert found.features.shape == (32, network.width)
    again = train_classifier(images[:128], labels[:128], 2, seed=0, passes=6)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    other = train_classifier(images[:128], labels[:128], 2, seed=1, passes=1)
    assert not torch.equal(network.to_logits.weight, other.to_logits.weight)


def test_it_takes_images_of_any_size_and_any_number_of_them():
    for size in (4, 8, 28, 64):
        found = Classifier(3, size, 5)(torch.zeros(2, 3, size, size, dtype=torch.uint8))
        assert (found.features.shape, found.probabilities.shape) == ((2, 64), (2, 5))
    many = Classifier(1, 4, 5)(torch.zeros(600, 1, 4, 4, dtype=torch.uint8))
    assert many.features.shape == (600, 64)


def test_it_looks_at_images_that_are_not_square_in_their_proportions():
    assert [reduced_size(size) for size in (28, 64, 256, (48, 64), (96, 128), (512, 128))] == [
        28,
        64,
        64,
        (48, 64),
        (48, 64),
        (64, 16),
    ]
    images = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8)
    network = Classifier(3, reduced_size((96, 128)), 5)
    found = network(images)
    assert (found.features.shape, found.probabilities.shape) == ((3, 64), (3, 5))
    assert torch.equal(found.features, network(reduced(images, (48, 64))).features)
    turned, labels = bars(96)
    wide = torch.cat([turned, turned], dim=3)
    learnt = train_classifier(wide, labels, 2, seed=0, passes=6)
    assert (learnt(wide).probabilities.argmax(1) == labels).float().mean() > 0.95


def test_it_travels_to_a_task():
    images, _ = bars(8)
    network = Classifier(1, 8, 2).eval()
    assert torch.equal(pickle.loads(pickle.dumps(network))(images).features, network(images).features)
