"""Progress of long tasks: a bar with ETA on a terminal, else one line per minute; rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from xcit_dino.files import write_atomic

T = TypeVar("T")
PLAIN_SECONDS = 60.0  # between plain lines, when the output is a log file
STATE_SECONDS = 1.0  # between published states of the bar, which a launcher shows
STATE_FILE = "XCIT_DINO_PROGRESS"  # environment variable: file for those states


class Bar(Protocol):
    """Interface of the bar yielded by :func:`progress`."""

    def advance(self, amount: float = 1, **shown: Any) -> None:
        """Advance by ``amount``; ``shown`` are values to display (``loss="3.21"``)."""
        ...

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        ...


@contextmanager
def progress(label: str, total: float, unit: str = "", start: float = 0) -> Iterator[Bar]:
    """Show ``label`` advancing from ``start`` to ``total``, on stderr.

    Args:
        label: of the task, two or three words.
        total: number of units.
        unit: name of a unit, for the plain lines ("images").
        start: units already done (a resumed run).
    """
    if int(os.environ.get("RANK", "0")):
        yield SilentBar()
    elif sys.stderr.isatty():
        with RichBar(label, total, start) as bar:
            yield bar
    else:
        bar = PlainBar(label, total, unit, start)
        yield bar
        bar.finish()


def track(items: Iterable[T], label: str, total: float, unit: str = "") -> Iterator[T]:
    """Iterate with :func:`progress`, one unit per item."""
    with progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


class SilentBar:
    """A bar that displays nothing."""

    def advance(self, amount: float = 1, **shown: Any) -> None: ...

    def note(self, text: str) -> None: ...


class RichBar:
    """A live bar with label, count, elapsed time and ETA, and a line of values below it."""

    def __init__(self, label: str, total: float, start: float):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("[bold]{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task(label, total=total, completed=start)  # type: ignore[arg-type]
        self.live = Live(self.bar, console=Console(stderr=True))

    def __enter__(self) -> RichBar:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def advance(self, amount: float = 1, **shown: Any) -> None:
        self.bar.advance(self.task, amount)
        if shown:
            self.show(format_values(shown))

    def move_to(self, done: float, shown: str) -> None:
        """Set the position, published by another process."""
        self.bar.update(self.task, completed=done)
        self.show(shown)

    def show(self, values: str) -> None:
        """Display the line of values below the bar."""
        from rich.console import Group
        from rich.text import Text

        self.live.update(Group(self.bar, Text(values, style="dim")) if values else self.bar)

    def note(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False)


class PlainBar:
    """Prints a line at the first unit, one per minute and one at the end; optionally publishes its
    state to a file."""

    def __init__(self, label: str, total: float, unit: str, start: float):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.done = start
        self.began = time.monotonic()
        self.next_line = self.next_state = self.began
        self.last_printed = -1.0  # units at the last line
        self.shown = ""
        self.state_file = os.environ.get(STATE_FILE)

    def advance(self, amount: float = 1, **shown: Any) -> None:
        self.done += amount
        self.shown = format_values(shown) or self.shown
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_SECONDS
            self.line()
        if self.state_file and time.monotonic() >= self.next_state:
            self.next_state = time.monotonic() + STATE_SECONDS
            self.publish(self.state_file)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self.last_printed != self.done:
            self.line()
        if self.state_file:
            self.publish(self.state_file)

    def publish(self, path: str) -> None:
        """Write the state atomically, for a launcher that shows this bar."""
        state = {
            name: getattr(self, name)
            for name in ("label", "unit", "start", "done", "total", "shown")
        }
        state |= {"seconds": time.monotonic() - self.began, "time": time.time()}
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_atomic(Path(path), json.dumps(state), sync=False)

    def line(self) -> None:
        self.last_printed = self.done
        seconds = time.monotonic() - self.began
        rate = (self.done - self.start) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f"eta {clock(left)}" if self.done < self.total else f"took {clock(seconds)}"
        text = f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}".rstrip()
        print(f"{text}  {eta}  {self.shown}".rstrip(), file=sys.stderr, flush=True)


def format_values(shown: dict[str, Any]) -> str:
    """``{"loss": "3.2"}`` -> ``"loss 3.2"``."""
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def clock(seconds: float) -> str:
    """``3723`` -> ``"1:02:03"``; unknown -> ``"?"``."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
