"""Class names and numbers: their order, what a split lacks, and labels that do not fit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import INDEX, MAX_LABEL, ShardIndex, sparse_labels
from xcit_dino.data.shards.split_names import SPLITS
from xcit_dino.errors import InputError, suggest

DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
SEPARATOR = re.compile(r"[\s,;|/+&]+")
NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")  # tables with gaps are often saved as 3.0, 7.0


@dataclass(frozen=True)
class Part:
    """One split, ready to be packed."""

    images: list[Image]
    labels: list[int]
    """One an image; -1 in a set without labels."""
    classes: list[str] | None
    notes: list[str] = field(default_factory=list)
    """What was renamed or skipped in this split, a line each."""
    scenes: str | None = None
    """Digest of the scenes that its images are tiles of, and of the options."""


def check_names(named: dict[str, list[Image]], config: MakeConfig) -> None:
    """Refuse classes that differ in nothing but case: one is nearly always the other.

    Raises:
        InputError: names both.
    """
    seen: dict[str, str] = {}
    for label in sorted({i.label for part in named.values() for i in part if i.label}):
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            both = json.dumps({other: 0, label: 0}, ensure_ascii=False)
            raise InputError(
                f"{config.src}: classes {other!r} and {label!r} differ in case only; rename one, "
                f"or say with --label_map FILE.json which numbers all classes have, such as {both}"
            )


def are_numbers(named: dict[str, list[Image]], config: MakeConfig) -> bool:
    """True where the labels of a list are numbers already; names of folders never are.

    Raises:
        InputError: some are and some are not.
    """
    labels = {image.label for part in named.values() for image in part if image.label}
    words = sorted(label for label in labels if not NUMBER.fullmatch(label))
    if words and len(words) < len(labels):
        raise InputError(
            f"{config.labels or config.src}: labels are numbers, but {words[0]!r} is none; correct "
            "it, or say which classes there are with --label_map"
        )
    decimals = [label for label in words if DECIMAL.fullmatch(label)]
    if words and len(decimals) == len(words):
        raise InputError(
            f"{config.labels or config.src}: labels such as {words[0]} are quantities, not "
            "classes; choose another column with --label_column, or list them in a file, one a "
            "line, and give --label_map FILE: then each is a class"
        )
    return not words


def several_labels(named: dict[str, list[Image]]) -> list[str]:
    """Note labels that hold other labels, as several in one cell do: each such cell is a class."""
    labels = {image.label for part in named.values() for image in part if image.label}
    joined = {
        label: parts
        for label in sorted(labels)
        if (parts := [part for part in SEPARATOR.split(label) if part != label and part in labels])
    }
    if not joined:
        return []
    label, parts = next(iter(joined.items()))
    more = f" (and {len(joined) - 1:,} more like it)" if len(joined) > 1 else ""
    return [
        f"label {label!r}{more} is a class of its own, though {parts[0]!r} is one too: an image "
        "has one class"
    ]


def class_names(
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


def compare_classes(
    named: dict[str, list[Image]],
    notes: dict[str, list[str]],
    known: dict[str, int] | None,
    classes: list[str],
    given: str,
) -> None:
    """Note classes that a split or the source lacks, and numbers that mean other numbers."""
    present = {s: {i.label for i in part if i.label} for s, part in named.items()}
    everywhere = set[str | None]().union(*present.values())
    if known is not None and (unused := sorted(set(known) - everywhere)):
        for lines in notes.values():
            lines.append(f"{given}{_some(unused)} without images")
    elif known is None:
        for split, labels in present.items():
            for other, theirs in present.items():
                if lacking := sorted(name for name in labels - theirs if name):
                    notes[other].append(f"{_some(lacking)} of {split} without images in {other}")
        numbers = [int(name) if name.isdecimal() else -1 for name in classes]
        if min(numbers, default=-1) >= 0 and numbers != list(range(len(numbers))):
            moved = next(n for n, number in enumerate(numbers) if n != number)
            for lines in notes.values():
                lines.append(
                    "classes called by numbers are numbered in alphabetical order, as by "
                    f"ImageFolder: label {moved} is {classes[moved]!r}"
                )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"class{'es' * (len(names) > 1)} {', '.join(map(repr, names[:3]))}{more}"


def numbered(
    split: str,
    images: Sequence[Image],
    known: dict[str, int] | None,
    classes: list[str] | None,
    listing: Listing,
) -> Part:
    """Class names -> numbers. Images without a label in a labeled set are skipped, and listed."""
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
    notes = []
    if dropped:
        notes.append(
            f"skipped: {dropped.total():,} images of {_some(sorted(dropped))} that --label_map "
            "does not name"
        )
    if not kept:
        raise InputError(
            f"no image of {split or 'the source'} is in a class of --label_map; "
            f"its classes are {json.dumps(sorted(dropped)[:5])[1:-1]} ..."
            if dropped else f"no image of {split or 'the source'} has a label from 0 to {MAX_LABEL}"
        )  # fmt: skip
    if gaps := sparse_labels(np.array(labels)):
        raise InputError(
            f"{gaps}; list these numbers in a file, one per line, and give --label_map"
        )
    return Part(kept, labels, classes, notes)
