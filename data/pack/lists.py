"""Lists of path,label: the images of a source, or the labels of images that lie elsewhere."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.tables import Table, read_table, read_text
from xcit_dino.data.shards.split_names import split_of
from xcit_dino.errors import InputError

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
UNLABELED = ("", "nan")  # pandas writes nan for a gap


def list_images(path: Path, label_column: str | None = None) -> Listing:
    """The images that a CSV, TSV, JSONL or text names; paths count from the folder of the list.

    A row without a label is unlabeled. JSONL lines hold ``{"path": ..., "label": ...}``. A column
    called ``split`` assigns rows to the training and the validation set.

    Raises:
        InputError: it cannot be read, or none of its files exists.
    """
    table = read_list(path, label_column)
    listing = Listing(is_list=True, notes=table.notes)
    splits = _known_splits(table, path)
    for name, label, split in table.rows:
        failure: Exception | None = None
        for spelling in _spellings(name):
            file = path.parent / spelling
            try:
                size = file.stat().st_size
            except (OSError, ValueError) as error:
                failure = error
                continue
            chosen = splits.get(split) if split else None
            listing.images.append(Image(spelling, str(file), size=size, label=label, split=chosen))
            break
        else:
            listing.bad.append({"source": name, "reason": f"cannot be read: {failure}"})
    if table.rows and not listing.images:
        raise InputError(
            f"{path}: none of its {len(table.rows):,} files exists (the first is "
            f"{path.parent / table.rows[0][0]}); if it only labels images, pack their folder: "
            f"xcit-dino shards make FOLDER DST --labels {path}"
        )
    return listing


def read_list(path: Path, label_column: str | None = None) -> Table:
    """The rows of a list of any kind.

    Raises:
        InputError: the file cannot be read, or a line holds no name; the line is named.
    """
    if path.suffix.lower() != ".jsonl":
        return read_table(path, label_column)
    if label_column is not None:
        raise InputError(f'--label_column {label_column}: {path} holds {{"path", "label"}} lines')
    table = Table()
    lines = read_text(path, table.notes).splitlines()
    table.rows = [_json_row(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    return table


def _json_row(line: str, place: str) -> tuple[str, str | None, str | None]:
    try:
        row = json.loads(line)
        name = next(row[key] for key in ("path", "file_name", "filename", "image") if key in row)
        label, split = row.get("label"), row.get("split")
        return (
            str(name), None if label is None else str(label), None if split is None else str(split)
        )  # fmt: skip
    except (ValueError, StopIteration, AttributeError, TypeError, RecursionError):
        raise InputError(f'{place}: expected {{"path": ..., "label": ...}}') from None


def _known_splits(table: Table, path: Path) -> dict[str, str]:
    """``{split as the list spells it: train or val}``.

    Raises:
        InputError: a split column with other words.
    """
    names = sorted({split for _, _, split in table.rows if split})
    if not names:
        return {}
    found = {name: split_of(name)[0] for name in names}
    if strange := [name for name, split in found.items() if not split]:
        raise InputError(
            f"{path}: its column of splits says {strange[0]!r}, which is none of train, val and "
            "test; correct it, or rename the column"
        )
    both = {"val", "test"} <= set(found.values())
    chosen = {n: "val" if s == "test" and not both else s for n, s in found.items()}
    renamed = ", ".join(f"{name} -> {split}" for name, split in chosen.items())
    table.notes.append(f"splits by the column of {path.name}: {renamed}")
    return chosen


def _spellings(name: str) -> Iterator[str]:
    """A path as it is written, with the other slashes, and in the other forms of Unicode."""
    seen = set()
    for slashed in (name, name.replace("\\", "/")):
        for form in (None, "NFC", "NFD"):
            spelling = unicodedata.normalize(form, slashed) if form else slashed
            if spelling not in seen:
                seen.add(spelling)
                yield spelling
