"""A worker's start without the garbage collector."""

import gc
import pickle
import subprocess
import sys

from pipelines.training.ray_train.quick_start import QuickStart, run

called = []


def note(settings):
    called.append((settings, gc.isenabled()))


def test_what_a_worker_runs_is_loaded_and_called_while_the_collector_rests():
    try:
        callback = pickle.loads(pickle.dumps(QuickStart()))
        run({"pickled": pickle.dumps((note, {"name": "digits"}))})
        assert called == [({"name": "digits"}, False)]
        callback.after_controller_start(None)
        assert gc.isenabled()
    finally:
        gc.enable()


def test_callbacks_reach_a_worker_without_torch_which_is_to_be_imported_while_the_collector_rests():
    modules = "pipelines.training.ray_train.quick_start, pipelines.training.ray_train.reservations"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
