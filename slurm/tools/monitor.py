"""``xcit-dino watch RUN``: a run's progress on this terminal, read from its folder alone.

It therefore works for a run on another machine with a shared file system, with or without the
launcher, and never affects the run.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from xcit_dino.errors import InputError, within
from xcit_dino.progress import clock
from xcit_dino.slurm import launched
from xcit_dino.slurm.runstate import RunState
from xcit_dino.train.run.activity import activity

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"
VALUES = {  # metric -> (name, format)
    "loss": ("loss", ".3f"), "teacher_entropy": ("teacher entropy", ".2f"), "kl": ("KL", ".3f"),
    "grad_norm": ("gradient norm", ".2f"), "lr": ("learning rate", ".2e"),
    "images_per_s": ("images/s", ",.0f"), "data_wait": ("data wait", ".1%"),
    "memory_gib": ("memory, GiB", ".1f"),
}  # fmt: skip


@dataclass(frozen=True)
class WatchConfig:
    """A run's progress, live."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run folder."""
    every: float = 2.0
    """Seconds between updates."""
    once: bool = False
    """Show the current state and exit; the default if the output is not a terminal."""

    def __post_init__(self) -> None:
        within(self, 0.1, 3600, "every")


def run(config: WatchConfig) -> None:
    """Show the run until it ends; Ctrl-C exits without affecting the run.

    Raises:
        InputError: there is no run.
    """
    from rich.console import Console
    from rich.live import Live

    if seeds := launched.seed_runs(config.run):
        names = ", ".join(map(str, seeds))
        raise InputError(f"{config.run}: contains no run; watch one of {names}")
    if not config.run.is_dir():
        raise InputError(f"{config.run}: no such run folder")
    state = RunState(config.run)
    state.refresh()
    if not (state.lines or state.tries or state.options or state.stages):
        raise InputError(f"{config.run}: contains no run (no config.yaml, metrics.jsonl, launch)")
    console = Console()
    if config.once or not sys.stdout.isatty():
        console.print(view(state, console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(state, console.width), refresh=True)
            if state.ended:
                return
            time.sleep(config.every)
            state.refresh()


def view(state: RunState, width: int) -> RenderableType:
    """The whole display, as wide as the terminal."""
    from rich.console import Group
    from rich.text import Text

    arch = state.options.get("arch", "")
    parts: list[RenderableType] = [Text.assemble((str(state.folder), "bold"), f"  {arch}")]
    parts += [Text(" · ".join(state.stages), style="dim")] if state.stages else []
    parts += [progress_line(state, width), status_line(state)]
    parts += [Text(f"alarm: {kind} collapse", style="bold red") for kind in state.alarms()]
    parts.append(Text())
    parts += [values(state), Text()]
    for name, title in (("loss", "loss"), ("knn_top1", "k-NN top-1"), ("val_top1", "val top-1")):
        if len(points := state.series(name)) > 1:
            parts.append(curve(title, [value for _, value in points], width))
    return Group(*parts)


def progress_line(state: RunState, width: int) -> RenderableType:
    """Progress bar, epoch, step and remaining time."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    step = int(state.newest("step") or 0)
    words = [f"step {step:,}" + (f"/{state.total:,}" if state.total else "")]
    if state.total and (epochs := state.options.get("epochs")):
        words.insert(0, f"epoch {step * epochs / state.total:.1f}/{epochs}")
    if state.total > step and (rate := state.steps_per_second()) and not state.ended:
        words.append(f"eta {clock((state.total - step) / rate)}")
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=state.total or 1, completed=step, width=min(40, width // 3))
    row.add_row(bar, "  ".join(words))
    return row


def status_line(state: RunState) -> RenderableType:
    """Number of starts, and whether the run is active, has ended, or was killed."""
    from rich.text import Text

    starts = sum(line["event"] == "start" for line in state.tries)
    words = [f"{starts} start{'s' if starts != 1 else ''}"] if starts else []
    found = activity(state.folder, state.tries, state.lines)
    words += [found.text] if found.text else []
    warned = found.stale or found.state == "dead"
    return Text("  ".join(words), style="bold yellow" if warned else "dim")


def values(state: RunState) -> RenderableType:
    """The newest metrics, and the accuracies."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    cells = [
        (title, format(value, form))
        for name, (title, form) in VALUES.items()
        if (value := state.newest(name)) is not None
    ]
    for name, title in (("knn_top1", "k-NN top-1"), ("val_top1", "validation top-1")):
        if points := state.series(name):
            best = max(value for _, value in points)
            cells.append((title, f"{points[-1][1]:.1f} at step {points[-1][0]:,}, best {best:.1f}"))
    for first in range(0, len(cells), 2):
        pair = cells[first : first + 2]
        table.add_row(*(text for title, value in pair for text in (f"[dim]{title}[/]", value)))
    return table


def curve(title: str, numbers: list[float], width: int) -> RenderableType:
    """A sparkline of block characters, scaled from the lowest to the highest mean."""
    from rich.text import Text

    room = max(10, min(60, width - 34))
    size = -(-len(numbers) // room)
    groups = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    blocks = "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
    return Text.assemble((f"{title:<12}", "dim"), blocks, (f"  {low:.3g} to {high:.3g}", "dim"))
