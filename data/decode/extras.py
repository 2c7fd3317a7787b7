"""Libraries that only some data need: imported when they are, or named with their extra."""

from __future__ import annotations

import importlib
from typing import Any

from xcit_dino.data.decode.rgb import BadImage


def require(module: str, extra: str, what: str) -> Any:
    """The module.

    Raises:
        BadImage: it is not installed; names ``pip install 'xcit-dino[extra]'``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadImage(
            f"{what} needs {error.name or module}: pip install 'xcit-dino[{extra}]'"
        ) from None
