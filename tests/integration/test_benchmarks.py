"""The benchmarks that need services run: the code that measures, on the least of everything, as forks on the stack."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.benchmarks.programs import SERVICES, check, files_of_results, quick
from tests.integration.workers import STARTER, forked

pytestmark = pytest.mark.integration
SHORT = ("data", "overhead")
"""Those whose least form is short: a cluster that streams shards, and trainings."""
ON_DIGITS = ("studies", "trials")
"""Those which take the model and the evaluator of digits as given, and measure on whichever stack runs: no `--home`."""


def draw_pictures(work, count):
    """Write digits of scikit-learn where the time to quality keeps those of MNIST; each further pass is brighter."""
    images, labels = load_digits(return_X_y=True)
    for number in range(count):
        digit, pixels = labels[number % len(labels)], images[number % len(images)].reshape(8, 8)
        folder = work / "pictures" / "mnist" / ("held_out" if number % 10 == 0 else "given") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (10 + number // len(images))).astype(np.uint8))
        image.resize((28, 28)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The work folder of the time to quality and of the program beside it, which goes on from there."""
    folder = tmp_path_factory.mktemp("work")
    draw_pictures(folder, 150)
    return folder


@pytest.fixture
def command(request, name, shell, forks, tmp_path):
    """The command of a program without its size, and its environment."""
    if name.startswith("time_to_quality"):
        pytest.importorskip("diffusers")
    if name in ON_DIGITS:
        request.getfixturevalue("digits")
    words, environment = forked(forks, f"benchmarks.{name}")
    fork = f"{sys.executable} {STARTER}"
    environment |= shell.environment | {"DDPM_BENCHMARK_PYTHON": fork}
    environment |= {"DDPM_BENCHMARK_DDPM": f"{fork} -m tests.integration.ddpm"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
    return [*words, "--out", str(tmp_path)], environment


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in SERVICES]
)
def test_a_benchmark_runs_with_the_least_of_everything(name, command, shell, local_stack, work, tmp_path):
    words, environment = command
    words += ["--smoke", *([] if name in ON_DIGITS else ["--home", str(local_stack.home)])]
    words += ["--work", str(work)] if name.startswith("time_to_quality") else []
    before = files_of_results()
    done = subprocess.run(
        words, env=environment, cwd=shell.folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(name, done.stdout, tmp_path)
    assert files_of_results() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVICES)
def test_the_quick_form_ends_within_three_minutes(name, command, shell, tmp_path):
    """Each but the two on a stack of its own, as whoever calls it would have it."""
    words, environment = command
    if name.startswith("time_to_quality"):
        draw_pictures(tmp_path, 10_000)
        words += ["--work", str(tmp_path)]
    check(name, quick([*words, "--quick"], cwd=shell.folder, env=environment), tmp_path)
