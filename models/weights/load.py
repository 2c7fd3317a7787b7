"""Weights in: find the network in any checkpoint of the family and load it strictly.

The family: official XCiT and DINO-XCiT checkpoints (backbone files, full ones, linear heads), ours,
timm's, safetensors, PASSL's. ``models/weights/convert.py`` lets them out again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.inputs import KEY, InputSettings
from xcit_dino.models.weights import formats, layouts
from xcit_dino.models.weights.layouts import State

# Where a checkpoint keeps its networks: (network, prefix of its names), the preferred first.
# "Student." and "Teacher." are distillation's, whose teacher is another architecture.
PLACES = (
    ("teacher", "teacher."),
    ("student", "Student."),
    ("student", "model.Student."),
    ("model", "model."),
    ("model", "state_dict."),
    ("student", "student."),
    ("model_ema", "model_ema.Student."),
    ("model_ema", "model_ema."),
    ("teacher", "Teacher."),
    ("teacher", "model.Teacher."),
)


class Found(NamedTuple):
    """One network of a checkpoint."""

    network: str
    """teacher, student, model or model_ema."""
    place: str
    """Prefix of its names in the file, wrappers left out; empty in a bare file."""
    layout: str
    """official, timm or paddle, as the file has it."""
    state: State
    """Its tensors; official names where it is an XCiT, without wrappers and DINO's head."""


@dataclass(frozen=True)
class Report:
    """What was loaded."""

    path: Path
    network: str
    place: str
    layout: str
    num_tensors: int
    head: Literal["loaded", "new", "dropped", "none"]
    """The classifier: loaded; left as initialised (the file has none, or none was wanted); in the
    file but not in the model; in neither."""

    def __str__(self) -> str:
        where = f" under {self.place!r}" if self.place else ""
        return (
            f"{self.path.name}: took the {self.network}{where} ({self.num_tensors} tensors, "
            f"{self.layout} layout, classifier {self.head})"
        )


class Pretraining(NamedTuple):
    """A whole DINO checkpoint, for going on: names begin with ``backbone.`` and ``head.``."""

    student: State
    teacher: State
    center: Tensor
    """(K,), the moving average of the teacher's outputs."""


def find_network(path: Path, which: str | None = None) -> Found:
    """The network of a checkpoint.

    which: teacher, student, model or model_ema; None takes the teacher of a DINO checkpoint, the
    student of a distillation, or the only network there is. A file that does not say whether its
    network is a teacher or a student (``model``, or bare tensors) serves for either.

    Raises:
        InputError: unreadable, no network in it, not the one asked for (names those it has), or
            values that are not finite.
    """
    networks = _networks(formats.read(path))
    if not networks:
        raise InputError(f"{path}: holds no network that could be found; name a checkpoint")
    chosen = [found for found in networks if which in (None, found.network)]
    if which in ("teacher", "student"):
        chosen += [found for found in networks if found.network == "model"]
    if not chosen:
        held = ", ".join(dict.fromkeys(found.network for found in networks))
        raise InputError(f"{path}: holds no {which}; choose one of those it holds: {held}")
    check_finite(path, chosen[0].state)
    return chosen[0]


def _networks(tree: formats.Tree) -> list[Found]:
    """All networks of a checkpoint, in the order of PLACES."""
    flat = layouts.unwrap(layouts.flatten(tree))
    parts = [(network, place, layouts.under(flat, place)) for network, place in PLACES]
    parts = [part for part in parts if part[2]]
    if not parts:
        tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor)}
        parts = [("model", "", layouts.unwrap(tensors))] if tensors else []
    networks = []
    for network, place, state in parts:
        if backbone := layouts.under(state, "backbone."):
            state, place = backbone, f"{place}backbone."
        layout = layouts.layout_of(state)
        networks.append(Found(network, place, layout, layouts.to_official(state)))
    return networks


def load_backbone(
    path: str | Path,
    model: nn.Module,
    which: str | None = None,
    *,
    head: Literal["auto", "new", "required"] = "auto",
) -> Report:
    """Load a network into a model, strictly: every tensor of the backbone must be there.

    which: see :func:`find_network`; head: what happens to the classifier. "auto" loads it where
    both sides have one; "new" leaves the model's as initialised (finetuning on other classes);
    "required" refuses a file without one (evaluating a classifier).

    Raises:
        InputError: unreadable, another architecture or class count (names both), or tensors
            missing, unexpected or of another shape (lists them).
    """
    path = Path(path)
    found = find_network(path, which)
    wanted = model.state_dict()
    state = layouts.to_timm(found.state) if layouts.layout_of(wanted) == "timm" else found.state
    _check_arch(path, layouts.shape_of(state), layouts.shape_of(wanted))
    theirs = [name for name in state if _is_classifier(name, model)]
    ours = [name for name in wanted if _is_classifier(name, model)]
    if head == "required" and not theirs:
        raise InputError(f"{path}: has no classifier; train one with linear or finetune")
    if head != "new" and theirs and ours:
        _check_classes(path, state[theirs[0]], wanted[ours[0]])
        outcome = "loaded"
    else:
        outcome = "new" if ours else "dropped" if theirs else "none"
        state = {name: value for name, value in state.items() if name not in theirs}
        state |= {name: wanted[name] for name in ours}
    check_tensors(path, state, wanted)
    model.load_state_dict(state)
    taken = len(state) - (len(ours) if outcome == "new" else 0)
    return Report(path, found.network, found.place, found.layout, taken, outcome)


def input_settings(path: Path, which: str | None = None) -> InputSettings | None:
    """How images are prepared for a file's network (which: see :func:`find_network`), as the file
    itself says it; None where it does not.

    Raises:
        InputError: unreadable, or damaged settings.
    """
    try:
        facts = formats.metadata(path)
        options = yaml.safe_load(facts["config"]) if "config" in facts else {}
        if which == "teacher" and "teacher_model" in options:  # of a distillation
            text = facts.get("teacher_input")
        elif options:
            return InputSettings.of_run(options)
        else:
            text = facts.get(KEY)
        return InputSettings.parse(text) if text else None
    except InputError:
        raise
    except Exception as error:  # what a damaged header makes the readers raise, and bad values
        raise InputError(f"{path}: its input settings cannot be read ({error})") from error


def find_pretraining(path: str | Path) -> Pretraining:
    """Student, teacher and centre of a full DINO checkpoint, official or ours.

    Raises:
        InputError: unreadable, only a backbone, or values that are not finite.
    """
    flat = layouts.unwrap(layouts.flatten(formats.read(Path(path))))
    centers = [flat[name] for name in ("loss.center", "dino_loss.center") if name in flat]
    student, teacher = layouts.under(flat, "student."), layouts.under(flat, "teacher.")
    if not (student and teacher and centers):
        raise InputError(f"{path}: is no full DINO checkpoint (student, teacher, centre)")
    for state in (student, teacher, {"center": centers[0]}):
        check_finite(Path(path), state)
    return Pretraining(student, teacher, centers[0].flatten())


def load_pretraining(
    path: str | Path, student: nn.Module, teacher: nn.Module, center: Tensor
) -> str:
    """Load a full DINO checkpoint, strictly; returns what was taken, in a line.

    student, teacher: with children ``backbone`` and ``head``; center: (K,), changed in place.

    Raises:
        InputError: unreadable, only a backbone, another architecture or number of prototypes (names
            both), or tensors missing, unexpected or of another shape (lists them).
    """
    path, found = Path(path), find_pretraining(path)
    for state, network in ((found.student, student), (found.teacher, teacher)):
        wanted = network.state_dict()
        theirs, ours = (layouts.shape_of(layouts.under(s, "backbone.")) for s in (state, wanted))
        _check_arch(path, theirs, ours)
        if len(found.center) != len(center):
            raise InputError(
                f"{path}: has {len(found.center)} prototypes, but the head {len(center)}; "
                f"add --out_dim {len(found.center)}"
            )
        check_tensors(path, state, wanted)
        network.load_state_dict(state)
    center.copy_(found.center)
    return (
        f"{path.name}: took student and teacher ({len(found.student)} tensors each, with heads of "
        f"{len(center)} prototypes) and the centre; schedules and optimiser begin anew"
    )


def load_linear(path: str | Path) -> tuple[Tensor, Tensor]:
    """Weight (classes, features) and bias (classes,) of a linear probe, official or bare.

    Raises:
        InputError: unreadable, no linear layer in it, or values that are not finite.
    """
    flat = layouts.unwrap(layouts.flatten(formats.read(Path(path))))
    for prefix in ("state_dict.linear.", "linear.", ""):
        if f"{prefix}weight" in flat and f"{prefix}bias" in flat:
            layer = {name: flat[prefix + name] for name in ("weight", "bias")}
            check_finite(Path(path), layer)
            return layer["weight"], layer["bias"]
    raise InputError(f"{path}: holds no linear layer (linear.weight and linear.bias)")


def _is_classifier(name: str, model: nn.Module) -> bool:
    """Whether a tensor belongs to the classifier: ``head``, or what timm says it is called."""
    prefixes = getattr(model, "default_cfg", {}).get("classifier", "head")
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def _check_arch(path: Path, theirs: layouts.Shape | None, ours: layouts.Shape | None) -> None:
    if theirs != ours:
        raise InputError(
            f"{path}: holds {theirs or 'no XCiT'}, but the model is {ours or 'no XCiT'}; "
            "change --arch or the file"
        )


def _check_classes(path: Path, theirs: Tensor, ours: Tensor) -> None:
    if len(theirs) != len(ours):
        raise InputError(
            f"{path}: classifies {len(theirs)} classes, but the model {len(ours)}; "
            f"name weights for {len(ours)}, or finetune these with --new_head true"
        )


def check_finite(path: Path, state: State) -> None:
    """Raise InputError where a value is NaN or infinite: one is enough to make every output so."""
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{path}: holds values that are NaN or infinite (in {listed(bad, most=3)}); the file "
            "is damaged, or its training diverged: name another file, or an earlier checkpoint"
        )


def check_tensors(path: Path, state: State, wanted: State) -> None:
    """Raise InputError with the lists where names or shapes differ."""
    problems = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": {
            name for name in state.keys() & wanted.keys() if state[name].shape != wanted[name].shape
        },
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise InputError(f"{path}: does not fit the model ({lists}); check --arch and the file")


def listed(names: Iterable[str], most: int = 8) -> str:
    """``"a, b, c and 4 more"``."""
    names = sorted(set(names))
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
