"""Weights in for pretraining: into student and teacher, from a whole DINO checkpoint or from a
backbone alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.models.weights import formats, layouts
from xcit_dino.models.weights.channels import fit_channels
from xcit_dino.models.weights.layouts import State
from xcit_dino.models.weights.load import (
    FoundNetwork,
    LoadReport,
    check_arch,
    check_finite,
    check_tensors,
    find_network,
    fit,
)


class Pretraining(NamedTuple):
    """A full DINO checkpoint to continue from; names start with ``backbone.`` and ``head.``."""

    student: State
    teacher: State
    center: Tensor
    """(K,), the moving average of the teacher's outputs."""


def load_start(
    path: Path, student: nn.Module, teacher: nn.Module, center: Tensor, new_head: bool = False
) -> str:
    """Load what a file has for pretraining, strictly; returns what was taken, in a line.

    A whole DINO checkpoint gives student, teacher, their heads and the center. Any other file, or
    with ``new_head`` this one too, gives a backbone for both; their heads stay as they are.

    Args:
        student, teacher: with children ``backbone`` and ``head``.
        center: (K,), changed in place.

    Raises:
        InputError: see :func:`load_pretraining` and :func:`load_backbones`.
    """
    if not new_head and holds_pretraining(path):
        return load_pretraining(path, student, teacher, center)
    report = load_backbones(path, find_network(path), student, teacher)
    return f"{report}, for student and teacher; their heads are new"


def load_backbones(
    path: Path, found: FoundNetwork, student: nn.Module, teacher: nn.Module
) -> LoadReport:
    """Load one network as the backbone of student and teacher, strictly.

    path: for messages.

    Raises:
        InputError: another architecture, or tensors missing, unexpected or of another shape.
    """
    state, report = fit(path, found, _backbone(student), adapt=True)
    for network in (student, teacher):  # whole networks, as shards know those alone
        network.load_state_dict({f"backbone.{k}": v for k, v in state.items()}, strict=False)
    return report


def _backbone(network: nn.Module) -> nn.Module:
    return network.get_submodule("backbone")


def holds_pretraining(path: Path) -> bool:
    """Whether a file is a whole DINO checkpoint: student, teacher and center.

    Raises:
        InputError: unreadable.
    """
    return _parts(layouts.unwrap(layouts.flatten(formats.skim(path)))) is not None


def _parts(flat: State) -> Pretraining | None:
    centers = [flat[name] for name in ("loss.center", "dino_loss.center") if name in flat]
    student, teacher = (
        layouts.select_prefix(flat, "student."),
        layouts.select_prefix(flat, "teacher."),
    )
    if not (student and teacher and centers):
        return None
    return Pretraining(student, teacher, centers[0].flatten())


def find_pretraining(path: str | Path) -> Pretraining:
    """Student, teacher and center of a full DINO checkpoint, official or ours.

    Raises:
        InputError: unreadable, only a backbone, or non-finite values.
    """
    found = _parts(layouts.unwrap(layouts.flatten(formats.read(Path(path)))))
    if found is None:
        raise InputError(f"{path}: not a full DINO checkpoint (student, teacher, center)")
    for state in (found.student, found.teacher, {"center": found.center}):
        check_finite(Path(path), state)
    return found


def load_pretraining(
    path: str | Path, student: nn.Module, teacher: nn.Module, center: Tensor
) -> str:
    """Load a full DINO checkpoint strictly; returns a one-line summary.

    student, teacher: with children ``backbone`` and ``head``; center: (K,), changed in place.

    Raises:
        InputError: unreadable, only a backbone, another architecture or a head of other sizes
            (names both), or tensors missing, unexpected or of another shape (lists them).
    """
    path, found, converted = Path(path), find_pretraining(path), ""
    for state, network in ((found.student, student), (found.teacher, teacher)):
        state, wanted = (_without_projector(each) for each in (state, network.state_dict()))
        check_arch(path, layouts.select_prefix(state, "backbone."), _backbone(network))
        state, converted = _fit_channels(path, state, network)
        check_head(path, state, wanted)
        check_tensors(path, state, wanted)
        network.load_state_dict(state, strict=False)
    center.copy_(found.center)
    return (
        f"{path.name}: loaded student and teacher ({len(found.student)} tensors each, heads of "
        f"{len(center)} prototypes) and the center; schedules and optimizer start over"
        + (f"; {converted}" if converted else "")
    )


def _fit_channels(path: Path, state: State, network: nn.Module) -> tuple[State, str]:
    """A student's or teacher's tensors for images of other channels; see
    :func:`xcit_dino.models.weights.channels.fit_channels`."""
    inner, expected = (
        layouts.select_prefix(each, "backbone.") for each in (state, network.state_dict())
    )
    inner, converted = fit_channels(path, inner, expected, _backbone(network), adapt=True)
    return state | {f"backbone.{name}": value for name, value in inner.items()}, converted


def _without_projector(state: State) -> State:
    """A student's tensors without what projects them to a frozen teacher's, which begins as new."""
    return {name: value for name, value in state.items() if not name.startswith("projector.")}


def check_head(path: Path, theirs: State, ours: State) -> None:
    """Raise InputError where two heads differ in an option, with the options to add."""
    found, wanted = (
        head_options(layouts.select_prefix(state, "head.")) for state in (theirs, ours)
    )
    other = [name for name in found if found[name] not in ("", wanted.get(name))]
    if other and wanted:
        has, needs = (", ".join(f"{n} {each[n]}" for n in other) for each in (found, wanted))
        add = " ".join(f"--{name} {found[name]}" for name in other)
        raise InputError(
            f"{path}: has a head of {has}, but the run {needs}; add {add}, "
            "or take the backbone alone with --new_head true"
        )


def head_options(state: State) -> dict[str, str]:
    """The options that a DINO head was made with, read from its tensors; empty where those are no
    such head's."""
    prototypes = state.get("last_layer.weight_v")
    layers = [v for k, v in state.items() if k.startswith("mlp.") and v.ndim == 2]
    if prototypes is None or not layers:
        return {}
    return {
        "out_dim": str(prototypes.shape[0]),
        "head_bottleneck_dim": str(prototypes.shape[1]),
        "head_nlayers": str(len(layers)),
        "head_hidden_dim": str(layers[0].shape[0] if len(layers) > 1 else ""),
        "use_bn_in_head": str(any(k.endswith("running_mean") for k in state)).lower(),
    }
