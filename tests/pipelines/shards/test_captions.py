import numpy as np
import pytest
import torch

from pipelines.shards.captions import caption_width, read_captions
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.write import ingest
from pipelines.shards.read import opened_split
from pipelines.shards.source import ShardCorruptError
from pipelines.storage import Storage
from tests.pipelines.captioned import WIDTH, captions, embed, write_shapes
from tests.pipelines.evaluation.test_prompts import some_captions


def shapes(folder, encoder, *, extra=(), count=24):
    source = write_shapes(folder / "source", count, extra=extra)
    uri, options = f"file://{folder}/dataset", {"shard_samples": 10, "test_fraction": 0.3}
    return ingest(str(source), uri, Storage(), image_size=8, channels=3, text_encoder=encoder, **options).dataset


def read(dataset, folder, positions=None, split="train", **options):
    with opened_split(dataset, split, Storage(), str(folder / "cache"), 1) as reader:
        wanted = np.arange(dataset.samples(split)) if positions is None else np.array(positions)
        return read_captions(reader, wanted, **options)


def test_captions_come_with_the_embeddings_that_were_stored_in_the_order_that_is_asked_for(tmp_path):
    dataset = shapes(tmp_path, embed)
    everything = read(dataset, tmp_path)
    assert set(everything.texts) <= set(captions())
    some = read(dataset, tmp_path, [11, 2])
    assert some.texts == (everything.texts[11], everything.texts[2])
    assert some.positions.tolist() == [11, 2]
    cond, wanted = some.condition(torch.tensor([1, 0, 1]), labels=False), embed([some.texts[i] for i in (1, 0, 1)])
    torch.testing.assert_close(cond.pooled, wanted.pooled, rtol=1e-2, atol=1e-3)  # stored as float16
    torch.testing.assert_close(cond.text, wanted.text, rtol=1e-2, atol=1e-3)
    assert torch.equal(cond.text_mask, wanted.text_mask)


def test_equal_captions_are_one_text_and_empty_ones_are_left_out(tmp_path):
    dataset = shapes(tmp_path, embed, extra=["", "  "])
    found, all_of_them = read(dataset, tmp_path), read(dataset, tmp_path, empty=True)
    first, numbers = found.different
    assert len({found.texts[i] for i in first}) == len(first) == len(set(found.texts))
    assert [found.texts[first[number]] for number in numbers] == list(found.texts)
    assert all(text.strip() for text in found.texts)
    assert len(all_of_them) == dataset.samples("train") >= len(found)


def test_other_captions_or_another_encoder_have_another_digest(tmp_path):
    dataset = shapes(tmp_path, embed)
    other = shapes(tmp_path / "other", lambda texts: embed([text.upper() for text in texts]))
    found = read(dataset, tmp_path)
    assert found.digest == read(dataset, tmp_path).digest
    assert len({found.digest, read(dataset, tmp_path, [0]).digest, read(other, tmp_path / "other").digest}) == 3


def test_the_width_of_a_dataset_is_that_of_its_encoder_or_nothing(tmp_path):
    assert caption_width(shapes(tmp_path / "with", embed), "test", Storage()) == WIDTH
    without = shapes(tmp_path / "without", None)
    assert caption_width(without, "train", Storage()) is None
    with pytest.raises(ShardCorruptError, match=r"has no emb\.npy"):
        read(without, tmp_path / "without")


def test_embeddings_that_no_network_takes_are_refused(tmp_path):
    from dataclasses import replace

    pooled_only = shapes(tmp_path, lambda texts: replace(embed(texts), text=None, text_mask=None))
    with pytest.raises(DatasetError, match=r"widths 16 \(pooled\) and None \(text\).*ingest the data again"):
        caption_width(pooled_only, "train", Storage())


def test_the_first_of_shuffled_captions_are_of_all_classes_and_each_keeps_what_is_its_own():
    texts = [f"{word} {i}" for word in ("circle", "square", "star") for i in range(20)]
    split = some_captions(texts, labels=[i // 20 for i in range(60)])
    found = split.shuffled(3)
    assert set(found.labels[:16].tolist()) == {0, 1, 2}
    assert found.texts == split.shuffled(3).texts != split.shuffled(4).texts
    assert sorted(found.positions) == list(range(60))
    places = torch.from_numpy(found.positions)
    assert found.texts == tuple(texts[place] for place in found.positions)
    assert torch.equal(found.labels, split.labels[places])
    assert torch.equal(found.pooled, split.pooled[places])
    assert all(torch.equal(own, split.tokens[place]) for own, place in zip(found.tokens, found.positions, strict=True))
