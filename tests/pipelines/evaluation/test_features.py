import torch

from pipelines.evaluation.features import EvaluatorNetwork, extract, train_evaluator


def bars(n):
    """Two classes that differ by the direction of a bright bar, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = -1 + 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    images[labels == 0, :, 3:5] += 1.5
    images[labels == 1, :, :, 3:5] += 1.5
    return images.clamp(-1, 1), labels


def test_it_learns_its_classes_the_same_way_every_time():
    images, labels = bars(256)
    network = train_evaluator(images[:192], labels[:192], 2, passes=4)
    found = extract(network, images[192:], batch_size=10)
    assert (found.predicted == labels[192:]).float().mean() > 0.95
    assert found.features.shape == (64, 64)
    again = train_evaluator(images[:192], labels[:192], 2, passes=4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_it_takes_images_of_any_size():
    for size in (4, 8, 28, 64):
        features, logits = EvaluatorNetwork(3, size, 5)(torch.zeros(2, 3, size, size))
        assert (features.shape, logits.shape) == ((2, 64), (2, 5))
