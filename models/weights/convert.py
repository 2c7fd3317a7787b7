"""Write weights: ``xcit-dino weights extract | convert | export``.

Every file is read back before it gets its final name. A converted or exported network is also
compared with the original, run by timm for timm's layout and by onnxruntime for ONNX.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from xcit_dino import __version__
from xcit_dino.errors import InputError, RunError
from xcit_dino.files import check_writable
from xcit_dino.inputs import KEY
from xcit_dino.models.checkpoints import resolve_checkpoint
from xcit_dino.models.config import ConvertConfig, ExportConfig, ExtractConfig
from xcit_dino.models.weights import card, formats, layouts, timm_folder
from xcit_dino.models.weights.load import (
    FoundNetwork,
    check_finite,
    check_tensors,
    find_network,
    input_settings,
    name_list,
)
from xcit_dino.models.xcit import XCiT
from xcit_dino.models.zoo import create_model, list_models
from xcit_dino.progress import progress
from xcit_dino.provenance import commit

TOLERANCE = 1e-5  # largest difference between two outputs, relative to the largest value


def check_output(output: Path) -> None:
    """Refuse an output file that cannot be written, before any work.

    Raises:
        InputError: names it.
    """
    remedy = f"name a file in another folder: --output ELSEWHERE/{output.name}"
    check_writable(output.parent, remedy, f"--output {output}")


def extract(config: ExtractConfig) -> None:
    """Write the tensors under a prefix to a separate file (``weights extract``)."""
    check_output(config.output)
    config = replace(config, checkpoint=resolve_checkpoint(config.checkpoint))
    tree = layouts.flatten(formats.read(config.checkpoint))
    named = ("Student", "student") if config.prefix is None else (config.prefix.rstrip("."),)
    for root, name in product(("", "model.", "state_dict."), named):  # of training loops
        prefix = f"{name}."
        if state := layouts.select_prefix(tree, root + prefix):
            break
    else:
        raise InputError(
            f"--prefix {' or '.join(named)}: no such names in {config.checkpoint}; its names begin "
            f"with {name_list(name.split('.')[0] for name in tree)}"
        )
    check_finite(config.checkpoint, state)
    if not config.remove_prefix:
        state = {prefix + name: value for name, value in state.items()}

    def check(path: Path) -> None:
        again = layouts.flatten(formats.read(path))
        same = again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
        if not same:
            raise RunError(f"{path}: differs when read back")

    which = "teacher" if prefix.lower().startswith("teacher") else None
    facts = {"network": prefix.rstrip("."), "source": config.checkpoint.name}
    facts |= settings_metadata(config.checkpoint, which, config.output)
    formats.write_checked(config.output, lambda path: formats.write(path, state, facts), check)
    print(f"{config.output}: {len(state)} tensors of {config.checkpoint.name} under {prefix!r}")


def convert(config: ConvertConfig) -> None:
    """Write one XCiT in another layout or format (``weights convert``)."""
    check_output(config.output)
    _convert(replace(config, checkpoint=resolve_checkpoint(config.checkpoint)))


def _convert(config: ConvertConfig) -> tuple[str, XCiT, FoundNetwork]:
    """Write the layout and format; returns (arch, network in evaluation mode, its source)."""
    found = find_network(config.checkpoint, config.which)
    arch, model = _build(found, config.checkpoint)
    layout = "paddle" if config.output.suffix == ".pdparams" else config.layout
    writers = {"official": dict, "timm": layouts.to_timm, "paddle": layouts.to_paddle}
    state = writers[layout](found.state)
    facts = _metadata(arch, model, found, config.checkpoint, config.results) | {"layout": layout}
    facts |= settings_metadata(config.checkpoint, found.network, config.output)

    def check(path: Path) -> None:
        if layout == "timm":
            other = _timm_model(arch, model)
            other.load_state_dict(formats.read(path))
        else:
            _, other = _build(find_network(path), path)
        for images in _test_images(model):
            _check_outputs(other.eval()(images), model(images), config.output)

    with torch.no_grad():
        formats.write_checked(config.output, lambda path: formats.write(path, state, facts), check)
    print(f"{config.output}: {arch}, {found.network} of {config.checkpoint.name}, {layout} layout")
    return arch, model, found


def export(config: ExportConfig) -> None:
    """Write a file or folder to hand over, with its model card (``weights export``)."""
    check_output(config.output)
    config = replace(config, checkpoint=resolve_checkpoint(config.checkpoint))
    if config.format == "timm-hub":
        return timm_folder.export(config)
    if config.output.suffix == ".safetensors":
        options = ConvertConfig(
            config.checkpoint, config.output, config.which, results=config.results
        )
        arch, model, found = _convert(options)
    else:
        arch, model, found = _export_onnx(config)
    card_path = card.write(
        config.output, config.checkpoint, arch, found.network, model, config.results
    )
    print(f"{card_path}: its model card")


def _export_onnx(config: ExportConfig) -> tuple[str, XCiT, FoundNetwork]:
    """Write ONNX; returns (arch, network in evaluation mode, its source)."""
    from xcit_dino.models.weights import onnx_export

    found = find_network(config.checkpoint, config.which)
    arch, model = _build(found, config.checkpoint)
    facts = _metadata(arch, model, found, config.checkpoint, config.results)
    facts |= settings_metadata(config.checkpoint, found.network, config.output)

    def write(path: Path) -> None:
        onnx_export.write(path, model, facts)
        bar.advance()

    def check(path: Path) -> None:
        run = onnx_export.runner(path)
        for images in _test_images(model):
            _check_outputs(run(images), model(images), config.output)
        bar.advance()

    with torch.no_grad(), progress("trace, check", total=2) as bar:
        formats.write_checked(config.output, write, check)
    print(f"{config.output}: {arch}, {found.network} of {config.checkpoint.name}, any batch, size")
    return arch, model, found


def _build(found: FoundNetwork, path: Path) -> tuple[str, XCiT]:
    """(arch, model) of an XCiT state dict, in evaluation mode, with sizes inferred from it.

    Raises:
        InputError: not a built-in XCiT.
    """
    shape = layouts.infer_shape(found.state)
    if shape is None or str(shape) not in list_models():
        raise InputError(
            f"{path}: contains {shape or 'no XCiT'}; only built-in XCiTs can be converted"
        )
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


def _test_images(model: XCiT) -> list[Tensor]:
    """Random images in two batch sizes and two shapes, one of them not square."""
    generator = torch.Generator().manual_seed(0)
    channels, p = model.in_chans, model.patch_size
    shapes = ((2, channels, 6 * p, 6 * p), (1, channels, 4 * p, 7 * p))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _check_outputs(actual: Tensor, expected: Tensor, output: Path) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise RunError(
            f"{output}: outputs differ from the original (relative error {error:.1e}), not written"
        )


def settings_metadata(source: Path, which: str | None, output: Path) -> dict[str, str]:
    """Input settings of a file's network as metadata; empty if the file has none."""
    settings = input_settings(source, which)
    if settings is not None and output.suffix == ".pdparams":
        print(
            f"{output}: this format cannot store the input settings: images of "
            f"{settings.size or 'any'} px "
            f"({settings.interpolation}), {card.channels_text(settings)}, mean {settings.mean}, "
            f"std {settings.std}"
        )
    return {} if settings is None else {KEY: settings.dump()}


def _metadata(
    arch: str, model: XCiT, found: FoundNetwork, source: Path, results: Path | None
) -> dict[str, str]:
    """Metadata of an exported file, as strings."""
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
        facts["results"] = json.dumps(card.matching_results(source, found.network, results))
    return facts
