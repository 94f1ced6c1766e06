"""What a user sees of a study on a terminal."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from pipelines.search.observer import describe_params
from pipelines.search.study import TrialRecord
from pipelines.search.study_config import load_study
from pipelines.search.table import line, table

PARAMS = {
    "guidance.scale": 1.58,
    "guidance.interval.0": 0.014,
    "guidance.interval.1": 0.511,
    "guidance.rescale": 0.741,
    "sampler.kind": "dpm_solver",
    "sampler.steps": 14,
}
STATES = ("finished", "stopped", "running")
RECORDS = [
    TrialRecord(
        f"{i:010x}",
        {**PARAMS, "sampler.steps": i},
        state,
        {"frechet_distance": 4.125 + i, "evaluations": 2.0 * i, "samples": 256.0},
    )
    for i, state in enumerate(STATES, start=1)
]


def rendered(width: int, limit: int | None) -> str:
    console = Console(file=StringIO(), width=width, soft_wrap=True)  # as the command line has it
    console.print(table(load_study("guidance"), RECORDS, limit))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("limit", [None, 12])
def test_names_states_and_numbers_are_whole_on_any_terminal(width, limit):
    shown = rendered(width, limit)
    for record in RECORDS:
        row = next(row for row in shown.splitlines() if record.trial in row)
        words = row.split()
        assert words[1] == record.state
        assert f"{record.scores['frechet_distance']:.3f}" in words
        assert f"{record.scores['evaluations']:.2f}" in words
        assert all(len(row.rstrip()) <= width for row in shown.splitlines())


def test_a_live_table_keeps_a_trial_on_a_line_and_the_status_says_all_of_it():
    assert len(rendered(80, 12).splitlines()) == 1 + len(RECORDS)
    whole = " ".join(rendered(80, None).split())
    for record in RECORDS:
        assert all(word in whole for word in describe_params(record.params).split())


def test_the_line_of_a_trial_that_was_stopped_says_after_how_much():
    finished, stopped, _ = RECORDS
    assert line(finished).startswith("0000000001 finished at distance 5.125: scale=1.58")
    assert line(stopped).startswith("0000000002 stopped after 256 samples at distance 6.125: scale=1.58")
    scores = {"frechet_distance": 9.0, "images_seen": 12_800.0}
    assert "stopped after 12,800 images at distance 9.000" in line(TrialRecord("a", PARAMS, "stopped", scores))
