"""A trainer without torch, with the real one's contract: it resumes, saves when told to stop, fails
on request. ``python -m tests.standin RUN NAME=VALUE...`` launches it as local processes.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from xcit_dino.errors import InputError, Stopped
from xcit_dino.slurm import launch
from xcit_dino.slurm.config import Launch, LaunchConfig, ResourceConfig, Stage
from xcit_dino.train import signals


@dataclass(frozen=True)
class StandinConfig:
    """What a run of the stand-in does."""

    output_dir: Path
    """Run folder; ``step`` holds the number of steps done."""
    steps: int = 3
    """Steps of the whole run."""
    seconds: float = 0.0
    """Duration of a step."""
    save_seconds: float = 0.0
    """Duration of saving, when told to stop; ``saving`` is there from its beginning."""
    show_environment: bool = False
    """Write the environment variables to ``environment``, a line each."""
    fail: str = ""
    """How it fails at step 2: ``always``, ``once``, ``pid`` (always, in other words), ``input``."""


def train(config: StandinConfig) -> None:
    """Count steps, one line each in ``steps``."""
    place = config.output_dir / "step"
    step = int(place.read_text()) if place.is_file() else 0
    if config.show_environment:
        (config.output_dir / "environment").write_text(
            "\n".join(f"{name}={value}" for name, value in os.environ.items())
        )
    while step < config.steps:
        time.sleep(config.seconds)
        step += 1
        with open(config.output_dir / "steps", "a") as log:
            log.write(f"{step} pid {os.getpid()}\n")
        fail(config, step)
        if (reason := signals.requested()) is not None:
            (config.output_dir / "saving").touch()
            time.sleep(config.save_seconds)
            place.write_text(str(step))
            raise Stopped(f"{reason} after step {step}")
    place.write_text(str(step))


def fail(config: StandinConfig, step: int) -> None:
    """Fail as asked."""
    marker = config.output_dir / "failed"
    if step != 2 or not config.fail or (config.fail == "once" and marker.exists()):
        return
    marker.touch()
    if config.fail == "input":
        raise InputError("--x: wrong")
    raise RuntimeError(f"went wrong in {os.getpid()}" if config.fail == "pid" else "went wrong")


def plan_of(run: Path, **options: object) -> Launch:
    """A launch of the stand-in."""
    config = StandinConfig(run, **options)  # type: ignore[arg-type]
    resources = ResourceConfig(ngpus=0, cpus_per_task=1)
    stage = Stage("pretrain", "tests.standin:train", config, resources)
    return Launch(LaunchConfig(resources=stage.resources, max_requeues=2), run, (stage,))


def start(plan: Launch) -> int:
    """Launch it as local processes, without the checks of real data."""
    return launch.start(plan, list(plan.stages), "local")


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:] if "=" not in word]
    given = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
    plans = [plan_of(f, **{name: eval(value) for name, value in given.items()}) for f in folders]
    sys.exit(launch.run_here(plans, "local"))
