"""Names of backbones and how to create them; importing this module does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcit_dino.errors import InputError, suggest

if TYPE_CHECKING:
    from torch import nn

TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class ModelConfig:
    """Backbone."""

    arch: str = "xcit_small_12_p16"
    """Backbone: a name from xcit_dino.list_models(), or timm/NAME for any timm model."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student, in [0, 1); the teacher has none."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path_rate < 1:
            raise InputError(
                f"--drop_path_rate {self.drop_path_rate}: must be at least 0 and below 1"
            )


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of an XCiT (official ``xcit.py``); the fields are arguments of ``XCiT``."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool


# name: (embed_dim, depth, num_heads, eta, tokens_norm)
_OFFICIAL_SIZES = {
    "nano_12": (128, 12, 4, 1.0, False),
    "tiny_12": (192, 12, 4, 1.0, True),
    "tiny_24": (192, 24, 4, 1e-5, True),
    "small_12": (384, 12, 8, 1.0, True),
    "small_24": (384, 24, 8, 1e-5, True),
    "medium_24": (512, 24, 8, 1e-5, True),
    "large_24": (768, 24, 16, 1e-5, True),
}
# Not from the paper; for laptops, tests and the quickstart: 0.7 M parameters.
_OUR_SIZES = {"pico_6": (80, 6, 4, 1.0, True)}


def _specs() -> dict[str, ModelSpec]:
    """The official 14, then the official sizes with patch 4 (for small images), then pico."""
    official = [(f"xcit_{s}_p{p}", p, v) for p in (8, 16) for s, v in _OFFICIAL_SIZES.items()]
    small = [(f"xcit_{s}_p4", 4, v) for s, v in _OFFICIAL_SIZES.items()]
    pico = [(f"xcit_{s}_p{p}", p, v) for p in (4, 8, 16) for s, v in _OUR_SIZES.items()]
    return {name: ModelSpec(patch, *values) for name, patch, values in official + small + pico}


_SPECS = _specs()


def list_models() -> list[str]:
    """Names of all built-in models, the official 14 first."""
    return list(_SPECS)


def canonical_name(name: str) -> str:
    """The built-in model behind a published name: ``xcit_small_12_p8_384_dist`` is
    ``xcit_small_12_p8``. ``timm/NAME`` is unchanged. Raises InputError for any other name."""
    if name.startswith(TIMM_PREFIX):
        return name
    bare = re.sub(r"(_224|_384)?(_dist)?$", "", name)
    if bare not in _SPECS:
        hint = suggest(bare, _SPECS) or "; xcit_dino.list_models() lists all"
        raise InputError(f"unknown arch {name!r}{hint}, or write timm/NAME for a timm model")
    return bare


def model_spec(name: str) -> ModelSpec:
    """Sizes of a built-in model, by any of its published names."""
    bare = canonical_name(name)
    if bare.startswith(TIMM_PREFIX):
        raise InputError(f"arch {name!r}: only built-in XCiT models have known sizes")
    return _SPECS[bare]


def create_model(
    name: str | None = None,
    *,
    config: str | Path | None = None,
    num_classes: int = 0,
    in_chans: int = 3,
    drop_path_rate: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a backbone with randomly initialized weights.

    name: a built-in name or ``timm/NAME``; config: a recipe (YAML) whose ``arch`` and
    ``drop_path_rate`` are used instead; num_classes: 0 returns features (B, embed_dim);
    drop_path_rate: overrides the recipe's, default 0; kwargs: any field of ModelSpec,
    or an argument of the timm model. Every model has ``embed_dim`` and ``num_classes``.
    """
    if (name is None) == (config is None):
        raise InputError("create_model: give either a model name or config=RECIPE, and not both")
    if config is not None:
        recipe = _read_recipe(Path(config))
        name = recipe["arch"]
        if drop_path_rate is None:
            drop_path_rate = recipe.get("drop_path_rate")
    assert name is not None
    common: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if drop_path_rate:  # not every timm model has this argument
        common["drop_path_rate"] = drop_path_rate
    if name.startswith(TIMM_PREFIX):
        return _create_timm(name.removeprefix(TIMM_PREFIX), **common, **kwargs)
    spec = vars(model_spec(name))
    from xcit_dino.models.xcit import XCiT

    return XCiT(**{**spec, **common, **kwargs})


def _read_recipe(path: Path) -> dict[str, Any]:
    """Read a flat YAML of ``key: value`` that contains an arch."""
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config {path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("arch"), str):
        raise InputError(f"config {path}: has no 'arch: NAME' line, so it names no model")
    return recipe


# timm's options to accept images of sizes other than the default: ViTs interpolate their
# position embeddings, Swins pad their windows. At the default size the outputs are unchanged.
_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def check_timm_name(name: str, option: str) -> None:
    """Raise InputError where timm has no model of that name, or no weights of its tag; ``option``
    begins the message."""
    import timm

    if not timm.is_model(name):
        hint = suggest(name, timm.list_models()) or "; timm.list_models() lists all"
        raise InputError(f"{option}: this timm ({timm.__version__}) has no such model{hint}")
    bare, _, tag = name.partition(".")
    if tag and name not in (known := timm.list_pretrained(f"{bare}.*")):
        raise InputError(
            f"{option}: this timm has no weights {tag!r} of {bare}; it has {', '.join(known)}"
        )


def _create_timm(name: str, **kwargs: Any) -> nn.Module:
    """A timm model, without classifier if num_classes is 0, with ``embed_dim``, its feature width;
    accepts images of any size where timm supports it."""
    import timm

    check_timm_name(name, f"arch timm/{name}")
    model: Any = None
    for any_size in _ANY_SIZE:
        try:
            model = timm.create_model(name, pretrained=False, **any_size, **kwargs)
            model.any_size = any_size
            if not _takes_one_size(model):
                break
        except TypeError as error:  # an argument this model does not have
            if not any_size:
                unknown = "drop_path_rate" in str(error)
                remedy = "; it has no such layers: --drop_path_rate 0" if unknown else ""
                raise InputError(f"arch timm/{name}: {_first_line(error)}{remedy}") from error
    # convolutional networks have a wider layer before the classifier
    model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def _takes_one_size(model: Any) -> bool:
    """Whether it refuses other sizes all the same: timm's Swins before 1.0.31 ignore
    ``dynamic_img_size``."""
    return bool(getattr(getattr(model, "patch_embed", None), "strict_img_size", False))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
