"""Cores by affinity and by the quota of control groups, of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xcit_dino import cores
from xcit_dino.slurm import launched


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


WITHOUT_PROC = """
import os
import subprocess
import sys
from pathlib import Path
del os.sched_getaffinity
from xcit_dino.cli import main
small = ["--num_workers", "0", "--device", "cpu", "--output_dir", "run"]
main(["pretrain", "--arch", "xcit_pico_6_p8", "--data_path", SHARDS, "--epochs", "1", *small,
      "--warmup_epochs", "0", "--batch_size_per_gpu", "10", "--knn_every", "0",
      "--global_crops_size", "16", "--local_crops_number", "0", "--out_dim", "16"])
main(["knn", "--nb_knn", "5", *small])
"""


def test_the_start_of_a_process_without_proc(monkeypatch):
    """`ps` prints it; on Linux that needs /proc itself, so that only its own half is tried."""
    monkeypatch.setattr(launched, "PROC", Path("/nowhere"))
    assert launched.process_start_time() == launched.process_start_time(os.getpid()) != ""
    assert launched.process_start_time(2**22 + 1) == ""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="hides /proc, which needs root")
def test_commands_do_without_proc_and_affinity(shards, tmp_path):
    """As on macOS. The file system of processes is hidden, in a mount namespace of its own."""
    (tmp_path / "work.py").write_text(f"SHARDS = {str(shards)!r}\n" + WITHOUT_PROC)
    hidden = f"mount -t tmpfs none /proc && ! ls /proc/self && exec {sys.executable} work.py"
    line = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hidden]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("no mount namespaces here")
    assert done.returncode == 0, done.stderr
    assert "first step" in done.stdout + done.stderr and (tmp_path / "run/results.json").is_file()
