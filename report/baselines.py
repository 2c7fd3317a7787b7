"""The command that measures random weights and raw pixels by the protocol of a result."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from xcit_dino.eval.config import KnnConfig, LinearConfig
from xcit_dino.inputs import InputSettings
from xcit_dino.models.checkpoints import FOLDER
from xcit_dino.train.run.reader import Run

CONFIGS = {"knn": KnnConfig, "linear": LinearConfig}
AGAIN = "the command that measured it, again with --baselines true,"
OPTIONS = ("nb_knn", "temperature", "epochs", "lrs", "weight_decays", "layers", "seed")


def command(run: Run, evaluation: str, entry: dict[str, Any]) -> str:
    """The whole command, with the options that are not their defaults; words for it where the run
    folder lacks the rest: of weights or data from elsewhere."""
    weights = entry.get("weights_file")
    if not run.config.get("data_path") or (
        weights and not (run.folder / FOLDER / weights).is_file()
    ):
        return AGAIN
    inputs = InputSettings.from_run(run.config) or InputSettings()
    options = changed(entry["protocol"], CONFIGS[evaluation](), inputs)
    words = ["xcit-dino", evaluation, "--output_dir", str(run.folder), *options]
    return shlex.join([*words, "--baselines", "true"])


def changed(
    protocol: dict[str, Any], defaults: KnnConfig | LinearConfig, inputs: InputSettings
) -> list[str]:
    """Options of a result that are not their defaults.

    inputs: of the run's network.
    """
    own = {name: value for name, value in vars(defaults).items() if name in OPTIONS}
    found = {name: (protocol.get(name), default) for name, default in own.items()}
    if isinstance(defaults, LinearConfig):
        share, percent, _ = str(protocol.get("chosen_on", "")).partition(" %")
        found["probe_batch_size"] = protocol.get("batch"), defaults.probe_batch_size
        found["holdout"] = float(share) / 100 if percent else None, defaults.holdout
    crop, network = protocol.get("crop", inputs.crop), protocol.get("network")
    found |= {
        "checkpoint_key": (network if network == "student" else None, None),
        "crop_size": (crop, inputs.crop),
        "resize_size": (protocol.get("resize"), dataclasses.replace(inputs, size=crop).resize),
        "interpolation": (protocol.get("interpolation"), inputs.interpolation),
        "precision": (protocol.get("precision"), defaults.target.precision),
    }
    words = []
    for name, (value, default) in found.items():
        default = list(default) if isinstance(default, tuple) else default
        if value is not None and value != default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
