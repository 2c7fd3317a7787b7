"""Labels that come beside the images: lists, the ILSVRC2012 devkit, torchvision data sets, maps."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcit_dino.data.index import MAX_LABEL
from xcit_dino.data.matfile import read_mat
from xcit_dino.data.sources import Image, Listing, list_archive, list_folder
from xcit_dino.errors import InputError, suggest

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
FOUND_BESIDE = (DEVKIT, DEVKIT.removesuffix(".tar.gz"), "LOC_val_solution.csv")
MAX_FILE = 1 << 30


# ---------------------------------------------------------------------------- lists of path,label


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
    """(name, label or None) of the rows of a list; a header row is left out.

    Raises:
        InputError: the file cannot be read, or a row holds no name; the line is named.
    """
    text = _text(path)
    if path.suffix == ".jsonl":
        return [
            _json_row(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line
        ]
    first = text.partition("\n")[0]
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ","))
    except csv.Error as error:
        raise InputError(f"{path} is no CSV: {error}") from None
    rows = [row for row in rows if row]
    if rows and rows[0][0].strip().lower() in ("path", "name", "file", "filename", "imageid"):
        rows = rows[1:]
    return [(row[0].strip(), (row[1].strip() or None) if len(row) > 1 else None) for row in rows]


def _json_row(line: str, place: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
        label = row.get("label")
        return str(row["path"]), None if label is None else str(label)
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise InputError(f'{place}: expected {{"path": ..., "label": ...}}') from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} is larger than 1 GiB: no list of labels")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


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
    if path.suffix in LIST_SUFFIXES or len(read_pairs(path)[0]) == 2 and read_pairs(path)[0][1]:
        return _by_name(images, path)
    return _in_order(images, _text(path).split(), path)


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
    text = _text(path)
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


# ---------------------------------------------------------------------------- torchvision


def torchvision_names() -> list[str]:
    return sorted(_TORCHVISION)


def list_torchvision(name: str, root: Path, download: bool, work: Path) -> Listing:
    """Images of a torchvision data set as ``train/CLASS/...`` and ``val/CLASS/...``.

    torchvision downloads, verifies and unpacks; the images are then taken as they are, and only
    CIFAR's arrays, which are no image files, are stored as PNG.

    Raises:
        InputError: not in ``root`` and not downloaded.
    """
    if name not in _TORCHVISION:
        raise InputError(f"no data set {name!r}{suggest(name, _TORCHVISION)}")
    try:
        return _TORCHVISION[name](root, download, work)
    except RuntimeError as error:
        hint = "" if download else "; add --download, or give its folder with --root"
        raise InputError(f"{name} in {root}: {' '.join(str(error).split())}{hint}") from None
    except OSError as error:
        raise InputError(f"{name}: download to {root} failed: {error}") from None


def _cifar(class_name: str) -> Callable[..., Listing]:
    def listing(root: Path, download: bool, work: Path) -> Listing:
        import torchvision

        work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(work / f"{class_name}.tar", "w") as tar:
            for split in ("train", "val"):
                data = getattr(torchvision.datasets, class_name)(
                    root, train=split == "train", download=download
                )
                _add_arrays(tar, split, data)
        return list_archive(work / f"{class_name}.tar", work)

    return listing


def _add_arrays(tar: tarfile.TarFile, split: str, data: Any) -> None:
    """Store the arrays of a torchvision CIFAR as ``SPLIT/CLASS/NUMBER.png``."""
    import PIL.Image

    for number, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        png = io.BytesIO()
        PIL.Image.fromarray(pixels).save(png, "PNG")
        member = tarfile.TarInfo(f"{split}/{data.classes[label]}/{number:05d}.png")
        member.size = png.tell()
        png.seek(0)
        tar.addfile(member, png)


def _imagenette(root: Path, download: bool, work: Path) -> Listing:
    import torchvision

    for split in ("train", "val"):
        torchvision.datasets.Imagenette(root, split, download=download and split == "train")
    return list_folder(root / "imagenette2")


def _flowers102(root: Path, download: bool, work: Path) -> Listing:
    """Train: the official train and val parts (2,040), on which papers train; val: test (6,149)."""
    import torchvision

    try:
        torchvision.datasets.Flowers102(str(root), download=download)
    except ModuleNotFoundError:  # SciPy, which is only needed after the download: see matfile.py
        pass
    folder = root / "flowers-102"
    tables = {n: read_mat((folder / n).read_bytes(), n) for n in ("setid.mat", "imagelabels.mat")}
    labels, sets = np.ravel(tables["imagelabels.mat"]["labels"]), tables["setid.mat"]
    split = {int(n): "train" for key in ("trnid", "valid") for n in np.ravel(sets[key])}
    split |= {int(n): "val" for n in np.ravel(sets["tstid"])}
    listing = Listing()
    for number in sorted(split):
        label = f"{int(labels[number - 1]) - 1:03d}"
        file = folder / "jpg" / f"image_{number:05d}.jpg"
        name = f"{split[number]}/{label}/{file.name}"
        listing.images.append(Image(name, str(file), size=file.stat().st_size))
    return listing


_TORCHVISION: dict[str, Callable[[Path, bool, Path], Listing]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagenette": _imagenette,
    "flowers102": _flowers102,
}
