"""Errors meant for users: each is printed as one line, without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: the message is one line that names the option or file and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class RunError(RuntimeError):
    """A run cannot continue; the message gives the reason and the remedy. Exit code 1."""


class Stopped(Exception):
    """A run was stopped by a signal after saving a checkpoint; the same command resumes. Exit code
    1."""


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Refuse options outside [low, high]; NaN is refused, None (not given) is accepted.

    Raises:
        InputError: names the option and the range.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:
                raise InputError(f"--{name} {number}: must be from {low:g} to {high:g}")


def needs(there: object, why: str, *names: str) -> dict[str, str]:
    """``{name: why}`` for options without effect unless ``there`` is true; used by the
    ``ineffective`` method of a config. ``why`` is "without --resize" or the like."""
    return {} if there else dict.fromkeys(names, why)


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a, b?"`` with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def one_line(error: object, limit: int = 200) -> str:
    """The beginning of an error's text, on one line; its kind where it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def warn(text: str) -> None:
    """Print a one-line warning about a run that continues."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
