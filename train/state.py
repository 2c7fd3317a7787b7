"""The complete training state in one object, and atomic checkpoints of it.

All randomness of a step (data order, crops, augmentation, drop-path) is a function of seed and
step, so the step number alone is the random state and the position in the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit_dino.errors import InputError, RunError, one_line, warn
from xcit_dino.files import write_atomic
from xcit_dino.models.checkpoints import (
    all_checkpoints,
    is_intact,
    newest_intact,
    read_metadata,
    remove_unless_in_use,
    step_of,
    weights_in,
)
from xcit_dino.provenance import now
from xcit_dino.train.async_copy import Hashed, HostCopy, first_nonfinite, sync_folder
from xcit_dino.train.distributed import dist

FORMAT = 2


@dataclass
class TrainState:
    """Networks, optimizer, gradient scaler, identity of data and options, and the step."""

    modules: dict[str, nn.Module]  # student, teacher and loss (its center)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: str  # checksum of the index
    global_batch: int
    step: int = 0
    frozen: str = ""  # checksum of a frozen teacher, which checkpoints do not hold
    rollbacks: int = 0  # each halves the learning rate of what follows
    log: dict[str, Any] = field(default_factory=dict)  # running sums of RunLog and the alarms

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, readable with ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "step": self.step,
            "data": self.data,
            "global_batch": self.global_batch,
            "frozen": self.frozen,
            "rollbacks": self.rollbacks,
            "log": self.log,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything; strict.

        Raises:
            InputError: the run was trained on other data, with another global batch, or with
                another frozen teacher.
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
        if state.get("frozen", "") != self.frozen:  # runs of earlier versions have none
            raise InputError(
                f"--teacher_path: the frozen teacher changed under this run (its weights have "
                f"checksum {self.frozen or 'none'}, the checkpoint {state['frozen']}); restore "
                "its file, or start another --output_dir"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self._load_optimizer(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.rollbacks = state["rollbacks"]
        self.log = state.get("log", {})  # runs of earlier versions have none

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Moments and settings; a layer's share of the learning rate is that of the options."""
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(saved)
        except ValueError as error:  # groups of other parameters
            raise InputError(
                f"the optimizer of the checkpoint has {len(saved['param_groups'])} groups of "
                f"parameters, and this run {len(scales)}: keep --layer_decay as it was, or start "
                "another --output_dir"
            ) from error
        for group, scale in zip(self.optimizer.param_groups, scales, strict=True):
            group["lr_scale"] = scale


class Checkpoints(AbstractContextManager):
    """The ``checkpoints/`` folder of a run: ``checkpoint-STEP.pth``, each with a small JSON.

    The JSON (step, size, SHA-256, time) is written first and the checkpoint renamed to its final
    name last: an existing one is complete, and one that does not match its JSON is damaged.

    Writing happens in a thread, from a copy in host memory; training waits only for the copy. As a
    context manager, it waits for the last one at the end.
    """

    def __init__(self, run_folder: Path, keep: int = 2):
        self.folder = run_folder / "checkpoints"
        self.keep = keep
        self.good: int | None = None
        """A step up to which the run may have to go back; its checkpoint, or the last one before
        it, is not dropped."""
        self._damaged: list[Path] = []
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: dict[str, Any], permanent: bool = False) -> Path:
        """Start writing a checkpoint, after the previous one; older ones beyond ``keep`` are
        deleted.

        If the file system refuses (full, read-only, no permission), a warning is printed, the
        existing checkpoints stay, and the next call tries again.

        Returns:
            Its final path; see :meth:`wait`.

        Raises:
            Exception: raised while writing the previous one, other than by the file system.
        """
        with contextlib.suppress(RunError):  # already reported, and this is the next try
            self.wait()
        path = self.folder / f"checkpoint-{state['step']:08d}.pth"
        self._thread = threading.Thread(
            target=self._write,
            args=(self._copy.take(state), path, permanent),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        return path

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete.

        Raises:
            RunError: the file system refused the last one, or it was non-finite.
        """
        self._join()
        error, self._error = self._error, None
        if isinstance(error, OSError | RunError):
            there = self.all()
            kept = f"{there[-1].name} is intact" if there else "there is none yet"
            raise RunError(
                f"the last checkpoint could not be written to {self.folder} ({error}); {kept}: "
                "fix that, and the same command resumes from there"
            ) from error
        if error is not None:
            raise error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self._join()  # if the run ends for another reason, that one is shown

    def _join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def newest(self) -> Path | None:
        """The newest intact checkpoint; damaged ones are reported and skipped. Read-only.

        To be called on all ranks: rank 0 looks, for all of them.
        """
        return dist.from_main(self._newest)

    def _newest(self) -> Path | None:
        self._join()
        self._damaged = []
        for path in reversed(self.all()):
            with contextlib.suppress(FileNotFoundError):
                if is_intact(path):
                    return path
                warn(f"{path} is damaged and is skipped")
                self._damaged.append(path)
        return None

    def all(self) -> list[Path]:
        """All checkpoints, intact or not, oldest first."""
        return all_checkpoints(self.folder)

    def clean(self) -> None:
        """Remove partial files of a killed process, and rename what :meth:`newest` found
        damaged to ``*.damaged``; for the owner of the run folder only."""
        self._join()
        for path in self._damaged:
            warn(f"{path} is damaged; set aside as {path.name}.damaged")
            os.replace(path, path.with_name(path.name + ".damaged"))
            path.with_suffix(".json").unlink(missing_ok=True)
        self._damaged = []
        for path in self.folder.glob(".checkpoint-*.tmp"):
            path.unlink()
        for path in self.folder.glob("checkpoint-*.json"):
            if not path.with_suffix(".pth").exists():
                path.unlink()

    def _write(self, copy: HostCopy, path: Path, permanent: bool) -> None:
        """In the thread: write the file, its JSON, rename, delete old ones."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            state = copy.ready()
            if place := first_nonfinite(state):
                raise RunError(f"{path.name} was not written: {place} is non-finite")
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                output = Hashed(file)
                torch.save(state, output)  # type: ignore[arg-type] # anything with write() works
                output.finish()
            facts = {"step": state["step"], "bytes": output.bytes, "sha256": output.checksum}
            facts |= {"permanent": permanent, "time": now()}
            write_atomic(path.with_suffix(".json"), json.dumps(facts) + "\n")
            os.replace(temporary, path)
            sync_folder(self.folder)  # before older ones are deleted
            self._drop_old()
        except BaseException as error:
            self._error = error
            with contextlib.suppress(OSError):
                temporary.unlink()
            warn(
                f"{error}; training continues, and the next checkpoint is attempted when it is due"
            )

    def drop_after(self, step: int) -> None:
        """Give up the checkpoints of later steps than ``step``."""
        self._join()
        for path in self.all():
            if step_of(path) > step:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    def _drop_old(self) -> None:
        passing = [p for p in self.all() if not read_metadata(p).get("permanent", True)]
        good = [p for p in self.all() if self.good is not None and step_of(p) <= self.good][-1:]
        for path in passing[: -self.keep]:
            if path not in good:
                remove_unless_in_use(path)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """See :func:`newest_intact`; to be called on all ranks."""
    return dist.from_main(lambda: newest_intact(run_folder))


def has_checkpoint(run_folder: Path) -> bool:
    """Whether a run folder contains an intact checkpoint, which then has all weights needed; to be
    called on all ranks."""
    found = Checkpoints(run_folder).all()
    return dist.from_main(lambda: any(is_intact(path) for path in reversed(found)))


def weights_file(path: Path, option: str) -> Path:
    """A weights file, or that of a folder; rank 0 looks, for all of them.

    Raises:
        InputError: neither.
    """
    return dist.from_main(lambda: _weights_file(path, option))


def _weights_file(path: Path, option: str) -> Path:
    found = weights_in(path) if path.is_dir() else path
    if found is None:
        raise InputError(f"{option} {path}: no checkpoint in this folder; train first")
    if not found.is_file():
        raise InputError(f"{option} {path}: no such file")
    return found


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint without executing anything in it.

    Raises:
        InputError: not a checkpoint of this project, or unreadable.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, OS, EOF
        reason = one_line(error, 160)
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a training checkpoint of xcit-dino (format {FORMAT})")
    return state
