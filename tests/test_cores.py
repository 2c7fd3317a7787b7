"""Cores by affinity and by the quota of control groups, of both versions."""

import os

import pytest

from xcit_dino import cores


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"pod/cpu.max": "400000 100000", "pod/task/cpu.max": "max 100000"}, "0::/pod/task", 4.0),
        ({"pod/cpu.max": "400000 100000", "pod/task/cpu.max": "50000 100000"}, "0::/pod/task", 0.5),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "", 2.0),
        ({"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
          "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/job", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "", None),
        ({"cpu.max": "damaged"}, "0::/", None),
        ({}, "0::/elsewhere", None),
    ],
)  # fmt: skip
def test_the_quota_of_the_control_groups(files, own, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert cores.cgroup_quota(tmp_path, tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.0, 2), (0.5, 1), (2.5, 3), (99, 8)])
def test_the_smaller_of_quota_and_affinity(quota, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
    assert cores.usable_cores() == expected
