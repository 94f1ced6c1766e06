import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ddpm.quality import FeatureMoments, frechet_distance
from pipelines.evaluation.evaluators.contrastive import nt_xent, train_contrastive, view
from tests.pipelines.evaluation.evaluators.bars import bars


def test_the_loss_is_that_of_finding_the_partner_among_all_others():
    # Orthogonal images: the partner has similarity 1, the 2N - 2 others 0.
    one = 5 * torch.eye(4)
    wanted = -math.log(math.exp(2) / (math.exp(2) + 6))
    assert nt_xent(one, 3 * one, 0.5).item() == pytest.approx(wanted, rel=1e-6)
    assert nt_xent(one, one.roll(1, 0), 0.5) > nt_xent(one, one, 0.5)


def test_views_are_of_the_same_images_and_differ():
    images = bars(40)[0].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    one, other = view(images, generator), view(images, generator)
    assert one.shape == images.shape
    assert not torch.allclose(one, other)
    distance = torch.cdist(one.flatten(1), other.flatten(1))
    directions = torch.arange(40) % 2
    alike = directions[distance.argmin(1)] == directions
    assert alike.float().mean() > 0.9


def test_it_learns_without_labels_the_same_way_every_time():
    images, labels = bars(128)
    network = train_contrastive(images, seed=0, passes=10)
    features = F.normalize(network(images).features, dim=1)
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    assert (labels[nearest] == labels).float().mean() > 0.95
    assert network(images).probabilities is None
    again = train_contrastive(images, seed=0, passes=10)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_it_knows_digits_and_orders_what_is_wrong_with_them():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels, order = torch.from_numpy(digits.target), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    mine, reference, test = order[:719], order[719:1438], order[1438:]
    network = train_contrastive(images[mine], seed=0)
    known, asked = (F.normalize(network(images[part]).features, dim=1) for part in (mine, test))
    nearest = (asked @ known.T).topk(5, 1).indices
    assert (labels[mine][nearest].mode(1).values == labels[test]).float().mean() >= 0.95

    moments = FeatureMoments.of(network(images[reference]).features)

    def distance(changed):
        return frechet_distance(moments, FeatureMoments.of(network(changed).features))

    real, noise = images[test], torch.randn(359, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    blurred = F.avg_pool2d(F.pad(real.float(), (1, 1, 1, 1), mode="replicate"), 3, 1).round().to(torch.uint8)
    noisy = (real.float() + 40 * noise).clamp(0, 255).to(torch.uint8)
    less = real[(labels[test] != 3) & (labels[test] != 5)]
    only_noise = (127.5 * (noise.clamp(-1, 1) + 1)).to(torch.uint8)
    floor = distance(real)
    for worse in (blurred, noisy, less):
        assert 1.3 * floor < distance(worse) < distance(only_noise)
