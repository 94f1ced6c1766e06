"""Every benchmark runs: the code that measures, on the least of everything."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.benchmarks.programs import SERVICES, check, files_of_results, module_of, programs


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


@pytest.mark.usefixtures("_settings_of_torch")
@pytest.mark.parametrize("name", sorted({*programs()} - {*SERVICES}))
def test_a_benchmark_runs_with_the_least_of_everything(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DDPM_HOME", str(home))
    before = files_of_results()
    importlib.import_module(module_of(name)).main(["--smoke", "--out", str(tmp_path)])
    check(name, capsys.readouterr().out, tmp_path)
    assert files_of_results() == before
