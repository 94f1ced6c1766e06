"""The benchmark of reading shards: what it makes of its measurements, and of peers that are not there."""

from __future__ import annotations

import pytest

from benchmarks.data.measures import DEPTHS, SYSTEMS
from benchmarks.data.peers import PEERS
from benchmarks.data.run import draw, plan, reason, summary
from benchmarks.results import Size

SECONDS = {"ours": 0.3, "webdataset": 1.5}


def row(system, measure, cores, turn):
    rate = {"ours": 3000.0, "ours_of_5_sources": 2700.0}.get(system, 1000.0) * (turn + 1)
    first = SECONDS.get(system, 0.5) * (turn + 1)
    return {
        "system": system,
        "measure": measure,
        "cores": cores,
        "turn": turn,
        "first_batch_s": first,
        **({} if measure.startswith("resume") else {"samples_per_s": rate, "anonymous_mib": 200.0}),
        "same_batch": system != "webdataset" or turn > 0,
    }


def measured(missing):
    rows = [
        row(system, measure, cores, turn)
        for turn in range(3)
        for system in SYSTEMS
        if system not in missing
        for cores, measures in plan(system, turn == 0).items()
        for measure in measures
    ]
    return summary(rows, missing, 16_000, 3, Size.FULL)


def test_every_peer_is_measured_or_named_as_missing_with_the_reason():
    missing = {"litdata": "ImportError: no litdata", "energon": "OSError: no"}
    found = measured(missing)
    assert found["missing"] == missing
    assert {*found["systems"]} | {*missing} == {*SYSTEMS}
    assert {name for name in PEERS if f"speedup_{name}" in found} == {*PEERS} - {*missing}


def test_ratios_are_of_medians_over_turns():
    found = measured({})
    assert found["systems"]["ours"]["samples_per_s"] == 6000
    assert found["speedup_webdataset"] == found["speedup_webdataset_warm"] == found["speedup_webdataset_2_cores"] == 3.0
    assert found["mixture_of_one_source"] == {"cold": pytest.approx(0.9), "warm": pytest.approx(0.9)}
    assert found["systems"]["ours"]["resume_first_batch_s"] == {str(depth): 0.6 for depth in DEPTHS}


def test_a_stream_resumes_exactly_if_it_does_so_in_every_turn():
    found = measured({})["systems"]
    assert found["ours"]["resume_same_batch"] is True
    assert found["webdataset"]["resume_same_batch"] is False


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ImportError("no module"), "ImportError: no module"),
        (RuntimeError("x failed\nTraceback\nValueError: wrong\n  of {\n}"), "ValueError: wrong"),
    ],
)
def test_the_reason_is_the_error_itself(error, shown):
    assert reason(error) == shown


def test_the_parts_have_each_image_once(tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    draw(tmp_path / "all", parts, 40)
    names = [sorted(path.name for path in (folder / "train").rglob("*.png")) for folder in (tmp_path / "all", *parts)]
    assert names[0] == sorted(names[1] + names[2])
    assert len(names[1]) == len(names[2]) == 20
