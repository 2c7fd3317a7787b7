"""xcit-dino: self-supervised pretraining of XCiT backbones with DINO.

The code lives in the top-level folders ``data models train ssl eval slurm``; this package only
gives them one import name (``xcit_dino.ssl.networks``), because a top-level package called ``ssl``
would hide Python's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def create_model(name: str | None = None, **kwargs: Any) -> nn.Module:
    """Build a backbone by name or from a recipe; see :func:`xcit_dino.models.zoo.create_model`."""
    from xcit_dino.models.zoo import create_model

    return create_model(name, **kwargs)


def list_models() -> list[str]:
    """Names of all built-in XCiT models; see :func:`xcit_dino.models.zoo.list_models`."""
    from xcit_dino.models.zoo import list_models

    return list_models()
