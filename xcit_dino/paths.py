"""Paths given in options and recipes."""

from __future__ import annotations

import os
from typing import Annotated

from xcit_dino.errors import InputError

LOCATION = "location"
Location = Annotated[str, LOCATION]
"""Type of an option that accepts a folder, a file or a URL; a plain path is a ``Path``."""
NOT_PATHS = ("pipe:", "timm/")
"""What a location that is a command, or the name of a timm model, begins with."""


def expand(text: str) -> str:
    """Replace a leading ``~`` or ``~user`` by that home folder.

    A shell only does so at the start of a word: ``--output_dir=~/run`` and paths in YAML
    are passed unexpanded.

    Raises:
        InputError: there is no such user, or nothing, which would be the current folder.
    """
    if not text.strip():
        raise InputError("an empty path; write . for the current folder, or leave the option out")
    opened = os.path.expanduser(text)
    if opened.startswith("~"):
        user = opened.partition("/")[0]
        raise InputError(
            f"{text}: no user {user[1:]!r} on this machine; write the home folder out, or the "
            f"absolute path ({os.path.abspath(text)}) of a folder that is really called {user}"
        )
    return opened
