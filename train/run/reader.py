"""Read a run folder; missing or damaged parts are noted, the rest is returned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from xcit_dino.errors import InputError
from xcit_dino.options import read_yaml
from xcit_dino.provenance import read_results
from xcit_dino.train.run.activity import Activity, activity
from xcit_dino.train.run.metrics import Line, read_metrics, read_tries

T = TypeVar("T")
NETWORKS = {
    "": "Pretrained",
    "random": "Random weights",
    "pixels": "Raw pixels",
    "copy": "First mask repeated",
}
TRAINED = {"": "Last weights", "ema": "Averaged weights", "head": "Backbone and head"}
EVALUATIONS = {  # results.json name -> title, in the order of the report
    "knn": "k-NN",
    "linear": "Linear probe",
    "linear-dino": "Linear probe, augmented",
    "finetune": "Finetuned",
    "distill": "Distilled",
    "evaluate": "Classifier",
    "segment": "Segmentation, mean IoU",
    "detect": "Detection, box AP",
    "knn-few": "k-NN, few labels",
    "linear-few": "Linear probe, few labels",
    "duplicates": "Near-duplicates",
    "masks": "Attention masks, Jaccard",
    "retrieve": "Retrieval",
    "propagate": "Video propagation, J&F",
}
CONTINUED = ("finetune", "distill", "segment", "detect")  # folders inside a run that continue it
# metric of a headline -> its name
HEADLINES = {
    "top1": "top-1",
    "j_and_f": "J&F",
    "miou": "mean IoU",
    "jaccard": "Jaccard",
    "ap": "box AP",
    "r2": "R2",
    "map_medium": "mAP Medium",
    "map_strong": "mAP strong",
    "map": "mAP",
}
BY_K = re.compile(r"(top1|map|r2)_k(\d+)")
HEADLINE_K = 20  # "20 is usually working the best" (DINO eval_knn.py)


@dataclass(frozen=True)
class Run:
    """Content of a run folder, and what is missing."""

    folder: Path
    config: dict[str, Any]
    metrics: list[Line]
    tries: list[Line]
    results: dict[str, Any]
    """Entries of ``results.json``, with those of the finetuning and distillation inside; the newest
    of a name under that name, those of other protocols under ``NAME@DIGEST``."""
    absent: list[str] = field(default_factory=list)
    """Messages about missing parts."""
    label: str = ""
    """Display name, unique among the runs shown."""

    @property
    def activity(self) -> Activity:
        """Whether it is active, has ended, or was killed."""
        return activity(self.folder, self.tries, self.metrics)

    @property
    def name(self) -> str:
        return self.label or self.folder.resolve().name

    @property
    def kind(self) -> str:
        """``pretrain``, ``finetune``, ``distill``, ``segment`` or ``detect``: whose options these
        are."""
        if "cat_max_ratio" in self.config:
            return "segment"
        if "anchor_sizes" in self.config:
            return "detect"
        if "distillation_type" in self.config:
            return "distill"
        return "finetune" if "input_size" in self.config else "pretrain"

    def entry(self, evaluation: str, network: str = "") -> dict[str, Any] | None:
        """The newest result of an evaluation."""
        return self.results.get(f"{evaluation}/{network}" if network else evaluation)

    def entries(self, name: str) -> list[dict[str, Any]]:
        """All results of a name (``knn``, ``knn/random``), the newest first."""
        older = [entry for key, entry in self.results.items() if key.startswith(f"{name}@")]
        older.sort(key=lambda entry: str(entry.get("time", "")), reverse=True)
        return ([self.results[name]] if name in self.results else []) + older

    def top1(self, evaluation: str, network: str = "") -> float | None:
        """Headline accuracy in percent, or None where it was not measured."""
        entry = self.entry(evaluation, network)
        return None if entry is None else headline(entry["metrics"])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several run folders; those with the same name are shown with their paths.

    Raises:
        InputError: one contains nothing of a run.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        replace(run, label=str(run.folder)) if names.count(run.name) > 1 else run for run in runs
    ]


def read_run(folder: Path) -> Run:
    """Read a run folder; everything but the folder may be missing.

    Raises:
        InputError: it contains nothing of a run.
    """
    absent: list[str] = []

    def attempt(read: Callable[[], T], empty: T) -> T:
        try:
            return read()
        except (OSError, ValueError, InputError) as error:
            absent.append(f"{folder}: not readable ({error})")
            return empty

    path = folder / "config.yaml"
    options = attempt(lambda: read_yaml(path) if path.is_file() else {}, {})
    metrics = [line for line in attempt(lambda: read_metrics(folder), []) if "step" in line]
    results = attempt(lambda: read_results(folder), {})
    for inner in CONTINUED:
        results = results | attempt(lambda at=folder / inner: read_results(at), {})
    tries = attempt(lambda: read_tries(folder), [])
    if not (options or metrics or results):
        raise InputError(f"{folder}: no run in it (no config.yaml, metrics.jsonl or results.json)")
    whole = {name: entry for name, entry in results.items() if is_whole(entry)}
    run = Run(folder, options, metrics, tries, whole, absent)
    absent += [f"result {name}: of another version" for name in results.keys() - whole.keys()]
    absent += missing(run)
    return run


def is_whole(entry: Any) -> bool:
    """Whether a result has the current format."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("metrics"), dict)
        and isinstance(entry.get("protocol"), dict)
        and all(isinstance(value, int | float) for value in entry["metrics"].values())
    )


def missing(run: Run) -> list[str]:
    """What is missing, and how to obtain it."""
    words = []
    if not run.config:
        words.append("options: no config.yaml")
    if not run.metrics:
        words.append("curves: no metrics.jsonl")
    if not run.results:
        command = f"; with labels: xcit-dino knn --output_dir {run.folder}"
        remedy = command if run.kind == "pretrain" else ""
        words.append(f"accuracies: nothing evaluated yet{remedy}")
    if run.activity.state not in ("new", "ended"):
        words.append(f"the end: this run is {run.activity.text}")
    elif run.metrics and not run.tries:
        words.append("restarts: not recorded by the version that wrote this run")
    return words


def in_order(names: Iterable[str]) -> list[str]:
    """Names of results, those of the known evaluations first."""
    known = list(EVALUATIONS)

    def place(name: str) -> tuple[int, str]:
        evaluation = bare(name).partition("/")[0]
        return (known.index(evaluation) if evaluation in known else len(known), name)

    return sorted(names, key=place)


def bare(key: str) -> str:
    """``knn/random@1a2b3c4d`` -> ``knn/random``: the name of a result of whatever protocol."""
    return key.partition("@")[0]


def headline(metrics: dict[str, float]) -> float | None:
    """Top-1 of a result (mAP of several labels, R2 of values); of a k-NN result that of k = 20, or
    of its smallest k; J&F of a propagation, the mean IoU of a segmentation, the AP of a detection,
    mAP of a retrieval."""
    for name in HEADLINES:
        if name in metrics:
            return metrics[name]
    name = metric_by_k(metrics)
    return metrics[f"{name}_k{headline_k(metrics)}"] if name else None


def metric_by_k(metrics: dict[str, float]) -> str:
    """Of which a k-NN result has a value for each k: ``top1``, ``map`` or ``r2``; "" of others."""
    return next((found[1] for name in metrics if (found := BY_K.fullmatch(name))), "")


def ks_of(metrics: dict[str, float]) -> list[int]:
    """The k's of a k-NN result, ascending."""
    return sorted(int(found[2]) for name in metrics if (found := BY_K.fullmatch(name)))


def headline_k(metrics: dict[str, float]) -> int:
    """The k of the headline."""
    ks = ks_of(metrics)
    return HEADLINE_K if HEADLINE_K in ks else ks[0]


def title_of(name: str, metrics: dict[str, float]) -> str:
    """``knn/random`` -> ``k-NN, k = 20: random weights``."""
    evaluation, _, network = bare(name).partition("/")
    title = EVALUATIONS.get(evaluation, evaluation)
    if ks_of(metrics):
        title += f", k = {headline_k(metrics)}"
    words = (NETWORKS | TRAINED).get(network, network) if network else ""
    return f"{title}: {words.lower()}" if words else title
