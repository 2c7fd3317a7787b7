"""``--multi_labels`` of ``shards make``: images of which each has several labels, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.labels import by_rows
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


def attach_labels(
    images: list[Image], path: Path, column: str | None, notes: list[str]
) -> tuple[list[Image], list[str]]:
    """(The images that a table names, with their labels; the names of the classes).

    The table has a column of names of images and either one column with labels separated by ``|``,
    ``;`` or ``,`` (else by spaces), or a column of 0 and 1 for each class.

    Args:
        column: the one with the labels; None: found by its name, or the only one.
        notes: receives what was left out, a line each.

    Raises:
        InputError: it cannot be read, or it is not clear which columns hold the labels.
    """
    found, classes = read_labels(path, column)
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [
        (name, json.dumps(sorted(numbers[label] for label in labels)), None)
        for name, labels in found.items()
    ]
    targets = by_rows(images, path, Table(rows), notes)
    kept = [
        image._replace(target=targets[place].encode())
        for image in images
        if (place := (image.path, image.offset)) in targets
    ]
    named = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    notes.append(f"labels of {path.name}: {len(classes)} ({named})")
    if without := len(images) - len(kept):
        notes.append(f"skipped: {without:,} images that --multi_labels does not name")
    if bare := sum(image.target == b"[]" for image in kept):
        notes.append(f"{bare:,} images have none of the labels, and stay as such")
    return kept, classes


def read_labels(path: Path, column: str | None) -> tuple[dict[str, set[str]], list[str]]:
    """({name of an image: its labels}, all labels); an image in several rows has those of all.

    Raises:
        InputError: see :func:`attach_labels`.
    """
    heads, *body = cells_of(path, read_text(path)) or [[]]
    columns = normalized(heads)
    name = next((columns.index(known) for known in NAME_COLUMNS if known in columns), None)
    if name is None or not body:
        raise InputError(
            f"--multi_labels {path}: its first line must name the columns, one of them path or "
            "image, and images must follow"
        )
    body = [[*row, *[""] * (len(heads) - len(row))] for row in body]
    given = [n for n, head in enumerate(heads) if n != name and columns[n] not in INDEX_COLUMNS]
    hot = [n for n in given if all(row[n] in (*YES, *NO, "") for row in body)]
    chosen = _label_column(path, heads, columns, given, column)
    found: dict[str, set[str]] = {}
    if chosen is None and hot:
        for row in body:
            labels = {heads[n] for n in hot if row[n] in YES}
            found.setdefault(row[name], set()).update(labels)
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
