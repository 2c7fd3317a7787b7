"""Libraries that only some data need: imported when they are, or named with their extra."""

from __future__ import annotations

import importlib
from typing import Any

from xcit_dino.data.decode.rgb import BadImage


class MissingLibrary(BadImage):
    """The image may be fine, but nothing installed can decode it."""


def require(module: str, extra: str, what: str) -> Any:
    """The module.

    Raises:
        MissingLibrary: it is not installed; names ``pip install 'xcit-dino[extra]'``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibrary(
            f"{what} needs {error.name or module}: pip install 'xcit-dino[{extra}]'"
        ) from None
