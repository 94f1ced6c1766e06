import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pipelines.evaluation.evaluators import open_matcher
from pipelines.evaluation.evaluators.matcher import Matcher, choices, clip_loss, matched, train_matcher
from pipelines.shards.ingest.write import ingest
from pipelines.signing import said as said_by
from pipelines.storage import Storage
from tests.pipelines.captioned import embed, write_shapes
from tests.pipelines.evaluation.evaluators.bars import bars

COLD = torch.tensor(math.log(0.5))


def test_the_loss_is_that_of_finding_ones_text_and_ones_image_among_those_of_the_batch():
    vectors, texts = torch.eye(4), torch.eye(4)
    wanted = -math.log(math.exp(2) / (math.exp(2) + 3))
    assert clip_loss(vectors, vectors, texts, COLD).item() == pytest.approx(wanted, rel=1e-4)
    skewed = F.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    both = [F.cross_entropy(each / 0.5, torch.arange(4)).item() for each in (skewed @ vectors.T, vectors @ skewed.T)]
    assert clip_loss(skewed, vectors, texts, COLD).item() == pytest.approx(sum(both) / 2, rel=1e-4)


def test_images_with_the_same_caption_do_not_compete():
    one = torch.eye(4)[:1].expand(3, -1)
    assert clip_loss(one, one, one, COLD).item() == pytest.approx(0, abs=1e-5)


def test_the_temperature_does_not_fall_below_a_hundredth():
    vectors = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    lowest, below = (clip_loss(vectors, vectors, torch.eye(6), torch.tensor(math.log(t))) for t in (0.01, 0.001))
    assert torch.equal(lowest, below)


def test_who_guesses_matches_one_in_ten_who_knows_all_and_who_answers_always_alike_none():
    generator = torch.Generator().manual_seed(1)
    texts = F.normalize(torch.randn(40, 64, generator=generator), dim=1)
    own = torch.arange(4000) % 40
    assert matched(texts[own], own, texts, seed=0).all()
    guesses = F.normalize(torch.randn(4000, 64, generator=generator), dim=1)
    assert matched(guesses, own, texts, seed=0).double().mean() == pytest.approx(1 / choices(40), abs=0.02)
    assert choices(40) == 10
    assert choices(3) == 3
    constant = texts[:1].expand(4000, -1)
    assert not matched(constant, own, texts[:1].expand(40, -1), seed=0).any()
    assert torch.equal(matched(guesses, own, texts, seed=3), matched(guesses, own, texts, seed=3))
    assert not torch.equal(matched(guesses, own, texts, seed=3), matched(guesses, own, texts, seed=4))


def test_it_learns_what_captions_say_of_images_the_same_way_every_time():
    images, labels = bars(128)
    pooled = embed(["a bar that lies", "one that stands"]).pooled
    network = train_matcher(images, pooled[labels], seed=0, passes=20)
    fresh, asked = bars(64)
    scores = network(fresh).features @ network.texts(pooled).T
    assert (scores.argmax(1) == asked).float().mean() > 0.95
    again = train_matcher(images, pooled[labels], seed=0, passes=20)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_it_is_trained_once_for_a_dataset_and_stored_beside_the_other_evaluators(config, tmp_path):
    source = write_shapes(tmp_path / "shapes", 240)
    uri, options = f"file://{tmp_path}/captioned", {"shard_samples": 64, "test_fraction": 0.25}
    dataset = ingest(str(source), uri, Storage(), image_size=8, channels=3, text_encoder=embed, **options).dataset
    said = []
    found = open_matcher(config(), dataset, said.append)
    assert said == ["training the evaluator (captions) on real images, once for this dataset"]
    assert found.kind == "captions"
    assert isinstance(found.encoder, Matcher)
    assert found.accuracy > 0.8  # of six captions
    assert not found.labels
    again = open_matcher(config(), dataset, said.append)
    assert (again.digest, again.accuracy, len(said)) == (found.digest, found.accuracy, 1)
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(again.encoder(pixels).features, found.encoder(pixels).features)
    stored = tmp_path / "captioned" / "evaluator" / dataset.digest[:16] / "captions" / "evaluator.json"
    assert said_by(stored.read_bytes())["text_dim"] == embed(["a"]).pooled.shape[1]
