"""An index or a check that was interrupted continues: nothing is read twice, and the result is the same."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.presentation.progress import no_notice
from pipelines.shards.audit import foreign, recorded
from pipelines.shards.audit.check import CheckReport, check
from pipelines.shards.audit.foreign import IndexRefusedError, index_tars
from pipelines.shards.audit.recorded import InThreads, TarReading
from pipelines.shards.index import read_dataset
from pipelines.storage import Storage, StorageError
from tests.pipelines.shards.audit.test_check import redescribe, sample
from tests.pipelines.shards.tars import tar_bytes

TARS = 6
INDEX, CHECK = "index-progress", "check-progress"


class KilledError(BaseException):
    """The process is gone, in the middle of its work."""


class Reads:
    """Counts the passes over tars by their names, and ends the process when one too many begins.

    Attributes:
        of: tar -> how often it was read to its end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: Counter[str] = Counter()
        self.left: int | None = None
        whole = Storage.fetch

        def fetch(storage: Storage, uri: str, start: int, stop: int, sink: Callable[[bytes], object], **options):
            if self.left is not None and self.left == 0:
                raise KilledError
            requests = whole(storage, uri, start, stop, sink, **options)
            self.of[uri.rsplit("/", 1)[-1]] += 1
            self.left = None if self.left is None else self.left - 1
            return requests

        monkeypatch.setattr(Storage, "fetch", fetch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tars of two splits, each of which one request reads."""
    (tmp_path / "ds").mkdir()
    for number in range(TARS):
        entries = [e for key in "abc" for e in sample(f"{number}{key}", 20 * number, number % 3)]
        (tmp_path / "ds" / f"{'test' if number == 0 else 'train'}-{number}.tar").write_bytes(tar_bytes(entries))
    return tmp_path / "ds"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def one_by_one(notice=no_notice, progress=lambda done, total: None) -> TarReading:
    return TarReading(InThreads(1), progress, notice)


def index(folder: Path, **options):
    return index_tars(f"file://{folder}", Storage(), **{"reading": one_by_one(), **options})


def check_again(folder: Path, **options) -> CheckReport:
    return check(f"file://{folder}", Storage(), **{"reading": one_by_one(), **options})


def stored(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_after(reads: Reads, tars: int, work: Callable[[], object]) -> Counter[str]:
    """Return what was read by a process that was killed when it had read so many tars."""
    reads.of.clear()
    reads.left = tars
    with pytest.raises(KilledError):
        work()
    reads.left = None
    return Counter(reads.of)


# An index looks at its first sample before, for the size of the images: one more request for the first training tar.
FIRST = Counter({"train-1.tar": 1})
ALL = Counter({f"{'test' if number == 0 else 'train'}-{number}.tar": 1 for number in range(TARS)})


@pytest.mark.parametrize("tars", range(TARS))
def test_an_index_that_was_killed_reads_no_tar_twice_and_gives_the_same_bytes(folder, tmp_path, reads, tars):
    shutil.copytree(folder, tmp_path / "undisturbed")
    index(tmp_path / "undisturbed")
    before = killed_after(reads, tars + 1, lambda: index(folder))
    assert before.total() == tars + 1
    assert len(list((folder / INDEX).glob("*.json"))) == tars
    reads.of.clear()
    said: list[str] = []
    index(folder, reading=one_by_one(said.append))
    assert reads.of + before == ALL + FIRST + FIRST
    assert stored(folder) == stored(tmp_path / "undisturbed")
    assert not (folder / INDEX).exists()
    counted = [f"{tars} of {TARS} tars were read before: file://{folder}/{INDEX} has their results"] if tars else []
    assert said[:-1] == counted
    assert said[-1].startswith(f"{TARS - tars} tar")
    assert said[-1].endswith(" MiB, by 1 thread of this process")


@pytest.mark.parametrize("tars", range(TARS))
def test_a_check_that_was_killed_reads_no_tar_twice_and_finds_the_same(folder, reads, tars):
    index(folder)
    shard = folder / "train-4.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    there = stored(folder)
    whole = check_again(folder)
    assert {problem.kind for problem in whole.problems} == {"truncated", "lost"}
    before = killed_after(reads, tars, lambda: check_again(folder))
    assert len(list((folder / CHECK).glob("*.json"))) == tars
    reads.of.clear()
    again = check_again(folder)
    assert reads.of + before == ALL
    assert (again.problems, again.bytes) == (whole.problems, whole.bytes)
    assert stored(folder) == there
    assert not (folder / CHECK).exists()


def test_progress_begins_with_what_was_read_before(folder, reads, monkeypatch):
    killed_after(reads, 4, lambda: index(folder))
    counted: list[int] = []

    class Watched(recorded.ByteCounter):
        def add(self, count: int) -> None:
            counted.append(count)
            super().add(count)

    monkeypatch.setattr(foreign, "ByteCounter", Watched)
    seen: list[tuple[int, int]] = []
    index(folder, reading=one_by_one(progress=lambda done, total: seen.append((done, total))))
    assert counted[0] == sum(counted[1:]) == 3 * (folder / "train-1.tar").stat().st_size
    assert seen[-1] == (1, 1)


def test_a_tar_that_has_changed_since_is_read_again(folder, reads):
    killed_after(reads, 4, lambda: index(folder))
    (folder / "train-2.tar").write_bytes(tar_bytes(sample("2other", 77, 1)))
    reads.of.clear()
    done = index(folder)
    assert {name for name, count in (reads.of - FIRST).items() if count} == {
        "train-2.tar", *(f"train-{n}.tar" for n in (4, 5)), "test-0.tar",
    }  # fmt: skip
    (shard,) = [shard for shard in done.dataset.splits["train"] if shard.name == "train-2.tar"]
    assert shard.samples == 1
    assert check_again(folder).problems == ()


def damage(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damaged(path: Path) -> None:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damaged


DAMAGE = {
    "no JSON": lambda path: path.write_bytes(b"{"),
    "empty": lambda path: path.write_bytes(b""),
    "not an object": lambda path: path.write_text("[]"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another result": damage(lambda record: record.update(result=record["result"].replace("1", "2"))),
    "no result": damage(lambda record: record.pop("result")),
    "of another tar": damage(lambda record: record.update(key="0" * 64)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_record_that_does_not_hold_is_made_again(folder, tmp_path, reads, how):
    shutil.copytree(folder, tmp_path / "undisturbed")
    index(tmp_path / "undisturbed")
    killed_after(reads, TARS, lambda: index(folder))
    DAMAGE[how](folder / INDEX / "train-3.json")
    reads.of.clear()
    index(folder)
    assert reads.of - FIRST == Counter({"train-3.tar": 1, "test-0.tar": 1})
    assert stored(folder) == stored(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")])
def test_a_record_without_the_sidecar_that_it_stands_for_is_made_again(folder, reads, change):
    killed_after(reads, TARS, lambda: index(folder))
    change(folder / "train-3.index.json")
    index(folder)
    assert check_again(folder).problems == ()


def test_another_format_of_samples_uses_no_record(folder, reads):
    killed_after(reads, 4, lambda: index(folder))
    reads.of.clear()
    index(folder, classes=["x", "y", "z"])
    assert reads.of == ALL + FIRST


def test_another_release_uses_no_record(folder, reads, monkeypatch):
    killed_after(reads, 4, lambda: index(folder))
    monkeypatch.setattr(recorded, "RELEASE", recorded.RELEASE + 1)
    reads.of.clear()
    index(folder)
    assert reads.of == ALL + FIRST


def test_a_check_reads_a_shard_again_whose_sidecar_or_description_has_changed(folder, reads):
    index(folder)
    killed_after(reads, TARS - 1, lambda: check_again(folder))
    sidecar = folder / "train-2.index.json"
    sidecar.write_text(sidecar.read_text().replace('"2a"', '"zz"'))
    reads.of.clear()
    assert [(p.shard, p.kind) for p in check_again(folder).problems] == [("train-2.tar", "sidecar")]
    assert reads.of == Counter({"train-2.tar": 1, "train-5.tar": 1})

    killed_after(reads, TARS - 1, lambda: check_again(folder))
    dataset = read_dataset(f"file://{folder}", Storage())
    train = [replace(s, sha256="0" * 64) if s.name == "train-3.tar" else s for s in dataset.splits["train"]]
    redescribe(dataset.uri, dataset, splits={**dataset.splits, "train": tuple(train)})
    reads.of.clear()
    found = {(p.shard, p.kind) for p in check_again(folder).problems}
    assert found == {("train-2.tar", "sidecar"), ("train-3.tar", "bytes")}
    assert reads.of == Counter({"train-3.tar": 1, "train-5.tar": 1})


def test_a_refused_index_is_given_again_with_quarantine_and_reads_nothing_again(folder, reads):
    with (folder / "train-4.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(IndexRefusedError, match=r"\d problem"):
        index(folder)
    reads.of.clear()
    done = index(folder, quarantine=True)
    assert reads.of == FIRST
    assert done.quarantine is not None
    assert [problem.shard for problem in done.quarantine.excluded] == ["train-4.tar"]
    assert not (folder / INDEX).exists()


def test_a_check_without_leave_to_write_finds_the_same_and_says_that_it_keeps_no_records(folder, monkeypatch):
    index(folder)
    there = stored(folder)

    def write(storage: Storage, uri: str, data: bytes, **options) -> None:
        raise StorageError(f"{uri}: the user of this process may not")

    monkeypatch.setattr(Storage, "write", write)
    said: list[str] = []
    assert check_again(folder, reading=one_by_one(said.append)).problems == ()
    assert said[0] == f"file://{folder}/{CHECK} cannot be written, so a check that is interrupted begins again"
    assert stored(folder) == there


def test_without_a_tag_the_time_says_whether_an_object_has_changed_and_without_either_it_may_have(folder):
    entry = recorded.list_tars(f"file://{folder}", Storage())["train-1.tar"].entry
    assert recorded.stamp(entry) == recorded.stamp(replace(entry, modified=1.0)) == [entry.size, entry.tag]
    assert recorded.stamp(replace(entry, size=1)) != recorded.stamp(entry)
    untagged = replace(entry, tag="")
    assert recorded.stamp(untagged) == [entry.size, entry.modified]
    unknown = replace(untagged, modified=None)
    assert recorded.stamp(unknown) != recorded.stamp(unknown)
