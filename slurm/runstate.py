"""What is known of a run that may be going on, read from its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from xcit_dino.options import read_yaml
from xcit_dino.slurm import attempts
from xcit_dino.slurm.watch import Tail
from xcit_dino.train.run.metrics import METRICS, Line, read_tries

RECENT = 20  # lines of metrics from which the speed is reckoned


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

    def __post_init__(self) -> None:
        self.added = Tail(self.folder / METRICS)

    def look(self) -> None:
        """Read what has been written since."""
        self.tries = read_tries(self.folder)
        config = self.folder / "config.yaml"
        self.options = self.options or (read_yaml(config) if config.is_file() else {})
        known = self.added.position
        new = [parsed(text) for text in self.added]
        if self.added.position < known:  # a restart has written the file anew
            self.lines = []
        self.lines += [line for line in new if "step" in line]
        self.look_at_stages()

    def look_at_stages(self) -> None:
        """States of the launcher's stages, where the launcher started this run."""
        if not attempts.is_launched(self.folder):
            return
        stages = attempts.all_stages(attempts.read_launch(self.folder))
        known = [attempts.load(self.folder, stage) for stage in stages]
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


def parsed(text: str) -> Line:
    """A line of JSON; what is damaged is no line."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def moment(line: Line) -> float:
    """The time of a line, in seconds."""
    return datetime.fromisoformat(line["time"]).timestamp()
