"""The Markdown model card of an exported file: architecture, data, recipe, results with protocols,
intended use and loading code. Everything in it is read from the files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.files import file_checksum, write_atomic
from xcit_dino.inputs import InputSettings
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.card_code import (
    channels_text,
    format_values,
    loading_code,
    preprocessing_code,
)
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.xcit import XCiT

RECIPE = (  # the main options; all of them follow below
    "epochs batch_size_per_gpu accum_iter lr min_lr warmup_epochs weight_decay weight_decay_end "
    "drop_path_rate momentum_teacher teacher_temp out_dim global_crops_number global_crops_size "
    "global_crops_scale local_crops_number local_crops_size local_crops_scale precision seed"
).split()
IN_ROW = {"evaluation", "weights", "val_index", "train_index", "recipe", "lrs", "arch", "network"}
IN_ROW |= {"nb_knn"}  # k is in the row's title
BASELINES = {"random": "random weights", "pixels": "raw pixels"}
BASELINE_DIFFERS = frozenset("arch weights network seed side features layers".split())


def write(
    output: Path, source: Path, arch: str, network: str, model: nn.Module, results: Path | None
) -> Path:
    """Write ``birds.onnx.md`` for ``birds.onnx``, just exported from ``source``; returns its path.

    Args:
        network: teacher, student, model or model_ema of the source.
        results: a results.json; default: that of the source's run folder. Only accuracies of
            this network are used.
    """
    settings = input_settings(source, network) or InputSettings()
    path = output.with_name(f"{output.name}.md")
    write_atomic(path, text(output, source, arch, network, model, results, settings))
    return path


def text(
    file: Path,
    source: Path,
    arch: str,
    network: str,
    model: Any,
    results: Path | None,
    settings: InputSettings,
    *,
    name: str | None = None,
    hub: bool = False,
) -> str:
    """The card of an exported file, Markdown.

    Args:
        network, results: see :func:`write`.
        name: of what was exported, where it is not the file's.
        hub: whether it lies in a folder for the Hugging Face hub, whose cards begin with YAML.
    """
    tree = formats.read(source)
    options = yaml.safe_load(tree["config"]) if isinstance(tree.get("config"), str) else {}
    parts = [
        *([front_matter(model)] if hub else []),
        f"# {name or file.stem}",
        summary(arch, network, model, options),
        facts_table(file, source, arch, network, model, tree, settings),
        "## Data",
        data_section(options, tree),
        "## Recipe",
        recipe_section(options),
        "## Results",
        results_table(matching_results(source, network, results), all_results(source, results)),
        *class_section(matching_results(source, network, results), model),
        "## Intended use",
        USE.format(kind="classification of its classes" if model.num_classes else "features"),
        "## How to load",
        loading_code(file, arch, model, settings, hub),
        "## Preprocessing",
        preprocessing_code(settings),
        "## License",
        LICENSE,
        "## Citation",
        CITATION if "xcit" in arch else CITATION.split("\n", 2)[2],
    ]
    return "\n\n".join(parts) + "\n"


LICENSE = """Not chosen yet: the files do not name one. Whoever publishes these weights writes it
here, having checked the terms of the training images and of the weights that the training began
with."""


def front_matter(model: Any) -> str:
    """What the hub sorts models by. No license: the files do not name one."""
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    license = "# license: add one, such as apache-2.0"
    return f"---\nlibrary_name: timm\n{license}\ntags:\n- timm\n- {task}\n---"


USE = """Image {kind}: as a frozen backbone for nearest neighbors and linear classifiers, or as the
start of finetuning, distillation, detection and segmentation. It carries the biases of its training
images. It was not made for, or tested in, decisions about people."""

CITATION = """- El-Nouby et al., *XCiT: Cross-Covariance Image Transformers*, NeurIPS 2021,
  arXiv:2106.09681
- Caron et al., *Emerging Properties in Self-Supervised Vision Transformers* (DINO), ICCV 2021,
  arXiv:2104.14294"""


def summary(arch: str, network: str, model: Any, options: dict[str, Any]) -> str:
    """One sentence."""
    how = "with DINO, without labels" if "teacher_temp" in options else "as recorded in its file"
    what = f"classifier of {model.num_classes} classes" if model.num_classes else "backbone"
    kind = f"An XCiT {what}" if arch.startswith("xcit") else f"A {what}"
    return f"{kind} (`{arch}`, the {network}), trained {how}."


def facts_table(
    output: Path,
    source: Path,
    arch: str,
    network: str,
    model: Any,
    tree: formats.Tree,
    settings: InputSettings,
) -> str:
    """Table of the file's and the network's properties."""
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "architecture": f"`{arch}`, {parameters / 1e6:.1f} M parameters",
        "output": f"{model.num_classes} classes" if model.num_classes else
        f"{model.embed_dim} features",
        "input": channels_text(settings)
        + (f", sides in multiples of {model.patch_size}" if isinstance(model, XCiT) else "")
        + (f", evaluated at {settings.size} px" if settings.size else "")
        + f", resized by {settings.interpolation} interpolation, mean "
        f"{format_values(settings.mean)}, std {format_values(settings.std)}",
        "taken from": f"`{source.name}`, its {network}, SHA-256 {file_checksum(source)}…",
        "trained for": ", ".join(f"{tree[k]} {k}s" for k in ("epoch", "step") if k in tree),
        "this file": f"`{output.name}`, {output.stat().st_size / 1e6:.1f} MB, "
        f"SHA-256 {file_checksum(output)}…",
    }  # fmt: skip
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])


def data_section(options: dict[str, Any], tree: formats.Tree) -> str:
    """The training data, as far as recorded in the checkpoint."""
    if not options.get("data_path"):
        return "Not recorded in the checkpoint."
    text = f"Shards `{Path(options['data_path']).name}`"
    return f"{text}, index {str(tree['data'])[:16]}…" if tree.get("data") else f"{text}."


def recipe_section(options: dict[str, Any]) -> str:
    """A table of the main options, and a list of all."""
    if not options:
        return "Not recorded in the checkpoint."
    rows = [f"| {name} | {as_text(options[name])} |" for name in RECIPE if name in options]
    every = yaml.safe_dump(
        {name: without_folder(value) for name, value in options.items()}, sort_keys=False
    ).strip()
    fold = f"<details><summary>All options</summary>\n\n```yaml\n{every}\n```\n\n</details>"
    return "\n".join(["| option | value |", "|---|---|", *rows, "", fold])


def without_folder(value: Any) -> Any:
    """The last part of an absolute path: a card does not disclose the author's folders."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def matching_results(source: Path, network: str, results: Path | None) -> dict[str, Any]:
    """Results of one network of a file, identified by checksum and name: key -> entry.

    Raises:
        InputError: the given file cannot be read.
    """
    ours, found = file_checksum(source), all_results(source, results)
    return {key: entry for key, entry in found.items() if is_result_of(entry, ours, network)}


def all_results(source: Path, results: Path | None) -> dict[str, Any]:
    """All results of a ``results.json``, by default that of the source's run folder.

    Raises:
        InputError: the given file cannot be read.
    """
    path = results or source.parent.parent / "results.json"
    if results is None and not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--results {path}: cannot be read ({error})") from error


def is_result_of(entry: Any, weights: str, network: str) -> bool:
    """Whether a result is of this network; results of early versions, which do not record the
    network, are not."""
    protocol = entry.get("protocol") if isinstance(entry, dict) else None
    if not isinstance(protocol, dict):
        return False
    return protocol.get("weights") == weights and protocol.get("network") == network


def baselines_of(key: str, entry: Any, found: dict[str, Any]) -> dict[str, Any]:
    """``random weights``, ``raw pixels`` -> their results by the protocol of a result."""
    evaluation, compared = key.partition("@")[0], {}
    for suffix, title in BASELINES.items():
        for name, other in found.items():
            if name.partition("@")[0] != f"{evaluation}/{suffix}":
                continue
            both = [other.get("protocol", {}), entry["protocol"]]
            one, two = ({k: v for k, v in p.items() if k not in BASELINE_DIFFERS} for p in both)
            if one == two:
                compared[title] = other
    return compared


def results_table(entries: dict[str, Any], found: dict[str, Any]) -> str:
    """A table with one row per result (for k-NN: per k) and its protocol, each followed by its
    baselines.

    Args:
        entries: results of this network.
        found: all results of the run.
    """
    if not entries:
        return "No accuracy of this network is recorded."
    rows = ["| evaluation | top-1, % | top-5, % | protocol |", "|---|---|---|---|"]
    for key, entry in entries.items():
        name, protocol = key.partition("@")[0], dict(entry["protocol"])
        if "chosen" in entry:
            protocol["head"] = ", ".join(f"{k} {v}" for k, v in entry["chosen"].items())
        facts = "; ".join(f"{k} {as_text(v)}" for k, v in protocol.items() if k not in IN_ROW)
        others = baselines_of(key, entry, found)
        for suffix in metric_suffixes(entry["metrics"]):
            title = f"{name}, k = {suffix[2:]}" if suffix else name
            rows.append(result_row(title, entry, suffix, facts))
            rows += [
                result_row(f"{title}: {what}", other, suffix, "the same")
                for what, other in others.items()
            ]
    return "\n".join(rows)


def result_row(title: str, entry: Any, suffix: str, facts: str) -> str:
    """A row of the table of results."""
    tops = [entry["metrics"].get(f"top{n}{suffix}") for n in (1, 5)]
    cells = ["" if top is None else f"{top:.2f}" for top in tops]
    return f"| {title} | {cells[0]} | {cells[1]} | {facts} |"


def class_section(entries: dict[str, Any], model: Any) -> list[str]:
    """Names of the classes that a classifier's outputs, or the accuracies of a backbone, are about,
    as its results record them; [] where they record none."""
    for entry in entries.values():
        rows = list(csv.reader(entry.get("per_class", [])))[1:]
        names = {int(label): name for name, label, *_ in rows}
        if names and (not model.num_classes or len(names) == model.num_classes):
            what = "Outputs, in this order" if model.num_classes else "Of the images evaluated"
            listed = ", ".join(f"{label} {name}" for label, name in sorted(names.items()))
            return ["## Classes", f"{what}: {listed}."]
    return []


def metric_suffixes(metrics: dict[str, float]) -> list[str]:
    """``_k10``, ``_k20`` ... for a k-NN result, ascending; else ``[""]``."""
    ks = [name.removeprefix("top1_k") for name in metrics if name.startswith("top1_k")]
    return [f"_k{k}" for k in sorted(ks, key=int)] or [""]


def as_text(value: Any) -> str:
    """Format a value without brackets or quotes."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
