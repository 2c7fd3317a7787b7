"""Weights out: ``xcit-dino weights extract | convert | export``.

Every file is read back before it gets its name: a converted or exported network is also run beside
the original, by timm where it is timm's layout, by onnxruntime where it is ONNX.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from xcit_dino import __version__
from xcit_dino.errors import InputError, RunError
from xcit_dino.files import check_writable
from xcit_dino.inputs import KEY
from xcit_dino.models.checkpoints import checkpoint_of
from xcit_dino.models.config import ConvertConfig, ExportConfig, ExtractConfig
from xcit_dino.models.weights import card, formats, layouts, timm_folder
from xcit_dino.models.weights.load import (
    Found,
    check_finite,
    check_tensors,
    find_network,
    input_settings,
    listed,
)
from xcit_dino.models.xcit import XCiT
from xcit_dino.models.zoo import create_model, list_models
from xcit_dino.progress import progress
from xcit_dino.provenance import commit

TOLERANCE = 1e-5  # largest difference between two outputs, relative to the largest value


def check_output(output: Path) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        InputError: names it.
    """
    remedy = f"name a file in another folder: --output ELSEWHERE/{output.name}"
    check_writable(output.parent, remedy, f"--output {output}")


def extract(config: ExtractConfig) -> None:
    """Write the tensors under a prefix to a file of their own (``weights extract``)."""
    check_output(config.output)
    config = replace(config, checkpoint=checkpoint_of(config.checkpoint))
    tree = layouts.flatten(formats.read(config.checkpoint))
    prefix = f"{config.prefix.rstrip('.')}."
    for root in ("", "model.", "state_dict."):  # where a training loop may have put them
        if state := layouts.under(tree, root + prefix):
            break
    else:
        raise InputError(
            f"--prefix {config.prefix}: no such names in {config.checkpoint}; its names begin "
            f"with {listed(name.split('.')[0] for name in tree)}"
        )
    check_finite(config.checkpoint, state)
    if not config.remove_prefix:
        state = {prefix + name: value for name, value in state.items()}

    def check(path: Path) -> None:
        again = layouts.flatten(formats.read(path))
        same = again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
        if not same:
            raise RunError(f"{path}: was not read back as written")

    which = "teacher" if config.prefix.lower().startswith("teacher") else None
    facts = {"network": config.prefix, "source": config.checkpoint.name}
    facts |= settings_facts(config.checkpoint, which, config.output)
    formats.publish(config.output, lambda path: formats.write(path, state, facts), check)
    print(f"{config.output}: {len(state)} tensors of {config.checkpoint.name} under {prefix!r}")


def convert(config: ConvertConfig) -> None:
    """Write one XCiT in another layout or format (``weights convert``)."""
    check_output(config.output)
    _convert(replace(config, checkpoint=checkpoint_of(config.checkpoint)))


def _convert(config: ConvertConfig) -> tuple[str, XCiT, Found]:
    """(arch, network in evaluation mode, where it was found), written in the layout and format."""
    found = find_network(config.checkpoint, config.which)
    arch, model = _build(found, config.checkpoint)
    layout = "paddle" if config.output.suffix == ".pdparams" else config.layout
    writers = {"official": dict, "timm": layouts.to_timm, "paddle": layouts.to_paddle}
    state = writers[layout](found.state)
    facts = _facts(arch, model, found, config.checkpoint, config.results) | {"layout": layout}
    facts |= settings_facts(config.checkpoint, found.network, config.output)

    def check(path: Path) -> None:
        if layout == "timm":
            other = _timm_model(arch, model)
            other.load_state_dict(formats.read(path))
        else:
            _, other = _build(find_network(path), path)
        for images in _trial_images(model):
            _compare(other.eval()(images), model(images), config.output)

    with torch.no_grad():
        formats.publish(config.output, lambda path: formats.write(path, state, facts), check)
    print(f"{config.output}: {arch}, {found.network} of {config.checkpoint.name}, {layout} layout")
    return arch, model, found


def export(config: ExportConfig) -> None:
    """Write a file or folder to hand over, with its model card (``weights export``)."""
    check_output(config.output)
    config = replace(config, checkpoint=checkpoint_of(config.checkpoint))
    if config.format == "timm-hub":
        return timm_folder.export(config)
    if config.output.suffix == ".safetensors":
        options = ConvertConfig(
            config.checkpoint, config.output, config.which, results=config.results
        )
        arch, model, found = _convert(options)
    else:
        arch, model, found = _export_onnx(config)
    told = card.write(config.output, config.checkpoint, arch, found.network, model, config.results)
    print(f"{told}: its model card")


def _export_onnx(config: ExportConfig) -> tuple[str, XCiT, Found]:
    """(arch, network in evaluation mode, where it was found), written as ONNX."""
    from xcit_dino.models.weights import onnx_export

    found = find_network(config.checkpoint, config.which)
    arch, model = _build(found, config.checkpoint)
    facts = _facts(arch, model, found, config.checkpoint, config.results)
    facts |= settings_facts(config.checkpoint, found.network, config.output)

    def write(path: Path) -> None:
        onnx_export.write(path, model, facts)
        bar.advance()

    def check(path: Path) -> None:
        run = onnx_export.runner(path)
        for images in _trial_images(model):
            _compare(run(images), model(images), config.output)
        bar.advance()

    with torch.no_grad(), progress("trace, check", total=2) as bar:
        formats.publish(config.output, write, check)
    print(f"{config.output}: {arch}, {found.network} of {config.checkpoint.name}, any batch, size")
    return arch, model, found


def _build(found: Found, path: Path) -> tuple[str, XCiT]:
    """(arch, model) of a found XCiT, in evaluation mode, sized by its own tensors.

    Raises:
        InputError: not an XCiT of the zoo.
    """
    shape = layouts.shape_of(found.state)
    if shape is None or str(shape) not in list_models():
        raise InputError(f"{path}: holds {shape or 'no XCiT'}; only XCiTs of the zoo convert")
    classes = len(found.state["head.weight"]) if "head.weight" in found.state else 0
    in_chans = found.state["patch_embed.proj.0.0.weight"].shape[1]
    model = create_model(str(shape), num_classes=classes, in_chans=in_chans)
    assert isinstance(model, XCiT)
    check_tensors(path, found.state, model.state_dict())
    model.load_state_dict(found.state)
    return str(shape), model.eval()


def _timm_model(arch: str, model: XCiT) -> nn.Module:
    """timm's network of the same name.

    Raises:
        InputError: timm has none (patch 4, pico).
    """
    import timm

    if arch not in list_models()[:14]:
        raise InputError(f"--layout timm: timm has no {arch}; it has patch 8 and 16 of the paper")
    return timm.create_model(f"{arch}_224", num_classes=model.num_classes, in_chans=model.in_chans)


def _trial_images(model: XCiT) -> list[Tensor]:
    """Random images in two batch sizes and two shapes, one of them not square."""
    generator = torch.Generator().manual_seed(0)
    channels, p = model.in_chans, model.patch_size
    shapes = ((2, channels, 6 * p, 6 * p), (1, channels, 4 * p, 7 * p))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _compare(actual: Tensor, expected: Tensor, output: Path) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise RunError(f"{output}: computes other values (relative error {error:.1e}), not written")


def settings_facts(source: Path, which: str | None, output: Path) -> dict[str, str]:
    """The input settings of a file's network as metadata; empty where it does not say them."""
    settings = input_settings(source, which)
    if settings is not None and output.suffix == ".pdparams":
        print(
            f"{output}: has no place for the input settings; images of {settings.size or 'any'} px "
            f"({settings.interpolation}), mean {settings.mean}, std {settings.std}"
        )
    return {} if settings is None else {KEY: settings.dump()}


def _facts(
    arch: str, model: XCiT, found: Found, source: Path, results: Path | None
) -> dict[str, str]:
    """Metadata of a file to hand over; plain strings, as the formats want them."""
    facts = {
        "arch": arch,
        "network": found.network,
        "num_classes": str(model.num_classes),
        "patch_size": str(model.patch_size),
        "source": source.name,
        "xcit_dino": __version__,
        "commit": commit(),
    }
    if results is not None:
        facts["results"] = json.dumps(card.matching(source, found.network, results))
    return facts
