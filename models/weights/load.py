"""Read weights: find the network in any supported checkpoint and load it strictly.

Supported: official XCiT and DINO-XCiT checkpoints (backbones, full checkpoints, linear heads),
ours, timm's, safetensors, PASSL's. ``models/weights/convert.py`` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.inputs import KEY, InputSettings
from xcit_dino.models.weights import formats, layouts
from xcit_dino.models.weights.channels import fit_channels
from xcit_dino.models.weights.layouts import State
from xcit_dino.models.zoo import TIMM_PREFIX

# Networks of a checkpoint: (network, prefix of its names), in order of preference.
# "Student." and "Teacher." are distillation's, whose teacher is another architecture.
PLACES = (
    ("teacher", "teacher."),
    ("student", "Student."),
    ("student", "model.Student."),
    ("model", "classy_state_dict.base_model.model.trunk."),  # VISSL
    ("model", "model."),
    ("model", "segmenter."),  # ours, of segment and detect: their backbones
    ("model", "detector.rcnn.backbone."),
    ("model", "state_dict."),
    ("student", "student."),
    ("model_ema", "model_ema.Student."),
    ("model_ema", "model_ema."),
    ("teacher", "Teacher."),
    ("teacher", "model.Teacher."),
)


class FoundNetwork(NamedTuple):
    """One network of a checkpoint."""

    network: str
    """teacher, student, model or model_ema."""
    place: str
    """Prefix of its names in the file, without wrappers; empty for bare tensors."""
    layout: str
    """official, timm or paddle, as the file has its XCiT; "its own" of another network."""
    state: State
    """Its tensors without wrappers and DINO's head; for an XCiT with official names."""


MOSTLY = 0.5  # of a moving average: from there on it is said what it is of


@dataclass(frozen=True)
class LoadReport:
    """What was loaded."""

    path: Path
    network: str
    place: str
    layout: str
    num_tensors: int
    head: Literal["loaded", "new", "dropped", "none"]
    """The classifier: loaded; left as initialized (none in the file, or not requested); in the
    file but not in the model; in neither."""
    initial_share: float = 0.0
    """Of a run's moving average: what it still has of the weights before the first step, 0 to 1."""
    converted: str = ""
    """What was done to the first layer, for images of other channels."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of the network."""
        share = round(self.initial_share, 4)
        return {"network": self.network} | ({"initial_share": share} if share > MOSTLY else {})

    def __str__(self) -> str:
        where = f" under {self.place!r}" if self.place else ""
        return (
            f"{self.path.name}: loaded the {self.network}{where} ({self.num_tensors} tensors, "
            f"{self.layout} layout, classifier {self.head})"
            + (
                f"; {self.initial_share:.0%} of it is still the weights before the first step"
                if self.initial_share > MOSTLY
                else ""
            )
            + (f"; {self.converted}" if self.converted else "")
        )


def find_network(path: Path, which: str | None = None) -> FoundNetwork:
    """Find a network in a checkpoint.

    which: teacher, student, model or model_ema; None: the teacher of a DINO checkpoint, the
    student of a distillation, or the only network. If the file does not identify its network as
    teacher or student (``model``, or bare tensors), it is used for either.

    Raises:
        InputError: unreadable, no network found, not the requested one (lists those found), or
            non-finite values.
    """
    return found_in(path, formats.read(path), which)


def found_in(path: Path, tree: formats.Tree, which: str | None = None) -> FoundNetwork:
    """:func:`find_network` in what was read from ``path``."""
    networks = _networks(tree)
    if not networks:
        raise InputError(f"{path}: no network found in it; name a checkpoint")
    chosen = [found for found in networks if which in (None, found.network)]
    if which in ("teacher", "student"):
        chosen += [found for found in networks if found.network == "model"]
    if not chosen:
        held = ", ".join(dict.fromkeys(found.network for found in networks))
        raise InputError(f"{path}: contains no {which}; choose one of those it contains: {held}")
    check_finite(path, chosen[0].state)
    return chosen[0]


def _networks(tree: formats.Tree) -> list[FoundNetwork]:
    """All networks of a checkpoint, in the order of ``PLACES``."""
    flat = layouts.unwrap(layouts.flatten(tree))
    parts = [(network, place, layouts.select_prefix(flat, place)) for network, place in PLACES]
    parts = [part for part in parts if part[2]]
    if not parts:
        tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor)}
        parts = [("model", "", layouts.unwrap(tensors))] if tensors else []
    networks = []
    for network, place, state in parts:
        if backbone := layouts.select_prefix(state, "backbone."):
            state, place = backbone, f"{place}backbone."
        layout, state = layouts.detect_layout(state), layouts.to_official(state)
        if layout == "official" and layouts.infer_shape(state) is None:
            layout = "its own"
        networks.append(FoundNetwork(network, place, layout, state))
    return networks


def load_backbone(
    path: str | Path,
    model: nn.Module,
    which: str | None = None,
    *,
    head: Literal["auto", "new", "required"] = "auto",
    adapt: bool = False,
) -> LoadReport:
    """Load a network into a model strictly: every tensor of the backbone must be present.

    which: see :func:`find_network`; head: treatment of the classifier. "auto" loads it if
    both file and model have one; "new" keeps the model's as initialized (finetuning on other
    classes); "required" refuses a file without one (evaluating a classifier). adapt: convert
    the first layer where the images have other channels (``models/weights/channels.py``).

    Raises:
        InputError: unreadable, another architecture or class count (names both), or tensors
            missing, unexpected or of another shape (lists them).
    """
    found = find_network(Path(path), which)
    state, report = fit(Path(path), found, model, head=head, adapt=adapt)
    model.load_state_dict(state)
    return report


def fit(
    path: Path,
    found: FoundNetwork,
    model: nn.Module,
    *,
    head: Literal["auto", "new", "required"] = "auto",
    adapt: bool = False,
) -> tuple[State, LoadReport]:
    """A found network's tensors as ``model`` names and shapes them, all of them, and what was
    taken; the model is not changed.

    path: for messages; head, adapt: see :func:`load_backbone`.

    Raises:
        InputError: as for :func:`load_backbone`.
    """
    expected = model.state_dict()
    state = (
        layouts.to_timm(found.state) if layouts.detect_layout(expected) == "timm" else found.state
    )
    state = _as_timm_reads_it(state, model)
    check_arch(path, state, model)
    state, converted = fit_channels(path, state, expected, model, adapt)
    in_file, in_model = classifier_names(state, model), classifier_names(expected, model)
    if head == "required" and not in_file:
        raise InputError(f"{path}: has no classifier; train one with linear or finetune")
    if head != "new" and in_file and in_model:
        _check_classes(path, state[in_file[0]], expected[in_model[0]])
        outcome = "loaded"
    else:
        outcome = "new" if in_model else "dropped" if in_file else "none"
        state = {name: value for name, value in state.items() if name not in in_file}
        state |= {name: expected[name] for name in in_model}
    check_tensors(path, state, expected, name_of(model))
    taken = len(state) - (len(in_model) if outcome == "new" else 0)
    share = initial_share(path) if found.network == "model_ema" else 0.0
    return state, LoadReport(
        path, found.network, found.place, found.layout, taken, outcome, share, converted
    )


def _as_timm_reads_it(state: State, model: nn.Module) -> State:
    """Tensors with the names that they have in a timm network, where its publishers gave them
    others (Meta's DINOv2 in timm's ViT) and timm has a rule for those; else as they are."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or not hasattr(model, "default_cfg") or _same_names(state, model):
        return state
    try:
        converted = convert(dict(state), model)
    except Exception:  # made for other files; check_tensors then lists what does not fit
        return state
    return converted if _same_names(converted, model) else state


def _same_names(state: State, model: nn.Module) -> bool:
    """Whether a network's tensors are all there, and no other but a classifier."""
    backbone = {name for name in model.state_dict() if not _is_classifier(name, model)}
    return backbone == {name for name in state if not _is_classifier(name, model)}


def name_of(model: nn.Module) -> str:
    """``xcit_nano_12_p8``, ``timm/resnet18``, or what can be said of another network."""
    if shape := layouts.infer_shape(model.state_dict()):
        return str(shape)
    known = getattr(model, "default_cfg", {}).get("architecture")
    return f"{TIMM_PREFIX}{known}" if known else type(model).__name__


def initial_share(path: Path) -> float:
    """What the moving average in a run's checkpoint still has of the weights before the first step,
    0 to 1; 0 where the file does not say."""
    facts = formats.metadata(path)
    decay = (yaml.safe_load(facts.get("config", "")) or {}).get("model_ema_decay")
    return decay ** int(facts["step"]) if decay and "step" in facts else 0.0


def input_settings(path: Path, which: str | None = None) -> InputSettings | None:
    """Input settings of a file's network (which: see :func:`find_network`), as stored in the file;
    None if it has none.

    Raises:
        InputError: unreadable, or damaged settings.
    """
    try:
        facts = formats.metadata(path)
        options = yaml.safe_load(facts["config"]) if "config" in facts else {}
        if which == "teacher" and "distillation_type" in options:  # of a distillation with labels
            text = facts.get("teacher_input")
        elif options:
            return InputSettings.from_run(options)
        else:
            text = facts.get(KEY)
        return InputSettings.parse(text) if text else None
    except InputError:
        raise
    except Exception as error:  # whatever readers raise on a damaged header, and bad values
        raise InputError(f"{path}: its input settings cannot be read ({error})") from error


def load_linear(path: str | Path) -> tuple[Tensor, Tensor]:
    """Weight (classes, features) and bias (classes,) of a linear probe, official or bare.

    Raises:
        InputError: unreadable, no linear layer found, or non-finite values.
    """
    flat = layouts.unwrap(layouts.flatten(formats.read(Path(path))))
    for prefix in ("state_dict.linear.", "linear.", ""):
        if f"{prefix}weight" in flat and f"{prefix}bias" in flat:
            layer = {name: flat[prefix + name] for name in ("weight", "bias")}
            check_finite(Path(path), layer)
            return layer["weight"], layer["bias"]
    raise InputError(f"{path}: contains no linear layer (linear.weight and linear.bias)")


def count_outputs(path: Path, which: str | None, model: nn.Module) -> int:
    """Number of classes of the classifier in a file, of a network like ``model``.

    Raises:
        InputError: see :func:`find_network`, or it has no classifier.
    """
    state = find_network(path, which).state
    names = classifier_names(state, model)
    if not names:
        raise InputError(f"{path}: has no classifier; train one with linear or finetune")
    return len(state[names[0]])


def classifier_names(state: State, model: nn.Module) -> list[str]:
    """Names of the tensors in ``state`` that are the classifier of a network like ``model``."""
    return [name for name in state if _is_classifier(name, model)]


def _is_classifier(name: str, model: nn.Module) -> bool:
    """Whether a tensor belongs to the classifier: ``head``, or timm's name for it."""
    prefixes = getattr(model, "default_cfg", {}).get("classifier", "head")
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def check_arch(path: Path, state: State, model: nn.Module) -> None:
    """Refuse another architecture, where the tensors or the file itself name it."""
    shape = layouts.infer_shape(state)
    same_kind = shape == layouts.infer_shape(model.state_dict())
    if same_kind and (shape or _same_names(state, model)):
        return
    in_file = str(
        shape or (formats.metadata(path) if path.is_file() else {}).get("arch", "no XCiT")
    )
    if not same_kind or in_file.startswith(TIMM_PREFIX):
        raise InputError(
            f"{path}: holds {in_file}, but the model is {name_of(model)}; change --arch or the file"
        )


def _check_classes(path: Path, in_file: Tensor, in_model: Tensor) -> None:
    if len(in_file) != len(in_model):
        raise InputError(
            f"{path}: classifies {len(in_file)} classes, but the model {len(in_model)}; "
            f"name weights for {len(in_model)}, finetune these with --new_head true, or evaluate "
            "them with --label_map"
        )


def check_finite(path: Path, state: State) -> None:
    """Raise InputError if a value is NaN or infinite: a single one makes every output so."""
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{path}: contains NaN or infinite values (in {name_list(bad, most=3)}); the file "
            "is damaged, or its training diverged: name another file, or an earlier checkpoint"
        )


def check_tensors(path: Path, state: State, expected: State, model: str = "the model") -> None:
    """Raise InputError with the lists where names or shapes differ; ``model`` is its name."""
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {
            name
            for name in state.keys() & expected.keys()
            if state[name].shape != expected[name].shape
        },
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{what}: {name_list(names)}" for what, names in problems.items() if names
        )
        raise InputError(f"{path}: does not fit {model} ({lists}); check --arch and the file")


def name_list(names: Iterable[str], most: int = 8) -> str:
    """``"a, b, c and 4 more"``."""
    names = sorted(set(names))
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
