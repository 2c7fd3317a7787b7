"""``--multi_labels`` and ``--values`` of ``shards make``: images of which each has several labels,
or none, or numbers that were measured of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.labels import by_rows
from xcit_dino.data.pack.lists import UNLABELED
from xcit_dino.data.pack.tables import (
    INDEX_COLUMNS,
    LABEL_COLUMNS,
    NAME_COLUMNS,
    NO,
    SPLIT_COLUMNS,
    YES,
    Table,
    cells_of,
    normalized,
    read_text,
)
from xcit_dino.errors import InputError, suggest

SEPARATORS = "|;,"
SHOWN = 12  # columns named


def attach_labels(
    images: list[Image],
    path: Path,
    column: str | None,
    notes: list[str],
    group: str | None = None,
) -> tuple[list[Image], list[str]]:
    """(The images that a table names, with their labels; the names of the classes).

    The table has a column of names of images and either one column with labels separated by ``|``,
    ``;`` or ``,`` (else by spaces), or a column of 0 and 1 for each class.

    Args:
        column: the one with the labels; None: found by its name, or the only one.
        notes: receives what was left out, a line each.
        group: a column that holds something else.

    Raises:
        InputError: it cannot be read, or it is not clear which columns hold the labels.
    """
    found, classes = read_labels(path, column, group, notes)
    numbers = {name: number for number, name in enumerate(classes)}
    texts = {
        name: json.dumps(sorted(numbers[label] for label in labels))
        for name, labels in found.items()
    }
    named = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    notes.append(f"labels of {path.name}: {len(classes)} ({named})")
    kept = _attached(images, path, texts, "multi_labels", notes)
    if bare := sum(image.target == b"[]" for image in kept):
        notes.append(f"{bare:,} images have none of the labels, and stay as such")
    return kept, classes


def attach_values(
    images: list[Image],
    path: Path,
    column: str | None,
    notes: list[str],
    group: str | None = None,
) -> tuple[list[Image], list[str]]:
    """(The images that a table names, with their numbers; what these are called). The arguments
    are those of :func:`attach_labels`; images with a gap in a column are left out.

    Raises:
        InputError: it cannot be read, or has no column of numbers.
    """
    heads, columns, name, body = _table(path, "values", column, group)
    chosen = _label_column(path, heads, columns, range(len(heads)), column) if column else None
    given = [n for n in range(len(heads)) if n != name and columns[n] not in INDEX_COLUMNS]
    used = [chosen] if chosen is not None else [n for n in given if _is_numeric(body, n)]
    if not used or not all(_is_numeric(body, n) for n in used):
        raise InputError(
            f"--values {path}: {f'not every cell of {column}' if column else 'no column'} is a "
            "number; name a column of numbers with --label_column"
        )
    texts = _one_each(path, [(row[name], [_number(row[n]) for n in used]) for row in body])
    whole = {name: json.dumps(values) for name, values in texts.items() if None not in values}
    if gaps := len(texts) - len(whole):
        notes.append(f"skipped: {gaps:,} rows of {path.name} with a gap")
    names = [heads[n] for n in used]
    notes.append(f"values of {path.name}: {', '.join(names)}")
    if not column:
        notes += _idle(heads, given, used, body, lambda cell: _number(cell) is not None)
    return _attached(images, path, whole, "values", notes), names


def _one_each(
    path: Path, rows: Sequence[tuple[str, list[float | None]]]
) -> dict[str, list[float | None]]:
    """{name of an image: its numbers}; refuses two rows that differ."""
    found: dict[str, list[float | None]] = {}
    for name, numbers in rows:
        if found.setdefault(name, numbers) != numbers:
            shown = " and ".join(
                ", ".join("a gap" if n is None else f"{n:g}" for n in each)
                for each in (found[name], numbers)
            )
            raise InputError(
                f"--values {path}: {name} has two rows, {shown}; keep one row for each image"
            )
    return found


def _idle(
    heads: Sequence[str],
    given: Sequence[int],
    used: Sequence[int],
    body: Sequence[Sequence[str]],
    fits: Callable[[str], bool],
) -> list[str]:
    """A note on the columns of a table that are not read, each with its first cell that does not
    fit."""
    idle = [
        f"{heads[n]} ({next(row[n] for row in body if row[n] and not fits(row[n]))})"
        for n in given
        if n not in used and any(row[n] and not fits(row[n]) for row in body)
    ]
    more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
    return [f"columns not read: {', '.join(idle[:SHOWN])}{more}"] if idle else []


def _number(cell: str) -> float | None:
    """A finite number; None where there is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_numeric(body: Sequence[Sequence[str]], column: int) -> bool:
    """Whether all cells that are not empty are numbers, and some are."""
    cells = [row[column] for row in body if row[column].lower() not in UNLABELED]
    return bool(cells) and all(_number(cell) is not None for cell in cells)


def _attached(
    images: list[Image], path: Path, texts: dict[str, str], option: str, notes: list[str]
) -> list[Image]:
    """The images that a table names, with the texts as their targets."""
    targets = by_rows(images, path, Table([(n, t, None) for n, t in texts.items()]), notes)
    kept = [
        image._replace(target=targets[place].encode())
        for image in images
        if (place := (image.path, image.offset)) in targets
    ]
    if without := len(images) - len(kept):
        notes.append(f"skipped: {without:,} images that --{option} does not name")
    return kept


def _table(
    path: Path, option: str, column: str | None, group: str | None
) -> tuple[list[str], list[str], int, list[list[str]]]:
    """(headings, these normalized, number of the column of names, the other rows), without the
    column of groups."""
    rows = cells_of(path, read_text(path)) or [[]]
    if group in rows[0]:
        if column == group:
            raise InputError(
                f"--label_column {column}: --group_column names it too, and a column is one of them"
            )
        at = rows[0].index(group)
        rows = [row[:at] + row[at + 1 :] for row in rows]
    heads, *body = rows
    columns = normalized(heads)
    name = next((columns.index(known) for known in NAME_COLUMNS if known in columns), None)
    if name is None or not body:
        raise InputError(
            f"--{option} {path}: its first line must name the columns, one of them path or "
            "image, and images must follow"
        )
    return heads, columns, name, [[*row, *[""] * (len(heads) - len(row))] for row in body]


def read_labels(
    path: Path, column: str | None, group: str | None, notes: list[str]
) -> tuple[dict[str, set[str]], list[str]]:
    """({name of an image: its labels}, all labels); an image in several rows has those of all.

    Raises:
        InputError: see :func:`attach_labels`.
    """
    heads, columns, name, body = _table(path, "multi_labels", column, group)
    given = [n for n, head in enumerate(heads) if n != name and columns[n] not in INDEX_COLUMNS]
    hot = [n for n in given if all(row[n] in (*YES, *NO, "") for row in body)]
    chosen = _label_column(path, heads, columns, given, column)
    found: dict[str, set[str]] = {}
    if chosen is None and hot:
        for row in body:
            labels = {heads[n] for n in hot if row[n] in YES}
            found.setdefault(row[name], set()).update(labels)
        notes += _idle(heads, given, hot, body, lambda cell: cell in (*YES, *NO))
        return found, [heads[n] for n in hot]
    if chosen is None:
        others = [n for n in given if columns[n] not in SPLIT_COLUMNS]
        if len(others) != 1:
            named = ", ".join(heads[n] for n in others[:6]) or "none"
            raise InputError(
                f"--multi_labels {path}: which column holds the labels ({named})? name it with "
                "--label_column"
            )
        (chosen,) = others
    cells = [row[chosen] for row in body]
    separator = next((mark for mark in SEPARATORS if any(mark in cell for cell in cells)), None)
    for row in body:
        labels = {label.strip() for label in row[chosen].split(separator)} - {""}
        found.setdefault(row[name], set()).update(labels)
    return found, sorted(set[str]().union(*found.values()))


def _label_column(
    path: Path,
    heads: Sequence[str],
    columns: Sequence[str],
    given: Sequence[int],
    wanted: str | None,
) -> int | None:
    """The column of the labels, where it is named or has a usual name."""
    if wanted is None:
        return next((n for n in given if columns[n] in LABEL_COLUMNS), None)
    for names in (heads, columns):
        if wanted in names:
            return list(names).index(wanted)
    raise InputError(
        f"--label_column {wanted}: {path} has no such column; it has {', '.join(heads)}"
        f"{suggest(wanted, columns)}"
    )
