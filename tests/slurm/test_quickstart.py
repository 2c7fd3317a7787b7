"""The quickstart: its command line is right, and its table shows what was measured."""

from __future__ import annotations

import subprocess
import sys

from xcit_dino.options import options
from xcit_dino.provenance import record_result
from xcit_dino.slurm.stages import launch_config
from xcit_dino.slurm.tools.quickstart import QuickstartConfig, command_line, show


def test_its_command_line_is_one_of_the_launcher(tmp_path):
    config = QuickstartConfig(tmp_path / "a run", tmp_path / "some data")
    launch = launch_config(command_line(config, gpus=0), "xcit-dino quickstart")
    assert [stage.name for stage in launch.stages] == ["pretrain", "knn", "linear", "report"]
    assert launch.run == config.output_dir and launch.launch.cluster == "local"
    pretrain, knn, linear, report = (dict(options(stage.config)) for stage in launch.stages)
    assert pretrain["data_path"] == str(config.data_path)
    assert knn["baselines"] and linear["baselines"]
    assert {stage["output_dir"] for stage in (pretrain, knn, linear, report)} == {launch.run}


def test_the_table_names_the_lift_over_the_better_baseline(tmp_path, capsys):
    for network, top1 in {"": 62.5, "/random": 21.0, "/pixels": 30.0}.items():
        protocol = {"nb_knn": [20], "val_images": 1000}
        record_result(tmp_path, f"knn{network}", {"top1_k20": top1, "top5_k20": 90.0}, protocol)
        record_result(tmp_path, f"linear{network}", {"top1": top1 + 5}, {})
    show(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any("1,000 validation images" in line for line in lines)
    row = next(line for line in lines if "k-NN" in line)
    assert [word for word in row.replace("│", " ").split() if word[0] in "+0123456789"] == [
        "62.5", "21.0", "30.0", "+32.5",
    ]  # fmt: skip
    assert any(line.startswith("Report:") and "report.html" in line for line in lines)


def test_help_needs_no_torch():
    code = "import sys, xcit_dino.slurm.tools.quickstart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
