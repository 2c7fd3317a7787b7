"""Export XCiT to ONNX with dynamic batch size, height and width; needs the extra ``[onnx]``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from xcit_dino.errors import InputError
from xcit_dino.models.xcit import XCiT

REMEDY = "needs onnx, onnxscript and onnxruntime; pip install 'xcit-dino[onnx]'"


def write(path: Path, model: XCiT, facts: dict[str, str]) -> None:
    """Write the graph ``images`` (B, C, H, W) -> ``features`` or ``logits``; facts: metadata."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--output {path.name}: {REMEDY}") from error
    p = model.patch_size
    free = {0: Dim("batch"), 2: p * Dim("rows"), 3: p * Dim("columns")}
    images = torch.zeros(2, model.in_chans, 4 * p, 5 * p)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs what it could not fold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=(free,),
            input_names=["images"],
            output_names=["logits" if model.num_classes else "features"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that runs the graph in onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--output {path.name}: {REMEDY}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
