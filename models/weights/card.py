"""The Markdown model card of an exported file: architecture, data, recipe, results with protocols,
intended use and loading code. Everything in it is read from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.files import file_checksum, write_atomic
from xcit_dino.inputs import BYTES, InputSettings
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.xcit import XCiT

RECIPE = (  # the main options; all of them follow below
    "epochs batch_size_per_gpu accum_iter lr min_lr warmup_epochs weight_decay weight_decay_end "
    "drop_path_rate momentum_teacher teacher_temp out_dim global_crops_number global_crops_size "
    "global_crops_scale local_crops_number local_crops_size local_crops_scale precision seed"
).split()
IN_ROW = {"evaluation", "weights", "val_index", "train_index", "recipe", "lrs", "arch", "network"}
IN_ROW |= {"nb_knn"}  # k is in the row's title


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
        results_table(matching_results(source, network, results)),
        "## Intended use",
        USE.format(kind="classification of its classes" if model.num_classes else "features"),
        "## How to load",
        loading_code(file, arch, model, settings, hub),
        "## Citation",
        CITATION if "xcit" in arch else CITATION.split("\n", 2)[2],
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(model: Any) -> str:
    """What the hub sorts models by. No license: the files do not name one."""
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    return f"---\nlibrary_name: timm\ntags:\n- timm\n- {task}\n---"


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


def channels_text(settings: InputSettings) -> str:
    """``RGB``, or the number of channels, which these are, and how their values are scaled."""
    plural = "s" * (settings.channels != 1)
    kind = "RGB" if settings.channels == 3 else f"{settings.channels} channel{plural}"
    if settings.bands:
        kind = f"bands {', '.join(map(str, settings.bands))} of the images"
    return kind if settings.window == BYTES else f"{kind}, {window_text(settings)}"


def window_text(settings: InputSettings) -> str:
    """``values 0 to 4095 scaled to [0, 1]``, of several channels each in its order."""
    pairs = [f"{low:g} to {high:g}" for low, high in zip(*settings.window, strict=True)]
    return f"values {', '.join(pairs)} scaled to [0, 1]"


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
    path = results or source.parent.parent / "results.json"
    if results is None and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--results {path}: cannot be read ({error})") from error
    ours = file_checksum(source)
    return {key: entry for key, entry in found.items() if is_result_of(entry, ours, network)}


def is_result_of(entry: Any, weights: str, network: str) -> bool:
    """Whether a result is of this network; results of early versions, which do not record the
    network, are not."""
    protocol = entry.get("protocol") if isinstance(entry, dict) else None
    if not isinstance(protocol, dict):
        return False
    return protocol.get("weights") == weights and protocol.get("network") == network


def results_table(entries: dict[str, Any]) -> str:
    """A table with one row per result (for k-NN: per k) and its protocol."""
    if not entries:
        return "No accuracy of this network is recorded."
    rows = ["| evaluation | top-1, % | top-5, % | protocol |", "|---|---|---|---|"]
    for key, entry in entries.items():
        name, protocol = key.partition("@")[0], dict(entry["protocol"])
        if "chosen" in entry:
            protocol["head"] = ", ".join(f"{k} {v}" for k, v in entry["chosen"].items())
        facts = "; ".join(f"{k} {as_text(v)}" for k, v in protocol.items() if k not in IN_ROW)
        for suffix in metric_suffixes(entry["metrics"]):
            tops = [entry["metrics"].get(f"top{n}{suffix}") for n in (1, 5)]
            cells = ["" if top is None else f"{top:.2f}" for top in tops]
            title = f"{name}, k = {suffix[2:]}" if suffix else name
            rows.append(f"| {title} | {cells[0]} | {cells[1]} | {facts} |")
    return "\n".join(rows)


def metric_suffixes(metrics: dict[str, float]) -> list[str]:
    """``_k10``, ``_k20`` ... for a k-NN result, ascending; else ``[""]``."""
    ks = [name.removeprefix("top1_k") for name in metrics if name.startswith("top1_k")]
    return [f"_k{k}" for k in sorted(ks, key=int)] or [""]


def loading_code(
    output: Path, arch: str, model: Any, settings: InputSettings, hub: bool = False
) -> str:
    """Code that loads the file."""
    shape = f"[B, {settings.channels}, H, W]"
    chans = "" if settings.channels == 3 else f", in_chans={settings.channels}"
    if hub and (settings.channels != 3 or settings.window != BYTES):
        code = f"""import timm

# from the hub: "hf-hub:OWNER/NAME"
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
outputs = model(images)  # images: float32 {shape}, normalized

# or prepared from files or arrays of the training images' kind
import xcit_dino

features = xcit_dino.embed(["image.tif"], *xcit_dino.load("FOLDER"))"""
    elif hub:
        code = """import timm

# from the hub: "hf-hub:OWNER/NAME"
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
outputs = model(transform(image).unsqueeze(0))  # image: a PIL image"""
    elif output.suffix == ".onnx":
        code = f"""import onnxruntime

session = onnxruntime.InferenceSession("{output.name}")
(name,) = [node.name for node in session.get_inputs()]
outputs = session.run(None, {{name: images}})  # images: float32 {shape}, normalized"""
    else:
        code = f"""import xcit_dino
from safetensors.torch import load_file

model = xcit_dino.create_model("{arch}", num_classes={model.num_classes}{chans}).eval()
model.load_state_dict(load_file("{output.name}"))
outputs = model(images)  # images: float32 {shape}, normalized"""
    mean, std = format_values(settings.mean), format_values(settings.std)
    scaled = "" if settings.window == BYTES else f" ({window_text(settings)})"
    channels = f"Mean {mean}, std {std} of values in [0, 1]{scaled}."
    return f"```python\n{code}\n```\n\n{channels}"


def format_values(values: tuple[float, ...]) -> str:
    """``(0.485, 0.456, 0.406)``"""
    return f"({', '.join(f'{value:g}' for value in values)})"


def as_text(value: Any) -> str:
    """Format a value without brackets or quotes."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
