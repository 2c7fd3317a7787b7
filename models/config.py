"""Options of ``xcit-dino weights ...``; free of torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from xcit_dino.errors import InputError, needs

Which = Literal["teacher", "student", "model", "model_ema"]
WEIGHT_SUFFIXES = (".pth", ".safetensors", ".pdparams")


def _require_suffix(output: Path, suffixes: tuple[str, ...]) -> None:
    if output is not tyro.MISSING and output.suffix not in suffixes:  # missing: reported by tyro
        raise InputError(f"--output {output}: the name must end in {' or '.join(suffixes)}")


@dataclass(frozen=True)
class ExtractConfig:
    """``xcit-dino weights extract CHECKPOINT``: copy the tensors under one prefix."""

    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """Checkpoint with several networks, or a run folder (its newest checkpoint)."""
    output: Path = tyro.MISSING
    """File to write: .pth, .safetensors or .pdparams."""
    prefix: str | None = None
    """Prefix of the names to extract: Student, Teacher, teacher.backbone, ... Default: Student, or
    student."""
    remove_prefix: bool = False
    """Remove the prefix from the names, as in a bare network."""

    def __post_init__(self) -> None:
        _require_suffix(self.output, WEIGHT_SUFFIXES)


@dataclass(frozen=True)
class ConvertConfig:
    """``xcit-dino weights convert CHECKPOINT``: one XCiT in another layout or file format."""

    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """Any checkpoint that `weights` reads: official, ours, timm's, safetensors or PASSL's; or a run
    folder (its newest checkpoint)."""
    output: Path = tyro.MISSING
    """File to write: .pth or .safetensors; .pdparams is PASSL's layout."""
    which: Which | None = None
    """Network to use. Default: the teacher, else the only one in the file."""
    layout: Literal["official", "timm"] = "official"
    """Naming of the tensors: facebookresearch's (and ours), or timm's."""
    results: Path | None = None
    """A results.json; its results of this network are added to the metadata of a
    .safetensors."""

    def __post_init__(self) -> None:
        _require_suffix(self.output, WEIGHT_SUFFIXES)
        if self.layout == "timm" and self.output.suffix == ".pdparams":
            raise InputError(f"--layout timm: {self.output} is PASSL's layout; drop the option")


@dataclass(frozen=True)
class ExportConfig:
    """``xcit-dino weights export CHECKPOINT``: a file to distribute, verified by running it."""

    checkpoint: tyro.conf.Positional[Path] = tyro.MISSING
    """Any checkpoint that `weights` reads, or a run folder (its newest checkpoint)."""
    output: Path = tyro.MISSING
    """File to write: .onnx (any batch and image size) or .safetensors with metadata; with --format
    timm-hub a new folder."""
    format: Literal["file", "timm-hub"] = "file"
    """timm-hub: a folder that timm.create_model loads as local-dir:FOLDER and, once it is uploaded,
    as hf-hub:OWNER/NAME; input settings and model card included."""
    which: Which | None = None
    """Network to use. Default: the teacher, else the only one in the file."""
    arch: str | None = None
    """timm/NAME, for --format timm-hub and a file that does not say which network of timm it
    holds."""
    results: Path | None = None
    """A results.json; its results of this network are added to the metadata and the model card.
    Default: the run folder's, for the card only."""

    def __post_init__(self) -> None:
        if self.format == "file":
            _require_suffix(self.output, (".onnx", ".safetensors"))
        elif self.output is not tyro.MISSING and self.output.suffix in (".onnx", *WEIGHT_SUFFIXES):
            raise InputError(
                f"--output {self.output}: names a file, and --format timm-hub writes a folder; "
                f"take --output {self.output.with_suffix('')}"
            )

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.format == "timm-hub", "without --format timm-hub", "arch")
