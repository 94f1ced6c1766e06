"""How the garbage collector comes back after a worker's start."""

import gc
import weakref

import pytest

from pipelines.training import startup


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    gc.unfreeze()  # what the tests import, which is frozen after their collection
    yield
    gc.enable()
    gc.freeze()


def test_the_collector_runs_after_the_startup_and_leaves_what_was_imported_alone():
    gc.disable()
    startup.end_startup()
    assert gc.isenabled()
    kept = gc.get_freeze_count()
    assert kept > 10_000  # it does not look at what was imported
    startup.end_startup()  # of the next job of the same worker
    assert kept - 100 < gc.get_freeze_count() <= kept  # another thread of the test's process may free some of it


def test_a_process_whose_collector_was_on_keeps_it_unchanged():
    startup.end_startup()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


def test_objects_made_during_startup_are_freed_after_their_job():
    class Node:
        pass

    gc.disable()
    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    gone = weakref.ref(node)
    startup.end_startup()
    del node
    gc.collect()
    assert gone() is not None
    startup.collect_all()
    assert gone() is None
