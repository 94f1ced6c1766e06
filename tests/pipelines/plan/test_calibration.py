"""The measured constants of plans: every one has a machine and a day, and the benchmark that measures it writes it."""

import json
from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.overhead import SCALING, calibrate
from benchmarks.results import to_text
from pipelines.plan.calibration import CALIBRATION, FILE, Calibration
from pipelines.plan.networks import WIDTHS


def test_every_group_of_constants_says_when_and_where_it_was_measured() -> None:
    """So that a reader knows what a plan is based on."""
    for name, group in CALIBRATION:
        assert group.date <= date.today(), name
        assert group.machine, name
        assert group.written_by, name
    assert set(CALIBRATION.networks.images_needed) == set(CALIBRATION.networks.learning_rates) == {*WIDTHS, "hand"}


def test_a_constant_that_is_unknown_or_impossible_is_refused() -> None:
    """A misspelt constant would otherwise leave the old one in force."""
    plain = json.loads(FILE.read_text())
    with pytest.raises(ValidationError, match="shared_sped"):
        Calibration.model_validate({**plain, "workers": {**plain["workers"], "shared_sped": 0.9}})
    with pytest.raises(ValidationError, match="alone_speed"):
        Calibration.model_validate({**plain, "exchange": {**plain["exchange"], "alone_speed": 0.0}})


def test_the_benchmark_of_parallel_workers_writes_their_speed_and_nothing_else(tmp_path: Path) -> None:
    """And the shipped file is written as the benchmark writes it, so that a diff shows what has changed."""
    target = tmp_path / "calibration.json"
    calibrate({"machine": "another", "cases": {SCALING[-1].name: {"pair": 0.9134}}}, target)
    found = Calibration.model_validate_json(target.read_text())
    assert (found.workers.shared_speed, found.workers.machine) == (0.91, "another")
    workers = CALIBRATION.workers
    assert found.model_copy(update={"workers": workers}) == CALIBRATION
    assert to_text(json.loads(FILE.read_text())) == FILE.read_text()
