"""The data of a rank: what its node reads decides how, and a line says so."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from pipelines.shards.index import Dataset, ShardInfo
from pipelines.training.loop.data import training_stream
from tests.pipelines.training.loop.ranks import tiny_config

GIB = 1 << 30


@pytest.fixture
def node(monkeypatch):
    def set_node(local: int | None, count: int | None) -> None:
        for name, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", count)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return set_node


def stream_of(tmp_path, rank: int, world: int, cache_gib: float):
    """The stream of a rank of a run of 16 lanes with windows of 2, over shards of 1 GiB that nobody reads."""
    shards = tuple(ShardInfo(f"train-{i:06d}.tar", 100, GIB, str(i)) for i in range(1_000))
    dataset = Dataset("file:///nowhere", {"train": shards}, (), 1, 8, (0.0,), (1.0,), "d")
    settings = ["data.lanes=16", "data.window=2", f"data.cache_gib={cache_gib}", "data.memory_mib=0"]
    config = tiny_config(tmp_path, 640, 64, *settings)
    context = SimpleNamespace(
        config=config, rank=rank, world_size=world,
        job=SimpleNamespace(config=config, dataset=dataset, storage=None, quarantine=None),
    )  # fmt: skip
    context.job.storage = SimpleNamespace(throttling=lambda: None)
    return training_stream(context, 0)


def test_on_many_nodes_each_caches_whole_shards_of_its_own_lanes_where_one_would_read_by_ranges(node, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pipelines")
    node(0, 8)  # one node has all ranks: 16 lanes x 2 shards x 2
    assert stream_of(tmp_path, 0, 8, cache_gib=20).reader.fetcher.cache is None
    node(0, 2)  # of four
    for rank in (0, 2, 4, 6):
        assert stream_of(tmp_path, rank, 8, cache_gib=20).reader.fetcher.cache is not None
    one, *others = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert one[0] == logging.WARNING
    assert "shards are read by ranges" in one[1]
    assert "16 of 16 lanes" in one[1]
    assert "take 64.00 GiB, more than data.cache_gib=20.00; raise that" in one[1]
    line = (
        "whole shards are cached on this node: 4 of 16 lanes, with windows of 2 and the next ones, take 16.00 GiB of "
        "data.cache_gib=20.00"
    )
    assert others == [(logging.INFO, line)] * 4


def test_one_rank_of_a_node_says_how_it_reads(node, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pipelines")
    node(1, 2)
    stream_of(tmp_path, 3, 8, cache_gib=20)
    assert not caplog.records
