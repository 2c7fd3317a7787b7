"""Tables of image names and labels as people have them: which column is which, in what encoding."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xcit_dino.data.shards.scan import IMAGE_EXTENSIONS
from xcit_dino.errors import InputError, suggest

NAME_COLUMNS = (  # the more telling first
    "path filepath filepaths file_path image_path img_path full_path relative_path file_name "
    "filename file image_name image_file image_filename image img_name img fname image_id "
    "imageid img_id id_code id name uuid"
).split()
LABEL_COLUMNS = "label labels class class_name target category".split()
SPLIT_COLUMNS = "split subset set data_set dataset partition".split()
INDEX_COLUMNS = ("", "index", "idx", "unnamed_0", "row")
MAX_FILE = 1 << 30
DELIMITERS = ",\t;|"
YES, NO = ("1", "1.0", "True", "true", "TRUE"), ("0", "0.0", "False", "false", "FALSE")


@dataclass
class Table:
    """Rows of a list."""

    rows: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """(name of the image, label, split) as they are written; None where there is none."""
    notes: list[str] = field(default_factory=list)
    """Notes to print, a line each."""


def read_text(path: Path, notes: list[str] | None = None) -> str:
    """A text of at most 1 GiB: UTF-8, UTF-16 with its mark, else Windows-1252 (Latin-1).

    Raises:
        InputError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} is larger than 1 GiB: no list of labels")
        raw = path.read_bytes()
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            if notes is not None:
                notes.append(f"{path.name} is not UTF-8; it was read as UTF-16")
            return raw.decode("utf-16")
        if b"\0" in raw:
            raise InputError(f"{path} cannot be read: it is no text in UTF-8 or UTF-16")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if notes is not None:
        notes.append(f"{path.name} is not UTF-8; it was read as Windows-1252 (Latin-1)")
    return text


def read_table(path: Path, label_column: str | None = None) -> Table:
    """The rows of a CSV (or TSV, or with ; or |) of image names and labels.

    Raises:
        InputError: it cannot be read, or several columns could be the label.
    """
    notes: list[str] = []
    return table_of(path, cells_of(path, read_text(path, notes)), label_column, notes)


def first_row(path: Path) -> list[str]:
    """The names of a CSV's columns, or what else stands there."""
    return next(iter(cells_of(path, read_text(path))), [])


def table_of(
    path: Path, rows: list[list[str]], label_column: str | None, notes: list[str]
) -> Table:
    """What the cells of a file mean, with or without a row of headings.

    Raises:
        InputError: several columns could be the label.
    """
    table = Table(notes=notes)
    if not rows:
        return table
    columns = normalized(rows[0])
    has_header = _is_header(rows, columns)
    if not has_header:
        columns = [str(n) for n in range(1, max(map(len, rows)) + 1)]
    body = rows[1:] if has_header else rows
    name = _name_column(columns, body, has_header)
    body = [row for row in body if len(row) > name and row[name]]
    split = next((n for n, c in enumerate(columns) if c in SPLIT_COLUMNS and n != name), None)
    if split is not None and label_column in (columns[split], rows[0][split]):
        split = None
    hot, label = _label_column(path, columns, rows[0], body, name, split, label_column, has_header)
    if hot:
        heads = ", ".join(rows[0][n] for n in hot[:4]) + (", ..." if len(hot) > 4 else "")
        table.notes.append(f"labels of {path.name}: {len(hot)} one-hot columns ({heads})")
    elif has_header and label is not None and label_column is None:
        others = [h for n, h in enumerate(rows[0]) if n not in (name, label, split) and h]
        others = [head for head in others if normalized([head])[0] not in INDEX_COLUMNS]
        if others:
            table.notes.append(
                f"labels of {path.name}: column {rows[0][label]} (not {', '.join(others[:4])}"
                f"{', ...' if len(others) > 4 else ''}; another with --label_column)"
            )
    table.rows = [
        (
            row[name],
            rows[0][next(n for n in hot if _is_one(row[n]))] if hot else _cell(row, label),
            _cell(row, split),
        )
        for row in body
    ]
    if label is not None and columns[label : label + 1] == ["predictionstring"]:
        # Kaggle's LOC_val_solution.csv: "ILSVRC2012_val_00000001,n01751748 111 108 441 193"
        table.rows = [(n, found and found.split()[0], s) for n, found, s in table.rows]
    return table


def read_names(path: Path) -> list[tuple[str, str | None]]:
    """(name, split) of each row of a table of image names, whatever its other columns hold; a text
    with a name a line is such a table.

    Raises:
        InputError: it cannot be read.
    """
    rows = cells_of(path, read_text(path))
    if not rows:
        return []
    columns = normalized(rows[0])
    has_header = _is_header(rows, columns)
    body = rows[1:] if has_header else rows
    name = _name_column(columns, body, has_header)
    split = next((n for n, c in enumerate(columns) if c in SPLIT_COLUMNS), None)
    split = split if has_header and split != name else None
    return [(row[name], _cell(row, split)) for row in body if len(row) > name and row[name]]


def cells_of(path: Path, text: str) -> list[list[str]]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    outside = re.sub(r'"[^"]*"', "", first)
    delimiter = max(DELIMITERS, key=outside.count)
    if not outside.count(delimiter):
        spaced = re.fullmatch(r"(\S+)\s+\S+", outside.strip())
        if spaced and _is_image(spaced[1]):  # "path label" of Caffe's and torchvision's lists
            return [line.split() for line in text.splitlines() if line.strip()]
    try:
        rows = list(
            csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        )
    except csv.Error as error:
        raise InputError(f"{path} is no CSV: {error}") from None
    return [cells for row in rows if any(cells := [cell.strip() for cell in row])]


def normalized(cells: Sequence[str]) -> list[str]:
    """Names of columns in lower case, words joined by ``_``."""
    return [re.sub(r"[^\w]+", "_", cell.lower()).strip("_") for cell in cells]


def _is_image(cell: str) -> bool:
    return cell.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in cell


def _is_header(rows: list[list[str]], columns: list[str]) -> bool:
    """The first row names the columns: no image is in it, and it has a known name, or images come
    after it."""
    if any(map(_is_image, rows[0])):
        return False
    known = set(columns) & {*NAME_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS}
    return bool(known) or any(_is_image(cell) for row in rows[1:2] for cell in row)


def _name_column(columns: list[str], body: list[list[str]], has_header: bool) -> int:
    known = [columns.index(name) for name in NAME_COLUMNS if name in columns] if has_header else []
    images = [n for n, cell in enumerate(body[0]) if _is_image(cell)] if body else []
    for choice in ([n for n in known if n in images], images, known):
        if choice:
            return choice[0]
    return 1 if columns[0] in INDEX_COLUMNS and len(columns) > 1 else 0


def _label_column(
    path: Path, columns: list[str], heads: list[str], body: list[list[str]], name: int,
    split: int | None, asked: str | None, has_header: bool,
) -> tuple[list[int], int | None]:  # fmt: skip
    """(one-hot columns, or the label's column, if there is one)."""
    if asked is not None:
        for kind in (heads if has_header else [], columns):
            if asked in kind and kind.index(asked) != name:
                return [], kind.index(asked)
        raise InputError(
            f"--label_column {asked}: {path} has no such column; it has "
            f"{', '.join(heads if has_header else columns)}{suggest(asked, columns)}"
        )
    known = [n for n, column in enumerate(columns) if column in LABEL_COLUMNS and n != name]
    width = max((len(row) for row in body), default=0)
    others = [
        n for n in range(max(width, len(columns)))
        if n not in (name, split) and any(_cell(row, n) for row in body)
        and not (has_header and n < len(columns) and columns[n] in INDEX_COLUMNS)
        and not (not has_header and n < name and _counts(body, n))
    ]  # fmt: skip
    choice = [n for n in known if n in others] if has_header else []
    choice = choice or others
    if len(choice) <= 1:
        return [], choice[0] if choice else None
    if has_header and choice[-1] < len(heads) and _one_hot(body, choice):
        return choice, None
    names = [heads[n] if has_header and n < len(heads) else str(n + 1) for n in choice]
    raise InputError(
        f"{path}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} could each be the "
        f"label; choose with --label_column, such as --label_column {names[0]}"
    )


def _counts(body: list[list[str]], column: int) -> bool:
    """A column that numbers the rows."""
    first = [_cell(row, column) for row in body[:50]]
    return all(cell is not None and cell.isdigit() for cell in first) and [
        int(cell or 0) - int(first[0] or 0) for cell in first
    ] == list(range(len(first)))


def _one_hot(body: list[list[str]], columns: list[int]) -> bool:
    cells = [[_cell(row, n) for n in columns] for row in body]
    return bool(cells) and all(
        sum(map(_is_one, row)) == 1 and all(_is_one(c) or c in NO for c in row) for row in cells
    )


def _is_one(cell: str | None) -> bool:
    return cell in YES


def _cell(row: list[str], column: int | None) -> str | None:
    return (row[column] or None) if column is not None and column < len(row) else None
