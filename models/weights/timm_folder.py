"""A network as a folder for timm and the Hugging Face hub: ``config.json``, ``model.safetensors``
and a model card.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, and so does
``"hf-hub:OWNER/NAME"`` once it is uploaded: timm's own network with these weights and settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit_dino.errors import InputError, RunError
from xcit_dino.files import unfinished_folder
from xcit_dino.inputs import KEY, WHOLE, InputSettings
from xcit_dino.models.checkpoints import HUB_WEIGHTS
from xcit_dino.models.config import ExportConfig
from xcit_dino.models.tokens import first_layer
from xcit_dino.models.weights import card, formats, layouts
from xcit_dino.models.weights.load import (
    FoundNetwork,
    classifier_names,
    find_network,
    fit,
    input_settings,
)
from xcit_dino.models.zoo import TIMM_PREFIX, create_model, list_models

CONFIG, CARD = "config.json", "README.md"  # as timm looks for them, beside HUB_WEIGHTS
TOLERANCE = 1e-5  # largest difference between two outputs, relative to the largest value
CROP_RATIO = 224 / 256  # of the published protocols


def export(config: ExportConfig) -> None:
    """Write the folder ``--output``; it is loaded by timm and run before it gets its name.

    Raises:
        InputError: the folder exists, or timm has no such architecture.
    """
    output = config.output
    if output.exists():
        raise InputError(f"--output {output}: exists; name a new folder")
    found = find_network(config.checkpoint, config.which)
    arch = architecture(found, config)
    model = network(arch, found, config.checkpoint)
    own = input_settings(config.checkpoint, found.network)
    settings = resolved(own, model)
    about = description(model, settings) | ({KEY: asdict(own)} if own else {})
    with torch.no_grad(), unfinished_folder(output) as folder:
        facts = {"format": "pt", KEY: settings.dump()}  # for those who take the file alone
        formats.write(folder / HUB_WEIGHTS, dict(model.state_dict()), facts)
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
        text = card.text(
            folder / HUB_WEIGHTS, config.checkpoint, arch, found.network, model, config.results,
            settings, name=output.name, hub=True,
        )  # fmt: skip
        (folder / CARD).write_text(text)
        check(folder, model, settings, output)
    print(
        f"{output}: {about['architecture']}, {found.network} of {config.checkpoint.name}; "
        f'timm.create_model("local-dir:{output}", pretrained=True) loads it'
    )


def architecture(found: FoundNetwork, config: ExportConfig) -> str:
    """The name of a found network, ours or ``timm/NAME``: by its tensors, by ``--arch``, or as its
    file says.

    Raises:
        InputError: nobody says it, or timm has no such network.
    """
    if shape := layouts.infer_shape(found.state):
        if str(shape) not in list_models()[:14]:
            raise InputError(
                f"--format timm-hub: timm has no {shape}; it has patch 8 and 16 of the paper"
            )
        return str(shape)
    said = formats.metadata(config.checkpoint).get("arch", "")
    arch = config.arch or said
    if not arch.startswith(TIMM_PREFIX):
        raise InputError(
            f"{config.checkpoint}: does not say which network of timm it holds; "
            "add --arch timm/NAME"
        )
    return arch


def network(arch: str, found: FoundNetwork, path: Path) -> nn.Module:
    """timm's network of that name with the found weights, in evaluation mode."""
    name = arch if arch.startswith(TIMM_PREFIX) else f"{TIMM_PREFIX}{arch}_224"
    shown, channels = create_model(name), 3
    first = found.state.get(f"{first_layer(shown)}.weight")
    if first is not None and first.ndim == 4:
        channels = first.shape[1]
    model = create_model(name, in_chans=channels)
    classifier = [value for key, value in found.state.items() if key in classifier_names(
        found.state, model) and value.ndim == 1]  # fmt: skip
    if classifier:
        model = create_model(name, num_classes=len(classifier[0]), in_chans=channels)
    state, _ = fit(path, found, model)
    model.load_state_dict(state)
    return model.eval()


def resolved(settings: InputSettings | None, model: Any) -> InputSettings:
    """Input settings without gaps: the file's, else timm's of this network."""
    known = model.pretrained_cfg
    if settings is None:
        return InputSettings(
            known["input_size"][-1], known["crop_pct"], known["interpolation"],
            tuple(known["mean"]), tuple(known["std"]),
        )  # fmt: skip
    size = settings.size or known["input_size"][-1]
    ratio = settings.crop_ratio or (1.0 if size <= WHOLE else CROP_RATIO)
    return replace(settings, size=size, crop_ratio=ratio)


def description(model: Any, settings: InputSettings) -> dict[str, Any]:
    """What timm reads from ``config.json``."""
    known = model.pretrained_cfg
    any_size = (
        model.any_size or layouts.infer_shape(model.state_dict()) is not None
    )  # XCiT takes all
    kept = ("pool_size", "first_conv", "classifier")
    about = {name: known[name] for name in kept if known.get(name) is not None} | {
        "custom_load": False,
        "fixed_input_size": bool(known["fixed_input_size"] and not any_size),
        "input_size": [settings.channels, settings.size, settings.size],
        "interpolation": settings.interpolation,
        "crop_pct": settings.crop_ratio,
        "crop_mode": "center",
        "mean": list(settings.mean),
        "std": list(settings.std),
        "num_classes": model.num_classes,
    }
    found = {
        "architecture": known["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
    }
    if settings.channels != 3:
        found["model_args"] = {"in_chans": settings.channels}
    if model.any_size:  # its positions are of its own size, whatever images it saw
        sizes = {"img_size": known["input_size"][-1], **model.any_size}
        found["model_args"] = found.get("model_args", {}) | sizes
    return found | {"pretrained_cfg": about}


def settings_in(folder: Path) -> InputSettings | None:
    """Input settings of an exported folder as our commands have them, with the window and bands
    that timm knows nothing of; None where it has none.

    Raises:
        InputError: damaged.
    """
    try:
        found = json.loads((folder / CONFIG).read_text()).get(KEY)
        return None if found is None else InputSettings.parse(json.dumps(found))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: cannot be read ({error}); export it again") from None


def check(folder: Path, model: nn.Module, settings: InputSettings, output: Path) -> None:
    """Raise RunError where timm computes anything else from the folder, or prepares images
    otherwise."""
    import timm
    from timm.data import resolve_data_config  # pyright: ignore

    try:
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # arguments that its network does not take
        raise RunError(f"{output}: timm does not load it ({error}), not written") from error
    generator = torch.Generator().manual_seed(0)
    size = settings.size or 224
    images = torch.randn(2, settings.channels, size, size, generator=generator)
    got, want = other(images), model(images)
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
    prepared = resolve_data_config({}, model=other)
    same = prepared["input_size"][-1] == size and all(
        tuple(prepared[name]) == tuple(getattr(settings, name)) for name in ("mean", "std")
    )
    if not (error <= TOLERANCE and same):
        raise RunError(
            f"{output}: timm computes other values (relative error {error:.1e}) or prepares images "
            f"otherwise ({prepared}), not written"
        )
