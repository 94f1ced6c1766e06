"""Checks of what a training needs of memory, from a configuration that nobody has tried."""

from __future__ import annotations

import pytest

from pipelines.config import ConfigError, compose
from pipelines.doctor.check import answer
from pipelines.doctor.estimates import check_estimates, numbers, require_fit

PLAIN = ("+experiment=digits", "storage=file", "storage.root=file:///nowhere")
POD = ("launch=kuberay", "launch.image=none", "cluster.gpus_per_worker=1", "launch.gpu_product=NVIDIA-L4-24GB")


def test_a_small_training_fits_this_machine_and_its_numbers_are_in_the_answer():
    checks = check_estimates(compose([*PLAIN]), here=True)
    assert {check.name: check.status for check in checks} == {"memory of a node": "ok", "temporary files": "ok"}
    node = answer(checks)["checks"][0]
    assert node["numbers"]["process"] > 0
    assert "GiB are there" in node["found"]
    require_fit(checks)


def test_a_training_on_a_cluster_that_is_not_known_is_estimated_all_the_same():
    checks = check_estimates(compose([*PLAIN, "cluster.gpus_per_worker=1"]), here=False)
    assert [check.status for check in checks] == ["ok", "ok", "ok"]
    assert "are there" not in " ".join(check.found for check in checks)


def test_a_network_that_pods_cannot_hold_fails_before_there_is_a_cluster():
    wide = ("model=dit_small", "model.width=3072", "model.depth=8", "model.heads=24")
    checks = check_estimates(
        compose([*PLAIN, *POD, *wide, "cluster.num_workers=4", "launch.memory_gib=200"]), here=True
    )
    found = {check.name: check for check in checks}
    assert "cluster.parallel=fsdp" in (found["memory of a GPU"].fix or "")
    assert found["memory of a node"].status == "ok"
    assert numbers(checks)["memory of a GPU"]["optimizer"] > 10**10  # eight bytes for each of 1.4 billion parameters
    with pytest.raises(ConfigError, match="does not fit the memory of a GPU"):
        require_fit(checks)
