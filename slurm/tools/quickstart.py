"""``xcit-dino quickstart``: built-in images -> shards -> pretraining -> k-NN and linear probe ->
report.

The same launcher as ``python slurm/launch.py``, on this machine, with a recipe that takes minutes
on two cores. Nothing is downloaded, and all results are determined by the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xcit_dino.train.config import CONFIGS

STAGES = "pretrain,knn,linear,report"


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole pipeline on built-in images, in minutes."""

    output_dir: Path = Path("runs/quickstart")
    """The run folder; an interrupted run resumes, a finished one only prints its results."""
    data_path: Path = Path("shards/demo")
    """Folder in which the images are created, unless they exist."""


def run(config: QuickstartConfig) -> int:
    """Run all stages and print the accuracies; returns the exit code."""
    from xcit_dino.data.pack.demo import make
    from xcit_dino.data.shards.config import DemoConfig  # here, so that --help stays fast
    from xcit_dino.data.shards.index import INDEX
    from xcit_dino.slurm import launch
    from xcit_dino.slurm.stages import launch_config

    if not (config.data_path / "val" / INDEX).is_file():
        make(DemoConfig(dst=config.data_path))
    gpus = launch.available_gpus("local", None, dry_run=False) or 0
    code = launch.run(launch_config(command_line(config, min(gpus, 1)), "xcit-dino quickstart"))
    if code == 0:
        show(config.output_dir)
    return code


def command_line(config: QuickstartConfig, gpus: int) -> list[str]:
    """The equivalent arguments of ``python slurm/launch.py``."""
    return [
        *("--config", str(CONFIGS / "pretrain" / "quickstart.yaml")),
        *("--data_path", str(config.data_path)),
        *("--output_dir", str(config.output_dir)),
        *("--cluster", "local", "--ngpus", str(gpus), "--stages", STAGES),
        *("--knn.baselines", "true", "--knn.num_workers", "2"),
        *("--linear.baselines", "true", "--linear.num_workers", "2", "--linear.epochs", "30"),
    ]


def show(folder: Path) -> None:
    """Print a table of accuracies, and the path of the report."""
    from rich.console import Console
    from rich.table import Table

    from xcit_dino.report.compare import baseline
    from xcit_dino.train.run.reader import EVALUATIONS, NETWORKS, headline, read_run

    run = read_run(folder)
    images = run.results["knn"]["protocol"]["val_images"]
    shown = {name: NETWORKS[name] for name in ("", "random", "pixels")}
    table = Table(title=f"Top-1 accuracy on {images:,} validation images, %")
    for title in ("", *shown.values(), "Lift"):
        table.add_column(title, justify="right" if title else "left")
    for evaluation in ("knn", "linear"):
        entry = run.results[evaluation]
        found = [baseline(run, entry, f"{evaluation}/{network}") for network in shown if network]
        ours, *baselines = (headline(e["metrics"]) or 0.0 if e else 0.0 for e in (entry, *found))
        others = [f"{value:.1f}" for value in baselines]
        lift = f"{ours - max(baselines):+.1f}"
        table.add_row(EVALUATIONS[evaluation], f"[bold]{ours:.1f}[/]", *others, lift)
    console = Console()
    console.print(table)
    console.print(f"Report: {(folder / 'report.html').resolve()}", soft_wrap=True, highlight=False)
