"""Lists of path,label: the images of a source, or the labels of images that lie elsewhere."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from xcit_dino.data.imagefile import Image
from xcit_dino.data.sources import Listing
from xcit_dino.errors import InputError

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    "path filepath file_path file filename file_name image image_path name imageid".split()
)
LABEL_COLUMNS = "label labels class class_name target category".split()
MAX_FILE = 1 << 30


def list_images(path: Path) -> Listing:
    """The images that a CSV, TSV or JSONL names; paths count from the folder of the list.

    A row without a label is unlabelled. JSONL lines hold ``{"path": ..., "label": ...}``.
    """
    listing = Listing(is_list=True)
    for name, label in read_pairs(path):
        file = path.parent / name
        try:
            size = file.stat().st_size
        except (OSError, ValueError) as error:
            listing.bad.append({"source": name, "reason": f"cannot be read: {error}"})
            continue
        listing.images.append(Image(name, str(file), size=size, label=label))
    return listing


def read_pairs(path: Path) -> list[tuple[str, str | None]]:
    """(name, label or None) of the rows of a list.

    A header row says which columns these are; without one they are the first two.

    Raises:
        InputError: the file cannot be read, or a row holds no name; the line is named.
    """
    text = read_text(path)
    if path.suffix == ".jsonl":
        return [
            _json_row(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line
        ]
    first = text.partition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ","))
    except csv.Error as error:
        raise InputError(f"{path} is no CSV: {error}") from None
    rows = [[cell.strip() for cell in row] for row in rows if row]
    header = [cell.lower() for cell in rows[0]] if rows else []
    name = next((n for n, column in enumerate(header) if column in PATH_COLUMNS), None)
    if name is None:
        name, label = 0, 1
    else:
        label = next((n for n, c in enumerate(header) if c in LABEL_COLUMNS), 0 if name else 1)
        rows = rows[1:]
    rows = [row for row in rows if len(row) > name]
    return [(row[name], (row[label] or None) if len(row) > label else None) for row in rows]


def _json_row(line: str, place: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
        label = row.get("label")
        return str(row["path"]), None if label is None else str(label)
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise InputError(f'{place}: expected {{"path": ..., "label": ...}}') from None


def read_text(path: Path) -> str:
    """A text of at most 1 GiB.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} is larger than 1 GiB: no list of labels")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
