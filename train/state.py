"""All that changes during a run, in one object; checkpoints that are whole or not there.

What is random in a step (data order, crops, augmentation, drop-path) is a function of seed and
step, so the step number is the whole random state and the whole data cursor.
"""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.train.provenance import file_checksum, now, write_atomic

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{8})\.pth")


@dataclass
class TrainState:
    """Networks, optimiser, gradient scaler, which data, and the number of steps done."""

    modules: dict[str, nn.Module]  # student, teacher and loss (its centre)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: str  # checksum of the index
    global_batch: int
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, readable with ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "step": self.step,
            "data": self.data,
            "global_batch": self.global_batch,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything; strict.

        Raises:
            InputError: the run was trained on other data, or with another global batch.
        """
        if state["data"] != self.data:
            raise InputError(
                f"--data_path: the shards changed under this run (index {self.data[:12]}, the "
                f"checkpoint has {state['data'][:12]}); restore them, or start another "
                "--output_dir"
            )
        if state["global_batch"] != self.global_batch:
            raise InputError(
                f"the global batch is {self.global_batch} and was {state['global_batch']}: keep "
                "processes x --batch_size_per_gpu x --accum_iter as it was, or start another "
                "--output_dir"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


class Checkpoints:
    """The ``checkpoints/`` folder of a run: ``checkpoint-STEP.pth`` and a small JSON beside each.

    The JSON (step, size, SHA-256, time) is written last: a checkpoint without it is not whole.
    """

    def __init__(self, run_folder: Path, keep: int = 2):
        self.folder = run_folder / "checkpoints"
        self.keep = keep

    def save(self, state: dict[str, Any], permanent: bool = False) -> Path:
        """Write one atomically, then drop older ones beyond ``keep``; permanent ones stay."""
        path = self.folder / f"checkpoint-{state['step']:08d}.pth"
        content = io.BytesIO()
        torch.save(state, content)
        write_atomic(path, content.getvalue())
        facts = {
            "step": state["step"],
            "bytes": path.stat().st_size,
            "sha256": file_checksum(path),
            "permanent": permanent,
            "time": now(),
        }
        write_atomic(path.with_suffix(".json"), json.dumps(facts) + "\n")
        self._drop_old()
        return path

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are renamed to ``*.damaged`` and said so."""
        for path in reversed(self.all()):
            facts = json.loads(path.with_suffix(".json").read_text())
            if path.stat().st_size == facts["bytes"] and file_checksum(path) == facts["sha256"]:
                return path
            print(f"warning: {path} is damaged; set aside as {path.name}.damaged", flush=True)
            os.replace(path, path.with_name(path.name + ".damaged"))
            path.with_suffix(".json").unlink()
        return None

    def all(self) -> list[Path]:
        """Checkpoints with their JSON beside them, oldest first."""
        paths = sorted(p for p in self.folder.glob("checkpoint-*.pth") if NAME.fullmatch(p.name))
        return [p for p in paths if p.with_suffix(".json").is_file()]

    def _drop_old(self) -> None:
        passing = [
            p for p in self.all() if not json.loads(p.with_suffix(".json").read_text())["permanent"]
        ]
        for path in passing[: -self.keep]:
            path.with_suffix(".json").unlink()
            path.unlink()


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    return Checkpoints(run_folder).newest()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint without executing anything in it.

    Raises:
        InputError: not a checkpoint of this project, or unreadable.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, OS, EOF
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a training checkpoint of xcit-dino (format {FORMAT})")
    return state
