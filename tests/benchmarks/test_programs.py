"""Every benchmark runs: the code that measures, on the least of everything."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.results import ROOT, python_m
from tests.benchmarks.programs import SERVICES, check, files_of_results, main_of, programs, quick

ALONE = sorted({*programs()} - {*SERVICES})
"""Those which need no service."""
LONG = ("checkpoint", "digits", "few_steps", "memory")
"""Those which train even in their least form."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What programs share, such as the digits and their evaluator."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def _settings_of_torch():
    """Programs set them for the whole process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.heavy
@pytest.mark.usefixtures("_settings_of_torch")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in ALONE]
)
def test_a_benchmark_runs_with_the_least_of_everything(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(home))
    before = files_of_results()
    main_of(name)(["--smoke", "--out", str(tmp_path)])
    check(name, capsys.readouterr().out, tmp_path)
    assert files_of_results() == before


def test_whatever_needs_services_is_there():
    assert {*SERVICES} <= {*programs()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_the_quick_form_ends_within_three_minutes(name, home, tmp_path):
    command = [*python_m(f"benchmarks.{name}"), "--quick", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    check(name, quick(command, cwd=ROOT, env=environment | {"DDPM_HOME": str(home)}), tmp_path)
