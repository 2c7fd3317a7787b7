"""Labels that come beside the images: lists, the ILSVRC2012 devkit, label maps."""

from __future__ import annotations

import contextlib
import json
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.lists import LIST_SUFFIXES, read_list
from xcit_dino.data.pack.mat_file import read_mat
from xcit_dino.data.pack.tables import Table, read_text
from xcit_dino.data.shards.index import MAX_LABEL, sparse_labels
from xcit_dino.errors import InputError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
FOUND_BESIDE = (DEVKIT, DEVKIT.removesuffix(".tar.gz"), "LOC_val_solution.csv")
Place = tuple[str, int]
"""File and offset of an image: what identifies it while its name is cut."""


# ---------------------------------------------------------------------------- labels of flat images


def labels_beside(src: Path) -> Path | None:
    """The label file of a flat validation set that lies in the source folder, or beside the tar."""
    folder = src if src.is_dir() else src.parent
    return next((folder / name for name in FOUND_BESIDE if (folder / name).exists()), None)


def is_table(path: Path) -> bool:
    """A list of name,label, and not labels in the order of the images."""
    if path.name == TRUTH or path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return False
    return path.suffix.lower() in LIST_SUFFIXES or any(
        label for _, label, _ in read_list(path).rows[:1]
    )


def in_order(images: Sequence[Image], path: Path) -> list[Image]:
    """Give images the labels of a file that has one for each, in the order of their names.

    Raises:
        InputError: the file is unreadable, or its labels do not fit the images.
    """
    if path.name == TRUTH:
        path = path.parent
    is_devkit = path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar"))
    labels = _devkit_labels(path) if is_devkit else _lines(path)
    if len(labels) != len(images):
        raise InputError(f"{path} has {len(labels)} labels, but there are {len(images)} images")
    ordered = sorted(images, key=lambda image: image.name)
    return [image._replace(label=label) for image, label in zip(ordered, labels, strict=True)]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def by_name(
    images: Sequence[Image], path: Path, label_column: str | None, notes: list[str]
) -> dict[Place, str]:
    """Labels of the images that a list names.

    A row names an image if one of the two paths ends with the other, with or without the image's
    extension; slashes and forms of Unicode do not matter.

    Raises:
        InputError: the list names none of them, or one twice with different labels, or a name
            stands for several images.
    """
    return by_rows(images, path, read_list(path, label_column), notes)


def by_rows(
    images: Sequence[Image], path: Path, table: Table, notes: list[str]
) -> dict[Place, str]:
    """:func:`by_name` for a list that has been read."""
    notes += table.notes
    endings: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        for ending in _endings(image.name):
            endings[ending].append(image)
    whole = {form: image for image in images for form in _forms(image.name)}
    found: dict[Place, str] = {}
    unknown: list[str] = []
    for name, label, _ in table.rows:
        key = one_form(name)
        hits = [whole[key]] if key in whole else endings.get(key, [])
        if not hits:
            hits = [whole[ending] for ending in _tails(key) if ending in whole][:1]
        if not hits:
            unknown.append(name)
        elif len(hits) > 1:
            raise InputError(
                f"{path}: {name} could be {hits[0].name} or {hits[1].name}; write their paths, or "
                "pack one split at a time, such as --splits train=FOLDER"
            )
        elif label:
            place = (hits[0].path, hits[0].offset)
            if found.setdefault(place, label) != label:
                raise InputError(
                    f"{path}: {name} has two labels, {found[place]} and {label}; an image has one "
                    "class: keep one row for each image"
                )
    if not found:
        first = table.rows[0][0] if table.rows else "empty"
        raise InputError(
            f"{path} names none of the images; the first one is {images[0].name}, "
            f"the list's first is {first}"
            if unknown or not table.rows
            else f"{path} has no labels; its rows are names only"
        )
    if unknown:
        notes.append(
            f"skipped: {len(unknown):,} rows of {path.name} that name no image "
            f"(the first is {unknown[0]})"
        )
    return found


def one_form(name: str) -> str:
    """A name as it is compared with others: one form of Unicode, slashes, no ./ before it."""
    if not name.isascii():
        with contextlib.suppress(UnicodeEncodeError):
            name.encode()  # fails for a name on the disk that is not UTF-8: nearly always Latin-1
            return _plain(name)
        name = name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return _plain(name)


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return name.removeprefix("./").strip("/")


def _forms(name: str) -> set[str]:
    """A path with and without its extension."""
    name = one_form(name)
    stem = name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix) else name
    return {name, stem}


def _tails(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[n:]) for n in range(1, len(parts))]


def _endings(name: str) -> set[str]:
    return {tail for form in _forms(name) for tail in [form, *_tails(form)]}


def _devkit_labels(path: Path) -> list[str]:
    """WordNet ids of the validation images in order: the ground truth holds ILSVRC's own numbers,
    which ``meta.mat`` translates (they are not in alphabetical order, as training labels are)."""
    files = _devkit_files(path)
    if missing := {TRUTH, META} - files.keys():
        raise InputError(
            f"{path} lacks {' and '.join(sorted(missing))}; give the whole devkit, {DEVKIT}"
        )
    synsets = read_mat(files[META], f"{META} of {path}").get("synsets")
    try:
        wnid = {int(np.ravel(s["ILSVRC2012_ID"])[0]): str(s["WNID"]) for s in synsets or []}
        return [wnid[int(number)] for number in files[TRUTH].split()]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path} is no ILSVRC2012 devkit: {error!r}") from None


def _devkit_files(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {
            file.name: file.read_bytes() for file in path.rglob("*") if file.name in (TRUTH, META)
        }
    try:
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.isfile() and PurePosixPath(m.name).name in (TRUTH, META)]
            return {
                PurePosixPath(m.name).name: tar.extractfile(m).read(1 << 26)  # type: ignore[union-attr]
                for m in members
            }
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


# ---------------------------------------------------------------------------- label maps


def read_label_map(path: Path) -> dict[str, int]:
    """``{class name: label}`` of ``--label_map``.

    Raises:
        InputError: neither a list of names nor a JSON object of numbers.
    """
    text = read_text(path)
    if path.suffix != ".json":
        names = [composed(line.strip()) for line in text.splitlines() if line.strip()]
        if len(set(names)) < len(names):
            raise InputError(f"{path} names a class twice")
        return {name: number for number, name in enumerate(names)}
    try:
        numbers = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    good = isinstance(numbers, dict) and all(
        type(n) is int and 0 <= n <= MAX_LABEL for n in numbers.values()
    )
    if not good or not numbers:
        raise InputError(f'{path} must be {{"class name": number from 0 on, ...}}')
    if gaps := sparse_labels(np.array(list(numbers.values()))):
        raise InputError(f"{path}: {gaps}; number the classes from 0 on")
    return {composed(name): number for name, number in numbers.items()}


def composed(name: str) -> str:
    """A class name in composed Unicode (NFC), so that macOS's spelling of a name is Linux's."""
    return unicodedata.normalize("NFC", name)
