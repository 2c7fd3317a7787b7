"""Images and labels in the columns of Parquet and Arrow files: as a source of ``shards make``.

A column cannot be read at random: a table's images are first copied, as they are, one behind the
other into a file in the folder of the shards to be. It goes when the shards are complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from xcit_dino.data.columns.arrow import SUFFIXES, Columns, find_columns, open_schema, rows
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.lists import list_images, split_names
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.split_names import split_of
from xcit_dino.errors import InputError
from xcit_dino.files import atomic_path
from xcit_dino.progress import progress

NUMBERED = re.compile(r"([-_.]?\d+[-_]of[-_]\d+)?([-_.][0-9a-f]{16})?$")


def find_tables(src: Path) -> list[Path]:
    """Parquet and Arrow files at or below a path; not the caches beside them."""
    if src.is_file():
        return [src] if src.suffix.lower() in SUFFIXES else []
    found = (path.relative_to(src) for path in src.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [
        src / path
        for path in sorted(found)
        if not any(part.startswith(".") for part in path.parts)
        and not path.name.startswith("cache-")
        and (src / path).is_file()
    ]


def list_columns(tables: list[Path], src: Path, work: Path, config: MakeConfig) -> Listing:
    """The images of some tables, which are one set; splits by the names of folders and files.

    Raises:
        InputError: they cannot be read, or it is not clear which columns are meant.
    """
    columns = _same_columns(tables, config)
    if columns.image is None:
        if len(tables) > 1:
            raise InputError(f"{src}: its tables name files; pack one of them: {tables[0]}")
        return list_images(tables[0], config.label_column)
    work.mkdir(parents=True, exist_ok=True)
    root = src if src.is_dir() else src.parent
    tasks = [_task(path, root, work, columns) for path in tables]
    listing = Listing(is_list=True)
    with progress(f"Read {src.name}", len(tasks), "files") as bar:
        for task, _ in zip(
            tasks, map_processes(_copy, tasks, config.num_workers, bar), strict=True
        ):
            _take(task, listing)
    splits = {path: _split(path, root) for path in tables}
    _assign(listing, splits, root)
    if columns.classes:
        listing.numbers = {name: number for number, name in enumerate(columns.classes)}
    listing.notes.append(_note(columns))
    return listing


def _same_columns(tables: list[Path], config: MakeConfig) -> Columns:
    found = {
        path: find_columns(path, open_schema(path), config.image_key, config.label_column)
        for path in tables
    }
    first = found[tables[0]]
    for path, columns in found.items():
        if columns[:3] != first[:3]:
            raise InputError(
                f"{path} has other columns than {tables[0]} ({_short(columns)}; {_short(first)}); "
                "pack one folder of them at a time"
            )
    return first


def _short(columns: Columns) -> str:
    classes = f" of {len(columns.classes)} classes" if columns.classes else ""
    return f"images: {columns.image}, labels: {columns.label}{classes}"


def _note(columns: Columns) -> str:
    others = ", ".join(columns.others[:4]) + (", ..." if len(columns.others) > 4 else "")
    left = f"; not read: {others}" if others else ""
    label = f"labels: column {columns.label}" if columns.label else "no labels"
    hint = " (another with --label_column)" if columns.label and others else ""
    hint = " (--label_column takes one)" if others and not columns.label else hint
    return f"images: column {columns.image}; {label}{left}{hint}"


# ---------------------------------------------------------------------------- copying one table


class _Task(NamedTuple):
    table: Path
    name: str
    """Of the table, below the source."""
    images: Path
    listed: Path
    columns: Columns


def _task(path: Path, root: Path, work: Path, columns: Columns) -> _Task:
    status = path.stat()
    how = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {columns[:3]}"
    stem = f"source-{hashlib.sha256(how.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    name = path.relative_to(root).as_posix()
    return _Task(path, name, work / f"{stem}.images", work / f"{stem}.jsonl", columns)


def _copy(task: _Task, advance: Advance) -> None:
    """Images into one file, their names, places and labels into another, which comes last."""
    if not task.listed.exists():
        assert task.columns.image is not None
        names = [name for name in (task.columns.image, task.columns.label) if name]
        at = 0
        with (
            atomic_path(task.listed) as listed, listed.open("w", encoding="ascii") as lines,
            atomic_path(task.images) as images, images.open("wb") as data,
        ):  # fmt: skip
            for number, (cell, *label) in enumerate(rows(task.table, names)):
                raw, path = _image(cell)
                name = f"{task.name}/{number:08d}" + (
                    f"/{PurePosixPath(path).name}" if path else ""
                )
                record: dict[str, Any] = {"name": name, "label": _word(label, task)}
                if raw is not None:
                    data.write(raw)
                    record |= {"offset": at, "size": len(raw)}
                    at += len(raw)
                elif path:
                    record["file"] = str(task.table.parent / path)
                lines.write(json.dumps(record) + "\n")
    advance(1)


def _image(cell: Any) -> tuple[bytes | None, str]:
    """(encoded image, its path) of a cell: bytes, a dict of both, or neither."""
    if isinstance(cell, dict):
        return cell.get("bytes"), str(cell.get("path") or "")
    return (cell, "") if isinstance(cell, bytes) else (None, cell if isinstance(cell, str) else "")


def _word(label: Sequence[Any], task: _Task) -> str | None:
    """A label as text; the name of its class where there is one."""
    value, classes = (label[0] if label else None), task.columns.classes
    if value is None or (classes and value == -1):  # datasets' mark for none
        return None
    if classes and isinstance(value, int):
        if not 0 <= value < len(classes):
            raise InputError(f"{task.table}: label {value}, but there are {len(classes)} classes")
        return classes[value]
    if isinstance(value, list | dict):
        raise InputError(
            f"--label_column {task.columns.label}: that column of {task.table} holds "
            f"{type(value).__name__}s; an image has one class"
        )
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _take(task: _Task, listing: Listing) -> None:
    with task.listed.open(encoding="ascii") as lines:
        for line in lines:
            row = json.loads(line)
            if "offset" in row:
                image = Image(row["name"], str(task.images), row["offset"], row["size"])
            else:
                file = Path(row.get("file", ""))
                if "file" not in row or not file.is_file():
                    why = f"its file {file} is not there" if "file" in row else "no image in it"
                    listing.bad.append({"source": row["name"], "reason": why})
                    continue
                image = Image(row["name"], str(file), size=file.stat().st_size)
            listing.images.append(image._replace(label=row["label"]))


# ---------------------------------------------------------------------------- splits


def _split(path: Path, root: Path) -> str:
    """As the source spells it: a folder above the table, its name, or what ``state.json`` says."""
    for folder in path.relative_to(root).parts[:-1]:
        known, rest = split_of(folder)
        if known and not rest:
            return folder
    stem = NUMBERED.sub("", path.stem)
    if split_of(stem)[0]:
        return stem
    try:
        named = json.loads((path.parent / "state.json").read_bytes())["_split"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return named if isinstance(named, str) and split_of(named)[0] else ""


def _assign(listing: Listing, splits: dict[Path, str], root: Path) -> None:
    """Give each image the split of its table."""
    names = sorted(set(splits.values()) - {""})
    if not names:
        return
    chosen = split_names(names)
    by_table = {path.relative_to(root).as_posix(): split for path, split in splits.items()}
    for number, image in enumerate(listing.images):
        table = next(t for t in _tables_of(image.name) if t in by_table)
        split = by_table[table]
        listing.images[number] = image._replace(split=chosen[split] if split else None)
    renamed = ", ".join(f"{name} -> {split}" for name, split in chosen.items() if name != split)
    if renamed:
        listing.notes.append(f"splits by the names of the files: {renamed}")


def _tables_of(name: str) -> list[str]:
    """The names that a table of this image can have: a part of its name, from the front."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]
