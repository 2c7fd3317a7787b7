"""Mirrors of a run's log for dashboards: Weights & Biases, MLflow (``--logger``).

Each tracker gets the lines of ``metrics.jsonl``, the options, the pictures and the results, as one
run over all attempts. Calls go through a thread of its own: a server that is slow, fails or never
answers costs a warning, never a step. ``metrics.jsonl`` stays the record.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from xcit_dino.errors import InputError, one_line, warn
from xcit_dino.files import write_atomic

TRACKERS = "trackers.json"  # name -> id of the run there
WAIT = 20.0  # seconds for what is still to be sent, at the end of an attempt
PENDING = 10_000  # calls that may wait; more are dropped, which is said


class Tracker(Protocol):
    """One dashboard's run; called in the thread of its :class:`Mirror`."""

    def start(self, folder: Path, known: str | None, options: dict[str, Any]) -> str:
        """Open the run, or continue the ``known`` one; returns its id."""
        ...

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class Mlflow:
    """MLflow: server and experiment as its own variables say (``MLFLOW_TRACKING_URI``,
    ``MLFLOW_EXPERIMENT_NAME``); without a server, the folder mlruns where only the small package
    is installed."""

    def start(self, folder: Path, known: str | None, options: dict[str, Any]) -> str:
        import mlflow

        self.client, self.last = mlflow_client(), -1
        if known is not None:
            run = self.client.get_run(known)
            if "epoch" in run.data.metrics:  # what a killed attempt logged already
                history = self.client.get_metric_history(known, "epoch")
                self.last = max(value.step for value in history)
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "xcit-dino")
            experiment = mlflow.set_experiment(name)
            run = self.client.create_run(experiment.experiment_id, run_name=folder.name)
            for option, value in options.items():
                self.client.log_param(run.info.run_id, option, str(value)[:500])
        self.id: str = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        return self.id

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if step > self.last or not {"epoch"} & numbers.keys():
            now = int(1000 * time.time())
            values = [Metric(name, value, now, step) for name, value in numbers.items()]
            self.client.log_batch(self.id, values)
        for name, pixels in pictures.items():
            self.client.log_image(self.id, pixels, key=name.replace("/", "_"), step=step)

    def finish(self) -> None:
        self.client.set_terminated(self.id)


def mlflow_client() -> Any:
    """MLflow's client, for the server or folder that ``MLFLOW_TRACKING_URI`` names."""
    import mlflow
    from mlflow.tracking import MlflowClient

    if not os.environ.get("MLFLOW_TRACKING_URI") and find_spec("sqlalchemy") is None:
        mlflow.set_tracking_uri(Path("mlruns").absolute().as_uri())  # not its database
    if mlflow.get_tracking_uri().startswith(("file:", "/", ".")):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # who names a folder wants it
    return MlflowClient()


class Wandb:
    """Weights & Biases: project and mode as its own variables say (``WANDB_PROJECT``,
    ``WANDB_MODE=offline``)."""

    def start(self, folder: Path, known: str | None, options: dict[str, Any]) -> str:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "xcit-dino"), name=folder.name, id=known,
            dir=str(folder), config=options, resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        return str(self.run.id)

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, Any]) -> None:
        import wandb

        images = {name: wandb.Image(pixels) for name, pixels in pictures.items()}
        self.run.log({**numbers, **images}, step=step)

    def finish(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[[], Tracker]] = {"mlflow": Mlflow, "wandb": Wandb}
"""By the name of the option, which is that of the package too."""


class Mirror:
    """A tracker behind a thread; the first failure ends it for this attempt, with a warning."""

    def __init__(self, name: str, folder: Path, options: dict[str, Any]):
        self.name, self.folder, self.options = name, folder, options
        self.calls: queue.Queue[Callable[[Tracker], Any] | None] = queue.Queue(PENDING)
        self.failed, self.dropped = threading.Event(), 0
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers and pictures (uint8 [H, W, 3]) of a step."""
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        pictures = {
            name: value.copy()
            for name, value in values.items()
            if str(getattr(value, "dtype", "")) == "uint8"
        }
        self._put(lambda tracker: tracker.log(step, numbers, pictures))

    def close(self, wait: float = WAIT) -> None:
        """Send what is left, for ``wait`` seconds at most."""
        self._put(lambda tracker: tracker.finish())
        self._put(None)
        self.thread.join(wait)
        if self.thread.is_alive() and not self.failed.is_set():
            warn(f"--logger {self.name}: not everything was sent within {wait:g} s; it is in "
                 "metrics.jsonl")  # fmt: skip

    def _put(self, call: Callable[[Tracker], Any] | None) -> None:
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            if not self.dropped and not self.failed.is_set():
                warn(f"--logger {self.name}: does not answer; its lines are left out from here on")
            self.dropped += 1

    def _work(self) -> None:
        """In the thread."""
        try:
            tracker = KINDS[self.name]()
            known = read_ids(self.folder).get(self.name)
            number = tracker.start(self.folder, known, self.options)
            write_id(self.folder, self.name, number)
            while (call := self.calls.get()) is not None:
                call(tracker)
        except Exception as error:  # whatever a client, a server or a network raises
            self.failed.set()
            warn(
                f"--logger {self.name}: {one_line(error, 500)}; training continues without it, and "
                "the next attempt tries again"
            )
            while self.calls.get() is not None:  # nothing may wait for a place in the queue
                pass


def read_ids(folder: Path) -> dict[str, str]:
    """The trackers' runs of a run folder."""
    try:
        found = json.loads((folder / TRACKERS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_writing = threading.Lock()


def write_id(folder: Path, name: str, number: str) -> None:
    """Remember a tracker's run."""
    with _writing:
        write_atomic(folder / TRACKERS, json.dumps(read_ids(folder) | {name: number}) + "\n")


def check_installed(names: Iterable[str]) -> None:
    """Raise InputError for a tracker whose package is not installed."""
    from importlib.util import find_spec

    for name in names:
        if name in KINDS and find_spec(name) is None:
            raise InputError(
                f"--logger {name}: is not installed: pip install 'xcit-dino[{name}]', or leave it "
                "out"
            )


def mirrors(folder: Path, names: Iterable[str], options: dict[str, Any]) -> list[Mirror]:
    """The trackers of a run."""
    return [Mirror(name, folder, options) for name in names if name in KINDS]


def mirror_result(folder: Path, names: Iterable[str], step: int, metrics: dict[str, float]) -> None:
    """Add the numbers of an evaluation to the trackers that this run has been started on."""
    known = read_ids(folder)
    for mirror in mirrors(folder, [name for name in names if name in known], {}):
        mirror.add(step, metrics)
        mirror.close()
