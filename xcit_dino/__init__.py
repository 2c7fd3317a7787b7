"""xcit-dino: self-supervised pretraining of XCiT backbones with DINO.

    model, transform = xcit_dino.load("runs/mine")
    features = xcit_dino.embed(["a.jpg", "b.jpg"], model, transform)

The names below are imported when they are first used. The code lives in the top-level folders
``data models train eval ssl supervised report slurm``; this package only gives them one import name
(``xcit_dino.ssl.networks``), because a top-level package called ``ssl`` would hide Python's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcit_dino.commands import distill, evaluate, finetune, knn, linear, pretrain
    from xcit_dino.errors import InputError
    from xcit_dino.eval.api.estimators import KNN, LinearProbe
    from xcit_dino.eval.api.pretrained import embed, load
    from xcit_dino.models.zoo import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "KNN", "InputError", "LinearProbe", "create_model", "distill", "embed", "evaluate", "finetune",
    "knn", "linear", "list_models", "load", "pretrain",
]  # fmt: skip
_HOMES = {
    "create_model": "models.zoo", "list_models": "models.zoo",
    "load": "eval.api.pretrained", "embed": "eval.api.pretrained",
    "KNN": "eval.api.estimators", "LinearProbe": "eval.api.estimators",
    "InputError": "errors",
    **dict.fromkeys(("pretrain", "finetune", "distill", "knn", "linear", "evaluate"), "commands"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
