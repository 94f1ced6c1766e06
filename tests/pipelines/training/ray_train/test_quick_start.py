"""Modules that Ray Train loads in its controller, and in a worker before anything else."""

import subprocess
import sys


def test_callbacks_and_functions_of_workers_load_without_torch_which_is_imported_while_the_collector_rests():
    modules = ", ".join(f"pipelines.training.ray_train.{name}" for name in ("quick_start", "reservations", "worker"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
