"""Several datasets as one: shards in one numbering, labels in one space, and what is left out of each."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from pipelines.config import compose
from pipelines.shards.index import DatasetError, ShardIndex, ShardInfo, index_tar, make_dataset, read_dataset
from pipelines.shards.joined import parts_of, read_data
from pipelines.shards.quarantine import Problem, make_quarantine, stream_digest
from pipelines.shards.source import ShardCorruptError
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.storage import Storage, layout
from tests.pipelines.shards.tars import picture, write_shard


def write_source(folder, classes, values, *, splits=("train",), shard_samples=4, size=8, channels=1):
    """Write a dataset of pictures that all have one value, with labels 0, 1, ... in turn, and return its address."""
    folder.mkdir()
    found = {}
    for split in splits:
        shards = []
        for first in range(0, len(values), shard_samples):
            name, entries = f"{split}-{first:06d}.tar", []
            for i, value in enumerate(map(int, values[first : first + shard_samples]), first):
                entries.append((f"{i:04d}.png", picture(value, mode="L" if channels == 1 else "RGB")))
                entries += [(f"{i:04d}.cls", str(i % len(classes)).encode())] if classes else []
            write_shard(folder / name, entries)
            index: ShardIndex = index_tar(folder / name)
            (folder / layout.index_name(name)).write_text(index.to_json())
            data = (folder / name).read_bytes()
            shards.append(ShardInfo(name, len(index), len(data), hashlib.sha256(data).hexdigest()))
        found[split] = tuple(shards)
    dataset = make_dataset(
        f"file://{folder}",
        splits=found,
        classes=tuple(classes),
        channels=channels,
        image_size=size,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    (folder / "dataset.json").write_text(dataset.to_json())
    return dataset.uri


def mixed(sources, *overrides, **data):
    """The data section of a mixture; sources are (name, uri, weight)."""
    listed = [{"name": name, "uri": uri, "weight": weight} for name, uri, weight in sources]
    plain = compose(["+experiment=digits", *overrides]).model_dump(mode="json")["data"]
    given = {"uri": sources[0][1], "image_size": 8, "channels": 1, "num_classes": 2, **data}
    return type(compose(["+experiment=digits"]).data).model_validate({**plain, **given, "sources": listed})


def settings(tmp_path, **changes):
    plain = {"lanes": 2, "window": 2, "seed": 0, "cache_dir": tmp_path / "cache", "cache_bytes": 10**8}
    return StreamSettings(**{**plain, **changes})


@pytest.fixture
def two(tmp_path):
    """Cats and dogs; dogs and eels under another number."""
    first = write_source(tmp_path / "a", ["cat", "dog"], range(12), splits=("train", "test"))
    second = write_source(tmp_path / "b", ["eel", "dog"], range(100, 120))
    return first, second


def test_labels_of_all_sources_are_in_one_space_by_the_names_of_classes(two, tmp_path):
    dataset, quarantine = read_data(mixed([("a", two[0], 1), ("b", two[1], 3)]), Storage())
    assert dataset.classes == ("cat", "dog", "eel")
    assert quarantine is None
    reader, order = open_stream(dataset, "train", Storage(), settings(tmp_path), quarantine)
    batch = reader.batch(order.batch(0, 40))
    assert batch.sources.bincount().tolist() == [10, 30]
    values = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
    own = torch.where(values < 100, values % 2, torch.tensor([2, 1])[values % 2])
    assert batch.labels.tolist() == own.tolist()
    assert batch.sources.tolist() == (values >= 100).long().tolist()
    reader.close()


def test_a_source_without_labels_has_the_label_of_none(two, tmp_path):
    plain = write_source(tmp_path / "c", [], range(200, 210))
    dataset, _ = read_data(mixed([("a", two[0], 1), ("c", plain, 1)]), Storage())
    reader, order = open_stream(dataset, "train", Storage(), settings(tmp_path))
    batch = reader.batch(order.batch(0, 20))
    assert set(batch.labels[batch.sources == 1].tolist()) == {-1}
    assert set(batch.labels[batch.sources == 0].tolist()) == {0, 1}
    reader.close()


@pytest.mark.parametrize("memory", [0, 10**6])
def test_every_source_gives_each_of_its_samples_once_an_epoch_to_any_number_of_ranks(two, tmp_path, memory):
    dataset, _ = read_data(mixed([("a", two[0], 1), ("b", two[1], 1)]), Storage())
    for world in (1, 3):
        seen = []
        for rank in range(world):
            reader, order = open_stream(dataset, "train", Storage(), settings(tmp_path, memory_bytes=memory))
            stream = TrainingStream(reader, order, batch_size=8, rank=rank, world_size=world, stop=24)
            seen += [value for batch in stream for value in (batch.images[:, 0, 0, 0] * 127.5 + 127.5).tolist()]
            reader.close()
        found = sorted(round(value) for value in seen)
        assert found[:12] == list(range(12))  # one epoch of the first source
        assert len(set(found[12:])) == 12  # a part of the second one's first epoch


def test_a_quarantined_sample_of_a_source_is_left_out_of_the_mixture(two, tmp_path):
    storage, dataset = Storage(), read_dataset(two[1], Storage())
    problem = Problem("train-000000.tar", 1, "0001", "decode", "")
    (tmp_path / "b" / layout.QUARANTINE).write_text(make_quarantine(dataset, [problem]).to_json())
    data = mixed([("a", two[0], 1), ("b", two[1], 1)])
    joined, quarantine = read_data(data, storage)
    assert [p.shard for p in quarantine.excluded] == ["b:train-000000.tar"]
    reader, order = open_stream(joined, "train", storage, settings(tmp_path), quarantine)
    batch = reader.batch(order.batch(0, 80))
    values = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
    assert 101 not in values
    assert {100, 102} <= set(values)
    reader.close()


def test_the_test_split_is_that_of_the_dataset_that_judges(two, tmp_path):
    dataset, _ = read_data(mixed([("b", two[1], 1), ("a", two[0], 1)], uri=two[0]), Storage())
    assert dataset.classes[:2] == ("cat", "dog")  # its labels stay what they are
    reader, _ = open_stream(dataset, "test", Storage(), settings(tmp_path))
    batch = reader.at(np.arange(12))
    assert batch.labels.tolist() == [0, 1] * 6
    assert batch.sources is None
    reader.close()


def test_the_digest_is_that_of_all_sources_and_of_what_is_left_out_of_each(two, tmp_path):
    storage = Storage()

    def digest(*sources, **data):
        return stream_digest(*read_data(mixed(sources, **data), storage))

    a, b = ("a", two[0], 1), ("b", two[1], 1)
    base = digest(a, b)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "b", moved)
    assert digest(a, ("b", f"file://{moved}", 2)) == base  # weights are settings of the run, and addresses nothing
    assert len({base, digest(b, a), digest(a), digest(a, ("c", two[1], 1)), digest(b, a, uri=two[0])}) == 5
    dataset = read_dataset(two[1], storage)
    problem = Problem("train-000004.tar", None, None, "bytes", "")
    (tmp_path / "b" / layout.QUARANTINE).write_text(make_quarantine(dataset, [problem]).to_json())
    (moved / layout.QUARANTINE).write_text((tmp_path / "b" / layout.QUARANTINE).read_text())
    assert digest(a, b) != base
    assert digest(a, b) == digest(a, ("b", f"file://{moved}", 1))


def test_a_dataset_alone_is_read_as_before(two):
    data = mixed([("a", two[0], 1)]).model_copy(update={"sources": ()})
    dataset, quarantine = read_data(data, Storage())
    assert (dataset, quarantine) == (read_dataset(two[0], Storage()), None)
    assert parts_of(dataset) == [dataset]
    assert "source" not in json.loads(dataset.to_json())["splits"]["train"][0]


def test_a_sample_that_is_wrong_is_named_with_its_own_dataset(two, tmp_path):
    folder = tmp_path / "b"
    write_shard(folder / "bad.tar", [("x.png", picture(1, mode="L")), ("x.cls", b"7")])
    index = index_tar(folder / "bad.tar")
    (folder / "bad.index.json").write_text(index.to_json())
    data = (folder / "bad.tar").read_bytes()
    old = read_dataset(two[1], Storage())
    content = {name: getattr(old, name) for name in ("classes", "channels", "image_size", "mean", "std")}
    shard = ShardInfo("bad.tar", 1, len(data), hashlib.sha256(data).hexdigest())
    bad = make_dataset(old.uri, splits={"train": (shard,)}, **content)
    (folder / "dataset.json").write_text(bad.to_json())
    dataset, _ = read_data(mixed([("a", two[0], 1), ("b", two[1], 1)]), Storage())
    reader, order = open_stream(dataset, "train", Storage(), settings(tmp_path))
    with pytest.raises(
        ShardCorruptError, match=rf"{two[1]}: sample x of b:bad.tar has the label 7, .*2 classes; .*{two[1]}`"
    ):
        reader.batch(order.batch(0, 4))
    reader.close()


def test_sources_that_do_not_fit_together_are_refused_by_name(two, tmp_path):
    a = ("a", two[0], 1)
    upper = write_source(tmp_path / "upper", ["Cat", "dog"], range(4))
    numbers = write_source(tmp_path / "numbers", ["0", "1"], range(4))
    plain = write_source(tmp_path / "plain", [], range(4))
    colour = write_source(tmp_path / "colour", ["cat"], range(4), channels=3)
    empty = write_source(tmp_path / "empty", ["cat"], range(4))
    every = Problem("train-000000.tar", None, None, "bytes", "")
    (tmp_path / "empty" / layout.QUARANTINE).write_text(
        make_quarantine(read_dataset(empty, Storage()), [every]).to_json()
    )
    wrong = {
        f"'a' .{two[0]}. has a class 'cat' and 'up' .{upper}. has 'Cat': a class has": [a, ("up", upper, 1)],
        f"classes of 'n' .{numbers}. are numbers, and those of 'a' .{two[0]}. are names": [a, ("n", numbers, 1)],
        "source 'gone': no dataset at file:///nowhere": [a, ("gone", "file:///nowhere", 1)],
        "source 'c': .* has channels 3, and data.channels = 1 for all": [a, ("c", colour, 1)],
        "source 'e': the quarantine leaves no sample": [a, ("e", empty, 1)],
        "has no labels, and other sources of data.sources have": [("p", plain, 1), a],
        "weights 0.123, 0.877 are for samples 0 to 10 only": [
            ("a", two[0], {0: 0.123, 10: 1}),
            ("b", two[1], {0: 0.877, 10: 1}),
        ],
    }
    for message, sources in wrong.items():
        with pytest.raises(DatasetError, match=message):
            read_data(mixed(sources), Storage())
    with pytest.raises(
        DatasetError, match=r"data\.uri, by whose images samples are judged: no dataset at .*data\.uri=file"
    ):
        read_data(mixed([a], uri="file:///nowhere"), Storage())
    with pytest.raises(DatasetError, match=r"has the class 'eel', which no source of data\.sources has"):
        read_data(mixed([a], uri=two[1]), Storage())
