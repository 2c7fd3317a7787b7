"""Lists of path,label: the images of a source, the labels of images that lie elsewhere, or the
images to leave out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xcit_dino.data.columns.arrow import cells
from xcit_dino.data.pack.classes import Part
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.tables import Table, read_names, read_table, read_text, table_of
from xcit_dino.data.shards.split_names import split_of
from xcit_dino.errors import InputError

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
FORMS = '{"NAME": label, ...}, [["NAME", label], ...] or [{"path": NAME, "label": label}, ...]'
UNLABELED = ("", "nan")  # pandas writes nan for a gap
Places = dict[str, dict[str, list[int]]]  # path -> split -> numbers of its images


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
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return table_of(path, cells(path), label_column, [])
    if suffix not in (".jsonl", ".json"):
        return read_table(path, label_column)
    table = Table()
    text = read_text(path, table.notes)
    if suffix == ".json":
        found = [(item, str(path)) for item in _json_items(path, text)]
    else:
        lines = enumerate(text.splitlines(), 1)
        found = [(_parsed(line, f"{path}:{n}"), f"{path}:{n}") for n, line in lines if line.strip()]
    if label_column is not None and not any(label_column in row for row, _ in found):
        keys = list(dict.fromkeys(key for row, _ in found[:100] for key in row))
        raise InputError(
            f"--label_column {label_column}: no line of {path} has it; they have {', '.join(keys)}"
        )
    table.rows = [_json_row(row, place, label_column or "label") for row, place in found]
    return table


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(f'{place}: expected {{"path": ..., "label": ...}}')
    return row


def _json_items(path: Path, text: str) -> list[dict[str, Any]]:
    """``{"path", "label"}`` from one JSON text; StyleGAN's dataset.json has them in ``labels``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("labels"), dict | list):
        found = found["labels"]
    if isinstance(found, dict):
        found = [[name, label] for name, label in found.items()]
    pairs: list[Any] = [
        {"path": item[0], "label": item[1]} if isinstance(item, list) and len(item) == 2 else item
        for item in (found if isinstance(found, list) else [None])
    ]
    if not all(isinstance(item, dict) and not _nested(item.get("label")) for item in pairs):
        raise InputError(f"{path}: expected {FORMS}")
    return pairs


def _nested(value: Any) -> bool:
    return isinstance(value, list | dict)


def _json_row(row: dict[str, Any], place: str, key: str) -> tuple[str, str | None, str | None]:
    name = next((row[n] for n in ("path", "file_name", "filename", "image") if n in row), None)
    label, split = row.get(key), row.get("split")
    if name is None or _nested(name) or _nested(label):
        raise InputError(f'{place}: expected {{"path": ..., "label": ...}}')
    return str(name), None if label is None else str(label), None if split is None else str(split)


def _known_splits(table: Table, path: Path) -> dict[str, str]:
    """``{split as the list spells it: train or val}``.

    Raises:
        InputError: a split column with other words.
    """
    names = sorted({split for _, _, split in table.rows if split})
    if not names:
        return {}
    if strange := [name for name in names if not split_of(name)[0]]:
        raise InputError(
            f"{path}: its column of splits says {strange[0]!r}, which is none of train, val and "
            "test; correct it, or rename the column"
        )
    chosen = split_names(names)
    renamed = ", ".join(f"{name} -> {split}" for name, split in chosen.items())
    table.notes.append(f"splits by the column of {path.name}: {renamed}")
    return chosen


def split_names(names: Sequence[str]) -> dict[str, str]:
    """``{name: train or val}``, ``test`` only beside a ``val``; all names are those of splits."""
    found = {name: split_of(name)[0] for name in names}
    both = {"val", "test"} <= set(found.values())
    return {n: "val" if s == "test" and not both else s for n, s in found.items()}


def _spellings(name: str) -> Iterator[str]:
    """A path as it is written, with other slashes, in other forms of Unicode, in Latin-1."""
    seen = set()
    for slashed in (name, name.replace("\\", "/")):
        for form in (None, "NFC", "NFD"):
            spelling = unicodedata.normalize(form, slashed) if form else slashed
            if spelling not in seen:
                seen.add(spelling)
                yield spelling
    with contextlib.suppress(UnicodeEncodeError):
        if not name.isascii():  # the bytes of an older system, Latin-1
            yield name.replace("\\", "/").encode("cp1252").decode("utf-8", "surrogateescape")


# -- images to leave out ---------------------------------------------------------------------------


def exclude(parts: dict[str, Part], path: Path) -> dict[str, Part]:
    """The parts without the images that a list names, each with a note of how many were left out.

    A row names an image by its path as it is packed (below its split), or by a path that ends with
    it. A row without a split names an image of any split.

    Raises:
        InputError: the list names no image, or one that several splits have.
    """
    if path.suffix.lower() in (".jsonl", ".json", ".parquet"):
        rows = [(name, split) for name, _, split in read_list(path).rows]
    else:
        rows = read_names(path)
    splits = _splits_of({split for _, split in rows if split}, parts, path)
    places: Places = defaultdict(lambda: defaultdict(list))
    for split, part in parts.items():
        for number, image in enumerate(part.images):
            places[_composed(image.name)][split].append(number)
    dropped: dict[str, set[int]] = {split: set() for split in parts}
    unknown = []
    for name, split in rows:
        wanted = [splits[split]] if split else list(parts)
        found = _place(_composed(name), places, wanted)
        if len(found) > 1:
            both = " and ".join(found)
            raise InputError(
                f"--exclude {path}: {name} is an image of {both}; add a column called split"
            )
        for own, numbers in found.items():
            dropped[own].update(numbers)
        if not found:
            unknown.append(name)
    if not any(dropped.values()):
        first = next(image.name for part in parts.values() for image in part.images)
        raise InputError(
            f"--exclude {path}: names none of the images; the first one is {first}, "
            f"the list's first is {rows[0][0] if rows else 'missing'}"
        )
    kept = {split: _without(part, dropped[split], path) for split, part in parts.items()}
    if unknown:
        note = f"{len(unknown):,} rows of {path.name} name no image (the first is {unknown[0]})"
        next(iter(kept.values())).notes.append(note)
    return kept


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./").strip("/")


def _place(name: str, places: Places, splits: list[str]) -> dict[str, list[int]]:
    """``{split: numbers}`` of the images that a path names: it, else its longest ending."""
    while name:
        found = {split: n for split, n in places.get(name, {}).items() if split in splits}
        if found:
            return found
        name = name.partition("/")[2]
    return {}


def _splits_of(names: set[str], parts: dict[str, Part], path: Path) -> dict[str, str]:
    """``{split as the list spells it: split that is packed}``; "" where it is not packed."""
    known = {name: name if name in parts else split_of(name)[0] for name in names}
    if strange := sorted(name for name, split in known.items() if not split):
        raise InputError(
            f"--exclude {path}: its column of splits holds {strange[0]!r}, which is none of train, "
            "val and test; correct it, or rename the column"
        )
    only = {"train": ""} if "" in parts else {}  # a set without splits counts as train
    only |= {"test": "val"} if "test" not in parts else {}
    return {name: only.get(split or "", split or "") for name, split in known.items()}


def _without(part: Part, dropped: set[int], path: Path) -> Part:
    if len(dropped) == len(part.images):
        raise InputError(f"--exclude {path}: names all images of a split; nothing would be left")
    kept = [n for n in range(len(part.images)) if n not in dropped]
    note = [f"left out: {len(dropped):,} images named in {path.name}"] if dropped else []
    return dataclasses.replace(
        part,
        images=[part.images[n] for n in kept],
        labels=[part.labels[n] for n in kept],
        notes=[*part.notes, *note],
    )
