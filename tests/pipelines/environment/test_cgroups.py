"""What control groups leave a process, read from folders such as the kernel shows."""

from __future__ import annotations

import os

import pytest

from pipelines.environment import cgroups


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        (
            "3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1"}, None),
        ("0::/not/there\n", {}, None),
    ],
)
def test_the_tightest_limit_of_the_control_groups_counts(tmp_path, lines, files, expected):
    own = tmp_path / "own"
    own.write_text(lines)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cgroups.limit("cpu", tmp_path / "cgroup", own) == expected


def test_free_memory_in_a_container_is_its_limit_minus_its_use(tmp_path):
    (tmp_path / "own").write_text("0::/pod/box\n")
    for name, text in {"pod/memory.max": "4000", "pod/memory.current": "3500", "pod/box/memory.max": "max"}.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "cgroup/pod/box/memory.current").write_text("900")
    assert cgroups.free_memory(tmp_path / "cgroup", tmp_path / "own") == 500
    assert cgroups.limit("memory", tmp_path / "cgroup", tmp_path / "own") == 4000
    (tmp_path / "own").write_text("0::/\n")
    assert cgroups.free_memory(tmp_path / "cgroup", tmp_path / "own") is None


@pytest.mark.parametrize(("share", "whole"), [(None, 8), (1.5, 1), (0.5, 1), (4.0, 4), (64.0, 8)])
def test_no_more_cores_compute_than_a_container_has_a_share_of(monkeypatch, share, whole):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cgroups, "limit", lambda kind: share)
    assert cgroups.whole_cores() == whole
