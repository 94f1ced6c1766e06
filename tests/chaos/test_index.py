"""An index and a check that lose their driver, and then a node, find what undisturbed ones do and read little twice."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines import stack
from pipelines.shards.audit.check import check
from pipelines.shards.audit.foreign import index_tars
from pipelines.storage import Storage, layout
from tests.chaos.arena import CPUS, Arena, until
from tests.integration import command

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

URI, ALONE = "s3://ddpm/datasets/indexed", "s3://ddpm/datasets/indexed-undisturbed"
TARS, SAMPLES, SIDE = 40, 40, 512
"""Few bytes and many pixels: a tar is one request, and takes a second."""
IN_FLIGHT = 2 * CPUS
"""Tars that are read at a time on both nodes."""


def write_tar(path: Path, part: int) -> Path:
    rows = np.arange(SIDE, dtype=np.uint8)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(SAMPLES):
            picture, shift = io.BytesIO(), part * SAMPLES + i
            pixels = np.stack(np.broadcast_arrays(rows[:, None], rows[None], np.uint8(shift % 256)), -1) + np.uint8(
                shift % 7
            )
            Image.fromarray(pixels).save(picture, "png")
            writer.write({"__key__": f"{part:03d}/{i:03d}", "png": picture.getvalue(), "cls": str(i % 4).encode()})
    assert path.stat().st_size < 4 * 2**20
    return path


@pytest.fixture(scope="module")
def tars(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two addresses with the same tars of another tool, of which one cannot be read to its end."""
    folder = tmp_path_factory.mktemp("tars")
    for part in range(TARS):
        path = write_tar(folder / f"train-{part:03d}.tar", part)
        for uri in (URI, ALONE):
            arena.s3.upload(path, f"{uri}/{path.name}")


@pytest.fixture
def second_node(arena: Arena) -> Iterator[None]:
    arena.start_node()
    yield
    arena.kill_node()


class Pass:
    """A command of the tests' cluster over tars at `URI`, as it is disturbed."""

    def __init__(self, arena: Arena, words: Sequence[str], folder: str) -> None:
        self.arena, self.words, self.folder = arena, words, folder
        named = {"RAY_ADDRESS": str(arena.state.ray_address), **stack.ray_environment(arena.home)}
        self.environment = arena.environment | named
        arena.s3_proxy.asked.clear()

    def start(self) -> subprocess.Popen[str]:
        return command.start([*self.words, "--json"], self.arena.folder, self.environment)

    def recorded(self) -> set[str]:
        """The names of the tars that have a record."""
        entries = self.arena.s3.list(f"{URI}/{self.folder}")
        return {entry.uri.rpartition("/")[2].removesuffix(".json") for entry in entries if entry.uri.endswith(".json")}

    def reads(self) -> Counter[str]:
        """How often each tar was asked for, in one request each."""
        found = (re.search(r"/indexed/(train-\d+)\.tar", path) for path in self.arena.s3_proxy.asked)
        return Counter(match[1] for match in found if match)

    def disturbed(self) -> tuple[dict[str, Any], str]:
        """Kill the driver when a quarter has been read, and a node when another has; return the answer, and what the
        command said that came to the end."""
        first = self.start()
        until(lambda: len(self.recorded()) >= TARS // 4, 120, lambda: f"{len(self.recorded())} records")
        first.kill()
        first.communicate()
        before = self.recorded()
        assert len(before) < TARS // 2
        second = self.start()
        until(lambda: len(self.recorded()) >= len(before) + TARS // 4, 120, lambda: f"{len(self.recorded())} records")
        self.arena.kill_node()
        out, err = second.communicate(timeout=300)
        # What a driver reads last may be recorded after it is gone.
        (taken,) = re.findall(r"(\d+) of 40 tars were read before", err)
        assert len(before) <= int(taken) <= len(before) + IN_FLIGHT
        assert f"as Ray tasks on {2 * CPUS} CPUs" in err
        again = self.reads() - Counter(dict.fromkeys(self.reads(), 1))
        print(f"{' '.join(self.words)}: {taken} of {TARS} tars had a record; read twice: {sorted(again)}")
        looked_at = {"train-000"} if self.words[0] == "index" else set()  # for the size of the images, by each command
        assert not (again.keys() & before) - looked_at
        assert sum((again - Counter(looked_at)).values()) <= 2 * IN_FLIGHT + len(looked_at)
        assert second.returncode in (0, 1), err[-3000:]
        return json.loads(out.strip().splitlines()[-1]), err


def progress_left(s3: Storage) -> list[str]:
    folders = (layout.INDEX_PROGRESS, layout.CHECK_PROGRESS)
    return [entry.uri for entry in s3.list(URI) if any(f"/{folder}/" in entry.uri for folder in folders)]


@pytest.mark.usefixtures("tars", "second_node")
def test_an_index_that_loses_its_driver_and_a_node_writes_the_same_dataset(arena: Arena):
    undisturbed = index_tars(ALONE, arena.s3)
    answer, _ = Pass(arena, ["index", URI], layout.INDEX_PROGRESS).disturbed()
    print(f"digest {answer['digest']}, undisturbed {undisturbed.dataset.digest}")
    assert answer["digest"] == undisturbed.dataset.digest
    for part in range(TARS):
        name = f"train-{part:03d}.index.json"
        assert arena.s3.read(f"{URI}/{name}") == arena.s3.read(f"{ALONE}/{name}")
    assert progress_left(arena.s3) == []


@pytest.mark.usefixtures("tars", "second_node")
def test_a_check_that_loses_its_driver_and_a_node_finds_the_same_problems(arena: Arena):
    if not arena.s3.exists(f"{URI}/dataset.json"):
        index_tars(URI, arena.s3)
    whole = {name: arena.s3.read(f"{URI}/{name}") for name in ("train-002.tar", "train-037.tar")}
    for name, data in whole.items():
        arena.s3.write(f"{URI}/{name}", data[: len(data) // 2])
    try:
        undisturbed = check(URI, arena.s3).to_dict()
        answer, _ = Pass(arena, ["check", URI], layout.CHECK_PROGRESS).disturbed()
    finally:
        for name, data in whole.items():
            arena.s3.write(f"{URI}/{name}", data)
    print(f"{len(answer['problems'])} problems, undisturbed {len(undisturbed['problems'])}")
    assert answer == undisturbed
    assert len(answer["problems"]) > 2
    assert progress_left(arena.s3) == []
