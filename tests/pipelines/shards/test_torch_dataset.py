"""The training stream in a loop of somebody else."""

import itertools
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from pipelines.shards import torch_dataset
from pipelines.shards.index import DatasetError
from pipelines.shards.ingest.write import ingest
from pipelines.shards.joined import read_data
from pipelines.shards.stream import StreamSettings, TrainingStream, open_stream
from pipelines.shards.torch_dataset import StreamDataset
from pipelines.storage import Storage
from tests.forked import FORKING
from tests.pipelines.shards.test_joined import mixed, write_source

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    uri = f"file://{tmp_path_factory.mktemp('stream')}/digits"
    return ingest("digits", uri, Storage(), image_size=8, channels=1, shard_samples=100).dataset


@pytest.fixture
def settings(tmp_path):
    return StreamSettings(lanes=5, window=2, seed=3, cache_dir=tmp_path / "cache", cache_bytes=10**8)


def source(dataset, settings, **options):
    return StreamDataset(dataset, "train", Storage(), settings, **{"batch_size": 30, **options})


def ordinals(batches, count):
    return [batch["ordinals"].tolist() for batch in itertools.islice(batches, count)]


def test_batches_are_those_of_the_training_stream(dataset, settings):
    reader, order = open_stream(dataset, "train", Storage(), settings)
    stream = TrainingStream(reader, order, batch_size=30, rank=1, world_size=2, start=60, stop=150)
    ours = itertools.islice(source(dataset, settings, rank=1, world_size=2, samples_seen=60), 3)
    for batch, expected in zip(ours, stream, strict=True):
        assert batch.keys() == {"ordinals", "images", "labels"}
        assert torch.equal(batch["images"], expected.images)
        assert torch.equal(batch["labels"], expected.labels)
        assert torch.equal(batch["ordinals"], expected.ordinals)
    reader.close()


@pytest.mark.parametrize("batch_size", [30, 31])
def test_what_two_ranks_have_saved_three_go_on_from_with_each_sample_exactly_once(dataset, settings, batch_size):
    first = [source(dataset, settings, rank=rank, world_size=2) for rank in range(2)]
    seen = [n for each in first for piece in ordinals(each, 7) for n in piece]
    states = [each.state_dict() for each in first]
    assert states[0] == states[1]
    then = [source(dataset, settings, batch_size=batch_size, rank=rank, world_size=3) for rank in range(3)]
    for each in then:
        each.load_state_dict(states[0])
    seen += [n for each in then for piece in ordinals(each, 5) for n in piece]
    assert sorted(seen) == list(range(7 * 30 + 5 * batch_size))


def test_the_state_is_that_behind_the_batch_that_the_loop_has(dataset, settings):
    loop = source(dataset, settings)
    for number, _ in enumerate(itertools.islice(DataLoader(loop, batch_size=None), 4), 1):
        assert loop.state_dict()["samples_seen"] == number * 30
    assert ordinals(loop, 1)[0] == ordinals(source(dataset, settings, samples_seen=120), 1)[0]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_workers_keep_the_order_of_one_process(dataset, settings):
    alone = ordinals(source(dataset, settings), 7)
    loader = DataLoader(source(dataset, settings), batch_size=None, num_workers=2, multiprocessing_context=FORKING)
    assert ordinals(loader, 7) == alone


def test_workers_that_are_given_their_states_back_go_on_in_the_order_of_one_process(dataset, settings, monkeypatch):
    """As `StatefulDataLoader` does it: a state of each worker, taken when the worker has yielded a batch."""
    alone = ordinals(source(dataset, settings), 9)

    def worker(number, count, state=None):
        mine = source(dataset, settings)
        if state:
            mine.load_state_dict(state)
        monkeypatch.setattr(torch_dataset, "get_worker_info", lambda: SimpleNamespace(id=number, num_workers=3))
        return ordinals(mine, count), mine.state_dict()

    before = [worker(number, count) for number, count in enumerate([2, 1, 1])]  # four batches were consumed
    after = [
        worker(number, count, state)[0]
        for (number, count), (_, state) in zip(enumerate([1, 2, 2]), before, strict=True)
    ]
    found = [batches + more for (batches, _), more in zip(before, after, strict=True)]
    assert [batch for batches in zip(*found, strict=True) for batch in batches] == alone


def test_a_state_of_another_stream_is_refused(dataset, settings, tmp_path):
    state = source(dataset, settings).state_dict()
    others = [source(dataset, replace(settings, **{name: 7})) for name in ("seed", "lanes", "window")]
    others.append(source(replace(dataset, digest="0" * 64), settings))
    for other in others:
        with pytest.raises(DatasetError, match="the state is of a stream with digest"):
            other.load_state_dict(state)
    uri = write_source(tmp_path / "a", ["cat", "dog"], range(40))
    three, two = (read_data(mixed([("a", uri, 1), ("b", uri, weight)]), Storage())[0] for weight in (3, 2))
    with pytest.raises(DatasetError, match="weights, seed, lanes or window have changed"):
        source(two, settings).load_state_dict(source(three, settings).state_dict())
    batch = next(iter(source(three, settings)))
    assert batch["sources"].bincount().tolist() in ([7, 23], [8, 22])


def test_a_rank_without_samples_is_refused(dataset, settings):
    with pytest.raises(ValueError, match="need 0 <= rank < world_size <= batch_size"):
        source(dataset, settings, rank=2, world_size=2)


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_the_loop_of_the_page_runs_from_a_wheel_and_goes_on_on_other_ranks(dataset, tmp_path):
    """Outside the checkout, with what this environment has."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-loop.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 50
    (tmp_path / "own_loop.py").write_text(
        f"{code}\nassert '{tmp_path}/site' in StreamDataset.__init__.__code__.co_filename\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    seen = []
    for ranks, steps in ((2, 6), (3, 4)):
        logs = tmp_path / f"logs of {ranks}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        torchrun += ["--redirects=1", f"--log-dir={logs}"]  # lines of ranks that share a stream run into each other
        done = subprocess.run(
            [*torchrun, "own_loop.py", dataset.uri, str(steps)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [line for log in logs.rglob("stdout.log") for line in log.read_text().splitlines()]
        assert len(lines) == ranks * steps
        seen += [n for line in lines for n in json.loads(line.removeprefix("samples "))]
    assert sorted(seen) == list(range(10 * 64))
