"""The benchmarks that need services run: the code that measures, on the least of everything, as forks on the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.benchmarks.programs import check, files_of_results
from tests.integration.workers import STARTER, forked

pytestmark = pytest.mark.integration
HOME = ("data", "overhead", "serving")
"""Those which start a stack of their own unless one is named."""


@pytest.fixture
def run(shell, forks, local_stack, tmp_path):
    """Run a benchmark with the least of everything, and check its result."""

    def run_(name, *arguments, size="--smoke"):
        before = files_of_results()
        command, environment = forked(forks, f"benchmarks.{name}")
        environment |= shell.environment | {"DDPM_BENCHMARK_PYTHON": f"{sys.executable} {STARTER}"}
        environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
        home = ["--home", str(local_stack.home)] if name in HOME else []
        command += [size, "--out", str(tmp_path), *home, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=shell.folder, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        check(name, done.stdout, tmp_path)
        assert files_of_results() == before

    return run_


SLOW = [pytest.param("trials", marks=pytest.mark.slow)]
"""What starts as many workers as it has trials, with the least of everything too."""


@pytest.mark.parametrize("name", [*HOME, *SLOW])
def test_a_benchmark_runs_with_the_least_of_everything(name, run):
    run(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "overhead", "serving", "trials"])
def test_the_quick_form_ends_within_three_minutes(name, run):
    run(name, size="--quick")


@pytest.mark.slow
def test_the_studies_run_with_the_least_of_everything(run, digits):
    run("studies")


OURS = {
    "network": {"channels": [32], "layers_per_block": 1, "attention": [True], "head_dim": 32},
    "shape": [1, 8, 8],
    "sampling": {"scale": 1.0},
    "settings": {"batch_size": "32", "data.flip": "False"},
    "seconds": 1.0, "distance": 1.0, "standard_error": 0.1, "accuracy": 0.5, "precision": 0.5, "recall": 0.5,
    "machine": "none", "commit": "none",
}  # fmt: skip


def test_time_to_quality_runs_with_the_least_of_everything_but_a_flow(run, tmp_path):
    """A flow with a budget takes minutes: its row is there, as of a benchmark that is taken up again."""
    pytest.importorskip("diffusers")
    for digit, pixels in zip(*(load_digits()[part][:150] for part in ("target", "images")), strict=True):
        number = len(list(tmp_path.rglob(f"{digit}/*.png")))
        folder = tmp_path / "pictures" / "mnist" / ("held_out" if number % 10 == 0 else "given") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).resize((28, 28)).save(folder / f"{number}.png")
    kept = tmp_path / "smoke" / "mnist" / "ours-1-0.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(OURS))
    for name in ("time_to_quality", "time_to_quality.guidance"):
        run(name, "--work", str(tmp_path))
