"""Conditional writes on a real S3 store, in a race of many processes."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from multiprocessing.synchronize import Barrier

import pytest

from pipelines.storage import ConflictError, Entry, Storage
from tests.forked import FORKING

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

PROCESSES, ROUNDS = 32, 4


def race(who: int, s3: Storage, root: str, barrier: Barrier, results: multiprocessing.Queue) -> None:
    """In each round: store a new object if none is there; then replace the one that all have read."""
    for number in range(ROUNDS):
        uri = f"{root}/{number}"
        for kind in ("new", "replaced"):
            barrier.wait(120)
            tag = None if kind == "new" else s3.read_tagged(uri)[1]
            barrier.wait(120)
            try:
                s3.write_if(uri, f"{kind} by {who}".encode(), tag)
                won = True
            except ConflictError:
                won = False
            results.put((number, kind, who, won, s3.read(uri).decode()))


def test_of_many_processes_that_write_a_key_one_wins_each_round(s3: Storage):
    barrier, results = FORKING.Barrier(PROCESSES), FORKING.Queue()
    root = "s3://ddpm/race"
    processes = [FORKING.Process(target=race, args=(who, s3, root, barrier, results)) for who in range(PROCESSES)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=250) for _ in range(PROCESSES * ROUNDS * 2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    wins = Counter((number, kind) for number, kind, _, won, _ in seen if won)
    assert wins == {(number, kind): 1 for number in range(ROUNDS) for kind in ("new", "replaced")}
    winner = {(number, kind): who for number, kind, who, won, _ in seen if won}
    assert all(text == f"{kind} by {winner[number, kind]}" for number, kind, _, _, text in seen)


def test_a_condition_on_what_is_gone_is_a_conflict_and_the_store_tells_when_it_wrote(s3: Storage):
    uri = "s3://ddpm/race-of-one/key"
    tag = s3.write_if(uri, b"first", None)
    (entry,) = s3.list("s3://ddpm/race-of-one")
    assert (entry.tag, entry.size) == (tag, 5)
    assert isinstance(entry, Entry)
    assert entry.modified is not None
    assert s3.update(uri, lambda stored: (stored or b"") + b" second") == b"first second"
    s3.delete(uri)
    with pytest.raises(ConflictError):
        s3.write_if(uri, b"third", tag)
    assert not s3.exists(uri)
