"""Only the newest driver of a run may write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.storage import Fence, FencedError, Storage

STORAGE = Storage()


@pytest.fixture(params=["file", "local"])
def uri(request, tmp_path) -> str:
    return f"{request.param}://{tmp_path}/driver"


def test_the_newest_driver_may_write_and_the_others_learn_it(uri):
    first = Fence.take(STORAGE, uri)
    first.check()
    second = Fence.take(STORAGE, uri)
    assert (first.epoch, second.epoch) == (1, 2)
    second.check()
    for refused in (first.check, lambda: first.note(reservation="mine")):
        with pytest.raises(FencedError, match="another driver has taken over"):
            refused()
    second.check()


def test_what_a_driver_notes_is_there_for_the_next(uri):
    first = Fence.take(STORAGE, uri)
    assert "reservation" not in first.note(reservation="first")
    second = Fence.take(STORAGE, uri)
    assert second.note(reservation="second")["reservation"] == "first"
    second.check()


def test_a_record_that_was_lost_does_not_give_a_number_twice(uri):
    first = Fence.take(STORAGE, uri, above=4)
    assert first.epoch == 5
    STORAGE.delete(uri)
    with pytest.raises(FencedError, match="was deleted"):
        first.check()
    assert Fence.take(STORAGE, uri, above=5).epoch == 6


def test_drivers_that_start_at_once_have_different_numbers(tmp_path):
    uri = f"file://{tmp_path}/driver"
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda _: Fence.take(STORAGE, uri).epoch, range(24)))
    assert sorted(epochs) == list(range(1, 25))


def test_a_record_of_a_release_without_numbers_is_taken_over(uri):
    for text in (b"0123456789abcdef", b"12345", b"[1]", b""):
        STORAGE.write(uri, text)
        assert Fence.take(STORAGE, uri).epoch == 1
