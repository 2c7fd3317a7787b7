"""Labels that come beside the images: lists, the ILSVRC2012 devkit, label maps."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from xcit_dino.data.imagefile import Image
from xcit_dino.data.index import MAX_LABEL
from xcit_dino.data.lists import LIST_SUFFIXES, read_pairs, read_text
from xcit_dino.data.matfile import read_mat
from xcit_dino.errors import InputError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
FOUND_BESIDE = (DEVKIT, DEVKIT.removesuffix(".tar.gz"), "LOC_val_solution.csv")


# ---------------------------------------------------------------------------- labels of flat images


def labels_beside(src: Path) -> Path | None:
    """The label file of a flat validation set that lies in the source folder, or beside the tar."""
    folder = src if src.is_dir() else src.parent
    return next((folder / name for name in FOUND_BESIDE if (folder / name).exists()), None)


def attach(images: Sequence[Image], path: Path) -> list[Image]:
    """Give flat images the labels of a file: see ``--labels``.

    Raises:
        InputError: the file is unreadable, or its labels do not fit the images.
    """
    if path.name == TRUTH:
        path = path.parent
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _in_order(images, _devkit_labels(path), path)
    if path.suffix in LIST_SUFFIXES or any(label for _, label in read_pairs(path)[:1]):
        return _by_name(images, path)
    return _in_order(images, read_text(path).split(), path)


def _in_order(images: Sequence[Image], labels: Sequence[str], path: Path) -> list[Image]:
    if len(labels) != len(images):
        raise InputError(f"{path} has {len(labels)} labels, but there are {len(images)} images")
    ordered = sorted(images, key=lambda image: image.name)
    return [image._replace(label=label) for image, label in zip(ordered, labels, strict=True)]


def _by_name(images: Sequence[Image], path: Path) -> list[Image]:
    # Kaggle's LOC_val_solution.csv: "ILSVRC2012_val_00000001,n01751748 111 108 441 193"
    table = {name: label.split()[0] for name, label in read_pairs(path) if label}
    found = []
    for image in images:
        file = PurePosixPath(image.name)
        label = next((table[k] for k in (image.name, file.name, file.stem) if k in table), None)
        found.append(image._replace(label=label))
    if not any(image.label for image in found):
        raise InputError(
            f"{path} names none of the images; the first one is {images[0].name}, "
            f"the list's first is {next(iter(table), 'empty')}"
        )
    return found


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
        names = [line.strip() for line in text.splitlines() if line.strip()]
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
    return numbers
