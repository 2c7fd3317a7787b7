"""``xcit-dino watch RUN``: a run's progress on this terminal, read from its folder alone.

So it works for a run on another machine whose file system is seen here, with or without the
launcher, and never touches the run.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from xcit_dino.errors import InputError
from xcit_dino.progress import clock
from xcit_dino.train.config import read_yaml, within
from xcit_dino.train.metrics import METRICS, Line, read_tries

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20  # lines of metrics from which speed and the time that is left are reckoned
SILENCE = 600.0  # seconds without news that are pointed out
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
    """Seconds between two looks at the folder."""
    once: bool = False
    """Show the present state and leave; so it is where the output is no terminal."""

    def __post_init__(self) -> None:
        within(self, 0.1, 3600, "every")


def run(config: WatchConfig) -> None:
    """Show the run until it ends; Ctrl-C leaves, and the run does not notice.

    Raises:
        InputError: there is no run.
    """
    from rich.console import Console
    from rich.live import Live

    if not config.run.is_dir():
        raise InputError(f"{config.run}: no such run folder")
    state = State(config.run)
    state.look()
    if not (state.lines or state.tries or state.options):
        raise InputError(f"{config.run}: holds no run (no config.yaml, metrics.jsonl, tries.jsonl)")
    console = Console()
    if config.once or not sys.stdout.isatty():
        console.print(view(state, console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(state, console.width), refresh=True)
            if state.over:
                return
            time.sleep(config.every)
            state.look()


@dataclass
class State:
    """What is known of a run; :meth:`look` reads what is new."""

    folder: Path
    lines: list[Line] = field(default_factory=list)
    """Of ``metrics.jsonl``."""
    tries: list[Line] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    """A line a stage of the launcher."""
    unfinished: bool = False
    """Whether the launcher has a stage that will go on."""
    position: int = 0

    def look(self) -> None:
        """Read what has been written since."""
        self.tries = read_tries(self.folder)
        config = self.folder / "config.yaml"
        self.options = self.options or (read_yaml(config) if config.is_file() else {})
        new = self.new_lines()  # which may empty what there was
        self.lines += new
        self.look_at_stages()

    def new_lines(self) -> list[Line]:
        """Whole lines that were added; all, when a restart has written the file anew."""
        path = self.folder / METRICS
        if not path.is_file():
            return []
        with open(path, "rb") as file:
            if path.stat().st_size < self.position:
                self.lines, self.position = [], 0
            file.seek(self.position)
            whole = file.read().rpartition(b"\n")[0]
        self.position += len(whole) + bool(whole)
        lines = [parsed(text) for text in whole.split(b"\n") if text]
        return [line for line in lines if "step" in line]

    def look_at_stages(self) -> None:
        """States of the launcher's stages, where the launcher started this run."""
        from xcit_dino.slurm import record

        if not (record.folder(self.folder) / "launch.json").is_file():
            return
        known = [record.load(self.folder, s) for s in record.read_launch(self.folder)["stages"]]
        self.unfinished = not all(stage.finished for stage in known)
        self.stages = [f"{k.stage} {k.state}{f' ({k.reason})' if k.reason else ''}" for k in known]

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        ended = bool(self.tries) and self.tries[-1]["event"] == "end"
        return ended and not self.unfinished

    @property
    def total(self) -> int:
        """Steps of the whole run; 0 where it is not known."""
        return next((t["total_steps"] for t in self.tries[::-1] if "total_steps" in t), 0)

    def newest(self, name: str) -> float | None:
        """The last value of a metric."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        return [(line["step"], line[name]) for line in self.lines if name in line]

    def alarms(self) -> list[str]:
        """Kinds of collapse that are reported and not over."""
        found = {n: v for line in self.lines for n, v in line.items() if n.startswith("alarm_")}
        return [name.removeprefix("alarm_").replace("_", " ") for name, on in found.items() if on]

    def steps_a_second(self) -> float:
        """Of late; 0 where it cannot be said."""
        timed = [line for line in self.lines[-RECENT:] if "loss" in line and "time" in line]
        if len(timed) < 2:
            return 0.0
        seconds = moment(timed[-1]) - moment(timed[0])
        return (timed[-1]["step"] - timed[0]["step"]) / seconds if seconds > 0 else 0.0


def parsed(text: bytes) -> Line:
    """A line of JSON; what is damaged is no line."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def moment(line: Line) -> float:
    """The time of a line, in seconds."""
    return datetime.fromisoformat(line["time"]).timestamp()


# -- the view --------------------------------------------------------------------------------------


def view(state: State, width: int) -> RenderableType:
    """Everything, as wide as the terminal."""
    from rich.console import Group
    from rich.text import Text

    arch = state.options.get("arch", "")
    parts: list[RenderableType] = [Text.assemble((str(state.folder), "bold"), f"  {arch}")]
    parts += [Text(" · ".join(state.stages), style="dim")] if state.stages else []
    parts += [progress_line(state, width), news(state)]
    parts += [Text(f"alarm: {kind} collapse", style="bold red") for kind in state.alarms()]
    parts.append(Text())
    parts += [values(state), Text()]
    for name, title in (("loss", "loss"), ("knn_top1", "k-NN top-1"), ("val_top1", "val top-1")):
        if len(points := state.series(name)) > 1:
            parts.append(curve(title, [value for _, value in points], width))
    return Group(*parts)


def progress_line(state: State, width: int) -> RenderableType:
    """Epoch, step, share and the time that is left."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    step = int(state.newest("step") or 0)
    words = [f"step {step:,}" + (f"/{state.total:,}" if state.total else "")]
    if state.total and (epochs := state.options.get("epochs")):
        words.insert(0, f"epoch {step * epochs / state.total:.1f}/{epochs}")
    if state.total > step and (rate := state.steps_a_second()) and not state.over:
        words.append(f"eta {clock((state.total - step) / rate)}")
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=state.total or 1, completed=step, width=min(40, width // 3))
    row.add_row(bar, "  ".join(words))
    return row


def news(state: State) -> RenderableType:
    """When it was last heard of, and how often it has started."""
    from rich.text import Text

    starts = sum(line["event"] == "start" for line in state.tries)
    words = [f"{starts} start{'s' if starts != 1 else ''}"] if starts else []
    last = next((line for line in reversed(state.lines) if "time" in line), None)
    style = "dim"
    if state.tries and state.tries[-1]["event"] == "end":
        end = state.tries[-1]
        words.append(f"ended at step {end['step']:,}: {end.get('reason', '')}")
    elif last is not None:
        ago = max(0.0, time.time() - moment(last))
        words.append(f"last news {clock(ago)} ago")
        if ago > SILENCE:
            style = "bold yellow"
            words.append("(silent: waiting in a queue, evaluating, hung or killed)")
    return Text("  ".join(words), style=style)


def values(state: State) -> RenderableType:
    """The newest numbers, and the accuracies."""
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
    """A line of blocks from the lowest to the highest of the values' means."""
    from rich.text import Text

    room = max(10, min(60, width - 34))
    size = -(-len(numbers) // room)
    groups = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    blocks = "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
    return Text.assemble((f"{title:<12}", "dim"), blocks, (f"  {low:.3g} to {high:.3g}", "dim"))
