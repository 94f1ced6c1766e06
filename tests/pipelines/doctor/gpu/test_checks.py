"""What the selftest of GPUs finds on ranks that work and on ranks with a planted fault, and where its limits are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from pipelines.doctor import gpu
from pipelines.doctor.gpu import tasks
from pipelines.doctor.gpu.ranks import Place, Ranks
from pipelines.doctor.gpu.tasks import GIB, Links, Trace, made_up_config
from tests.pipelines.doctor.gpu.planted import FaultyRanks, corrupt_sums, scale_gradients, sleep_in_exchanges

CPU = torch.device("cpu")
BLOCKED = ("ray", "mlflow", "boto3", "botocore", "webdataset", "fsspec")


def statuses(checks):
    return {check.name: check.status for check in checks}


@pytest.mark.parametrize("network", tasks.NETWORKS)
def test_what_bf16_is_off_by_is_its_rounding_because_three_more_bits_make_it_an_eighth(network):
    exact = tasks.evaluate(made_up_config(network), CPU)
    off = {
        precision: gpu.distances(exact, tasks.evaluate(made_up_config(network, f"optim.precision={precision}"), CPU))
        for precision in ("bf16", "fp16")
    }
    for part in ("output", "gradient"):
        assert 4 < off["bf16"][part] / off["fp16"][part] < 16, part
    assert gpu.bf16_check("bf16", exact, exact).status == "ok"
    wrong = tasks.ForwardBackward(exact.output * 1.1, exact.loss, exact.gradient)
    assert gpu.bf16_check("bf16", exact, wrong).status == "failed"


def test_on_a_cpu_bf16_is_checked_and_the_peak_of_memory_is_not():
    assert set(statuses(gpu.check_bf16(Ranks(2, "cpu"))).values()) == {"ok"}
    (memory,) = gpu.check_memory(Ranks(2, "cpu"))
    assert memory.status == "skipped"
    assert "GiB" in memory.found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_steps_of_ranks_differ_from_one_process_by_the_order_of_sums_alone(parallel):
    config = made_up_config("dit", "batch_size=5", f"cluster.parallel={parallel}", "optim.precision=fp64")
    alone, together = tasks.train(Place(0, 1, "cpu"), config, 3), Ranks(2, "cpu").run(tasks.train, config, 3)
    whole = gpu.whole_moments(alone, together)
    for name, moment in alone.moments.items():
        torch.testing.assert_close(whole[name], moment, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_with_a_wrong_gradient_is_found(parallel):
    found = statuses(gpu.check_steps(FaultyRanks(2, "cpu", scale_gradients), parallel))
    assert set(found.values()) == {"failed"}, found


def test_steps_that_are_no_numbers_are_not_within_the_limits():
    moments = {"a": torch.ones(2)}
    right, wrong = Trace([1.0, 1.0], [1.0, 1.0], moments), Trace([1.0, math.nan], [1.0, 1.0], moments)
    assert gpu.steps_check("ddp", right, [right]).status == "ok"
    assert gpu.steps_check("ddp", right, [wrong]).status == "failed"


@pytest.mark.slow
def test_links_of_ranks_that_work_are_ok():
    assert set(statuses(gpu.check_links(Ranks(3, "cpu"))).values()) == {"ok"}


def test_the_links_of_a_rank_that_is_late_are_named():
    links = {check.name: check for check in gpu.check_links(FaultyRanks(3, "cpu", sleep_in_exchanges))}["links"]
    assert links.status == "failed"
    assert "0-2" in links.found
    assert "1-2" in links.found
    assert "0-1" not in links.found


def test_a_rank_that_receives_wrong_sums_is_found():
    found = {check.name: check for check in gpu.check_links(FaultyRanks(2, "cpu", corrupt_sums))}
    assert found["transfers"].status == "failed"
    assert "all-reduce of 1 MiB" in found["transfers"].found
    assert "all-gather" not in found["transfers"].found


def test_a_link_is_compared_with_others_of_its_kind():
    speeds = {(0, 1): 200.0, (2, 3): 210.0, (0, 2): 20.0, (0, 3): 21.0, (1, 2): 19.0, (1, 3): 4.0}
    kinds = {pair: "NV4" if speed > 100 else "SYS" for pair, speed in speeds.items()}
    found = gpu.link_check(speeds, kinds)
    assert found.status == "failed"
    assert "1-3 (4.00 GB/s, SYS; others 20.00)" in found.found
    assert "0-2" not in found.found
    assert gpu.link_check({**speeds, (1, 3): 18.0}, kinds).status == "ok"
    assert gpu.link_check({(0, 1): 5.0}, {}).status == "ok"


def test_speeds_are_shown_by_size():
    found = gpu.transfer_check([Links({2**20: 1.0, 2**26: 2.5}, {2**20: 0.5}, {}, [])])
    assert "all-reduce 1 MiB 1.00, 64 MiB 2.50 GB/s; all-gather 1 MiB 0.50 GB/s" in found.found


@pytest.mark.slow
def test_after_a_rank_was_killed_the_others_end_and_a_restart_has_the_same_losses():
    assert statuses(gpu.check_resume(Ranks(2, "cpu"))) == {"kill": "ok", "resume": "ok"}


def test_without_a_compiler_compiling_is_skipped_and_another_error_of_it_fails():
    assert gpu.compile_failure(InvalidCxxCompiler()).status == "skipped"
    assert gpu.compile_failure(RuntimeError("Failed to find C compiler. Please specify via CC")).status == "skipped"
    assert gpu.compile_failure(RuntimeError("an illegal memory access")).status == "failed"


@pytest.mark.slow
def test_a_compiled_network_computes_what_the_plain_one_does():
    assert set(statuses(gpu.check_compile(Ranks(1, "cpu"))).values()) == {"ok"}


def test_a_peak_far_from_its_estimate_is_reported():
    assert gpu.memory_check("memory", 4 * GIB, 4 * GIB).status == "ok"
    assert gpu.memory_check("memory", 4 * GIB, 6 * GIB).status == "failed"
    assert gpu.memory_check("memory", 4 * GIB, 1 * GIB).status == "failed"


def test_a_check_that_breaks_does_not_keep_the_others_from_being_made(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    for name in ("check_bf16", "check_compile", "check_links", "check_steps", "check_resume"):
        monkeypatch.setattr(gpu, name, broken)
    found = list(gpu.selftest(Ranks(2, "cpu")))
    assert [check.status for check in found] == ["failed", "failed", "skipped", "failed", "failed", "failed", "failed"]
    assert "illegal memory access" in found[0].found


@pytest.mark.integration
def test_the_selftest_runs_where_neither_ray_nor_mlflow_nor_a_store_is_installed(tmp_path):
    for name in BLOCKED:  # found before the installed ones, by the ranks as well
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')\n")
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": path, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "x")}
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()", "doctor", "--gpu", "--ranks", "2", "--json"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    found = {check["name"]: check["status"] for check in answer["checks"]}
    assert found.pop("compile") == found.pop("memory") == "skipped"
    assert set(found.values()) == {"ok"}, answer
    assert "torch: " in answer["report"]
    assert "CXX=/nonexistent" in answer["report"]
    assert "      ok  resume: losses" in done.stderr
