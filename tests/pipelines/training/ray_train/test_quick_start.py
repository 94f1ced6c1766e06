"""What reaches a worker before it imports torch, and what it then loads."""

import pickle
import subprocess
import sys

from pipelines.training.ray_train.quick_start import run

called = []


def note(settings):
    called[:] = [settings]


def test_what_a_worker_runs_is_loaded_and_called():
    run({"pickled": pickle.dumps((note, {"name": "digits"}))})
    assert called == [{"name": "digits"}]


def test_callbacks_reach_a_worker_without_torch_which_is_to_be_imported_while_the_collector_rests():
    modules = "pipelines.training.ray_train.quick_start, pipelines.training.ray_train.reservations"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
