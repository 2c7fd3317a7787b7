"""From names to splits and labels: which images make up train and val, and their class numbers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xcit_dino.data.config import MakeConfig
from xcit_dino.data.imagefile import Image
from xcit_dino.data.index import INDEX, MAX_LABEL, ShardIndex
from xcit_dino.data.labels import attach, labels_beside, read_label_map
from xcit_dino.data.sources import Listing
from xcit_dino.errors import InputError, suggest

SPLITS = {  # folder names of a split, the preferred one first
    "train": ("train", "training", "ILSVRC2012_img_train"),
    "val": ("val", "valid", "validation", "ILSVRC2012_img_val", "test", "testing"),
}
FOLDERS = {name for names in SPLITS.values() for name in names}
NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")  # tables with gaps are often saved as 3.0, 7.0


@dataclass(frozen=True)
class Part:
    """One split, ready to be packed."""

    images: list[Image]
    labels: list[int]
    """One an image; -1 in a set without labels."""
    classes: list[str] | None


def arrange(listing: Listing, config: MakeConfig, src: Path | None) -> dict[str, Part]:
    """``{split: part}``; the split "" stands for DST itself.

    Raises:
        InputError: nothing to pack, or labels that do not fit.
    """
    if not listing.images:
        raise InputError(_nothing(listing, config.src))
    splits = _splits(listing, config)
    file = config.labels or (labels_beside(src) if src else None)
    known = read_label_map(config.label_map) if config.label_map else None
    named = splits
    if not listing.is_list:
        named = {s: _with_labels(s, part, config, file) for s, part in splits.items()}
    flat = [s for s, part in named.items() if not any(image.label for image in part)]
    if flat and len(flat) < len(named):
        raise InputError(
            f"{config.src}: {flat[0]} has no class folders, but {(named.keys() - set(flat)).pop()} "
            "has; give its labels with --labels FILE"
        )
    if flat and known:
        raise InputError(f"--label_map: {config.src} has no labels")
    classes = None
    if not flat and not (known is None and _are_numbers(listing, splits, named, config)):
        classes = _classes(named, config, known)
    return {s: _numbered(s, part, known, classes, listing) for s, part in named.items()}


def _nothing(listing: Listing, src: str) -> str:
    found = ", ".join(f"{n:,} {what}" for what, n in listing.skipped.most_common(4))
    if listing.bad:
        found = f"{len(listing.bad)} unusable ({listing.bad[0]['reason']}) {found}"
    return f"{src} holds no images{f' (only {found})' if found else ''}"


def _top(name: str) -> str:
    return name.partition("/")[0]


def _unwrap(images: list[Image]) -> list[Image]:
    """Take off folders that merely wrap everything: ``photos/CLASS/x.jpg`` -> ``CLASS/x.jpg``."""
    while images:
        tops = {_top(image.name) for image in images}
        deeper = any(image.name.count("/") > 1 for image in images)
        if len(tops) > 1 or not deeper or tops <= FOLDERS:
            break
        if any("/" not in image.name for image in images):
            break
        images = [image._replace(name=image.name.partition("/")[2]) for image in images]
    return images


def _in_class_folders(images: Sequence[Image]) -> bool:
    return len({_top(image.name) for image in images if "/" in image.name}) > 1


def _are_numbers(
    listing: Listing,
    splits: dict[str, list[Image]],
    named: dict[str, list[Image]],
    config: MakeConfig,
) -> bool:
    """True where the labels of a list are numbers already; names of folders never are.

    Raises:
        InputError: some are and some are not.
    """
    if not listing.is_list and any(_in_class_folders(part) for part in splits.values()):
        return False
    labels = {image.label for part in named.values() for image in part if image.label}
    words = sorted(label for label in labels if not NUMBER.fullmatch(label))
    if words and len(words) < len(labels):
        raise InputError(
            f"{config.labels or config.src}: labels are numbers, but {words[0]!r} is none; correct "
            "it, or say which classes there are with --label_map"
        )
    return not words


def _splits(listing: Listing, config: MakeConfig) -> dict[str, list[Image]]:
    """Images by split, the split's folder taken off their names."""
    if listing.is_list:
        return {config.split or "": listing.images}
    images = _unwrap(listing.images)
    tops = {_top(image.name) for image in images if "/" in image.name}
    folders = {s: next((n for n in names if n in tops), None) for s, names in SPLITS.items()}
    folders = {folder: split for split, folder in folders.items() if folder}
    if config.split is not None and len(folders) > 1:
        raise InputError(f"--split {config.split}: {config.src} holds {' and '.join(folders)}")
    if not folders:
        return {config.split or "": images}
    parts: dict[str, list[Image]] = {config.split or split: [] for split in folders.values()}
    for image in images:
        folder, _, rest = image.name.partition("/")
        if folder in folders and rest:
            parts[config.split or folders[folder]].append(image._replace(name=rest))
        else:
            listing.skipped[f"files outside {' and '.join(sorted(folders))}"] += 1
    return {split: _unwrap(part) for split, part in parts.items()}


def _with_labels(
    split: str, images: list[Image], config: MakeConfig, file: Path | None
) -> list[Image]:
    """Class names from the folders, or from the label file of a flat set."""
    if _in_class_folders(images):
        return [i._replace(label=_top(i.name) if "/" in i.name else None) for i in images]
    if file is not None and split != "train":
        return attach(images, file)
    if config.labels is not None and not split:
        return attach(images, config.labels)
    return images


def _classes(
    parts: dict[str, list[Image]], config: MakeConfig, known: dict[str, int] | None
) -> list[str]:
    """Class names by number.

    The order is a label map's, else that of the sibling split packed before, else alphabetical,
    as torchvision's ImageFolder has it.
    """
    if known is not None:
        names = [""] * (max(known.values()) + 1)
        for name, number in known.items():
            names[number] = f"{names[number]}/{name}" if names[number] else name
        return names
    found = sorted({image.label for part in parts.values() for image in part if image.label})
    sibling = _sibling_classes(config.dst, set(parts))
    if sibling is None:
        return found
    if strange := [name for name in found if name not in sibling]:
        raise InputError(
            f"{config.src}: class {strange[0]!r} is not in the split packed before into "
            f"{config.dst}{suggest(strange[0], sibling)}; use another DST or --label_map"
        )
    return sibling


def _sibling_classes(dst: Path, packing: set[str]) -> list[str] | None:
    for split in SPLITS:
        if "" not in packing and split not in packing and (dst / split / INDEX).exists():
            return ShardIndex.load(dst / split).classes
    return None


def _numbered(
    split: str,
    images: Sequence[Image],
    known: dict[str, int] | None,
    classes: list[str] | None,
    listing: Listing,
) -> Part:
    """Class names -> numbers. What has no label in a labelled set is left out, and listed."""
    if not any(image.label for image in images):
        return Part(list(images), [-1] * len(images), None)
    numbers = known if known is not None else {n: i for i, n in enumerate(classes or [])}
    kept, labels, dropped = [], [], Counter()
    for image in images:
        name = image.label or ""
        if not name:
            listing.bad.append({"source": image.name, "reason": "no label"})
            continue
        number = numbers.get(name) if classes is not None else int(name.partition(".")[0])
        if number is None:
            dropped[name] += 1
        elif not 0 <= number <= MAX_LABEL:
            listing.bad.append({"source": image.name, "reason": f"label {name} out of range"})
        else:
            kept.append(image)
            labels.append(number)
    if dropped:
        listing.skipped["images of classes that --label_map leaves out"] += dropped.total()
    if not kept:
        raise InputError(
            f"no image of {split or 'the source'} is in a class of --label_map; "
            f"its classes are {json.dumps(sorted(dropped)[:5])[1:-1]} ..."
        )
    return Part(kept, labels, classes)
