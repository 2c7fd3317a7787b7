"""The state of a run that may still be active, read from its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from xcit_dino.options import read_yaml
from xcit_dino.slurm import attempts, launched
from xcit_dino.slurm.watch import Tail
from xcit_dino.train.run.metrics import METRICS, Line, read_tries

RECENT = 20  # lines of metrics from which the speed is computed


@dataclass
class RunState:
    """State of a run; :meth:`refresh` reads what is new."""

    folder: Path
    lines: list[Line] = field(default_factory=list)
    """Lines of ``metrics.jsonl``."""
    tries: list[Line] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    """One line per stage of the launcher."""
    unfinished: bool = False
    """Whether a stage of the launcher is not finished."""

    def __post_init__(self) -> None:
        self.added = Tail(self.folder / METRICS)

    def refresh(self) -> None:
        """Read what has been written since the last call."""
        self.tries = read_tries(self.folder)
        config = self.folder / "config.yaml"
        self.options = self.options or (read_yaml(config) if config.is_file() else {})
        known = self.added.position
        new = [parsed(text) for text in self.added]
        if self.added.position < known:  # a restart has rewritten the file
            self.lines = []
        self.lines += [line for line in new if "step" in line]
        self.refresh_stages()

    def refresh_stages(self) -> None:
        """Read the states of the launcher's stages, if the launcher started this run."""
        if not launched.is_launched(self.folder):
            return
        stages = launched.all_stages(launched.read_launch(self.folder))
        known = [attempts.load(self.folder, stage) for stage in stages]
        self.unfinished = not all(stage.finished for stage in known)
        self.stages = [f"{k.stage} {k.state}{f' ({k.reason})' if k.reason else ''}" for k in known]

    @property
    def ended(self) -> bool:
        """Whether the run has ended and no stage will follow."""
        ended = bool(self.tries) and self.tries[-1]["event"] == "end"
        return ended and not self.unfinished

    @property
    def total(self) -> int:
        """Steps of the whole run; 0 if unknown."""
        return next((t["total_steps"] for t in self.tries[::-1] if "total_steps" in t), 0)

    def newest(self, name: str) -> float | None:
        """The last value of a metric."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        return [(line["step"], line[name]) for line in self.lines if name in line]

    def alarms(self) -> list[str]:
        """Kinds of collapse currently reported."""
        found = {n: v for line in self.lines for n, v in line.items() if n.startswith("alarm_")}
        return [name.removeprefix("alarm_").replace("_", " ") for name, on in found.items() if on]

    def steps_per_second(self) -> float:
        """Recent speed; 0 if unknown."""
        timed = [line for line in self.lines[-RECENT:] if "loss" in line and "time" in line]
        if len(timed) < 2:
            return 0.0
        seconds = moment(timed[-1]) - moment(timed[0])
        return (timed[-1]["step"] - timed[0]["step"]) / seconds if seconds > 0 else 0.0


def parsed(text: str) -> Line:
    """Parse a line of JSON; {} if damaged."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def moment(line: Line) -> float:
    """Time of a line, in seconds since the epoch."""
    return datetime.fromisoformat(line["time"]).timestamp()
