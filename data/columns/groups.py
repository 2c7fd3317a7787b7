"""A validation set from a source without one, at random by class or whole groups at a time: all
images of a patient, a site or a video on one side."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.labels import Place, by_name, is_table
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.lists import LIST_SUFFIXES
from xcit_dino.data.pack.splits import Found, top_folders
from xcit_dino.data.rng import random_permutation, text_key
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.errors import InputError


def divided(found: Found, listing: Listing, config: MakeConfig, src: Path | None) -> Found:
    """The splits of ``--val_fraction``; of a source with splits, a note on values of
    ``--group_column`` that several of them have.

    Raises:
        InputError: there are splits already, or no such column.
    """
    groups = groups_of(listing, config, src) if config.group_column else None
    if not config.val_fraction:
        return found if groups is None else _compared(found, groups, str(config.group_column))
    if len(found.parts) > 1 or not found.parts.keys() <= {"", "train"}:
        named = " and ".join(sorted(found.parts))
        raise InputError(
            f"--val_fraction: {config.src} has {named} already; leave it out, or pack one of them"
        )
    ((split, images),) = found.parts.items()
    chosen, note = (
        _by_group(images, groups, config) if groups is not None else _by_class(images, config)
    )
    parts = {
        name: [image for n, image in enumerate(images) if (n in chosen) == (name == "val")]
        for name in ("train", "val")
    }
    if not all(parts.values()):
        raise InputError(
            f"--val_fraction {config.val_fraction:g}: leaves {'val' if parts['train'] else 'train'}"
            f" without images, of {len(images):,}; give another fraction"
        )
    spelled = {"train": found.spelled[split]} if split in found.spelled else {}
    return Found(parts, spelled, [*found.notes, note])


def groups_of(listing: Listing, config: MakeConfig, src: Path | None) -> dict[Place, str]:
    """The group of each image, from a column of the list that is the source, or of its labels.

    Raises:
        InputError: no list, no such column, or images without a group.
    """
    column, table = config.group_column, config.multi_labels or config.values or config.labels
    if listing.is_list and src is not None and src.suffix.lower() in LIST_SUFFIXES:
        table = src
    if table is None or not table.is_file() or not is_table(table):
        raise InputError(
            f"--group_column {column}: needs a list with columns, as SRC, --labels, "
            "--multi_labels or --values"
        )
    try:
        groups = by_name(listing.images, table, column, [])
    except InputError as error:
        text = str(error).replace("--label_column", "--group_column")
        raise InputError(text.replace("two labels", "two groups")) from None
    missing = [image for image in listing.images if (image.path, image.offset) not in groups]
    if missing:
        raise InputError(
            f"--group_column {column}: {len(missing):,} images have no value in {table}, the first "
            f"is {missing[0].name}; complete the list, or leave them out with --exclude"
        )
    return groups


def _by_group(
    images: list[Image], groups: dict[Place, str], config: MakeConfig
) -> tuple[set[int], str]:
    """Numbers of the images for val: groups in random order, as long as they fit."""
    members: dict[str, list[int]] = defaultdict(list)
    for number, image in enumerate(images):
        members[groups[image.path, image.offset]].append(number)
    names = sorted(members)
    wanted, chosen, taken = round(config.val_fraction * len(images)), set[int](), 0
    for n in random_permutation(len(names), text_key("groups"), config.seed).tolist():
        if len(chosen) + len(members[names[n]]) <= wanted:
            chosen.update(members[names[n]])
            taken += 1
    note = (
        f"val: {taken:,} of {len(names):,} values of {config.group_column}, "
        f"{len(chosen):,} of {len(images):,} images"
    )
    return chosen, note


def _by_class(images: list[Image], config: MakeConfig) -> tuple[set[int], str]:
    """Numbers of the images for val: the same fraction of each class, so far as it is known."""
    members: dict[str, list[int]] = defaultdict(list)
    foldered = len(top_folders(images)) > 1
    for number, image in enumerate(images):
        members[image.label or (image.name.partition("/")[0] if foldered else "")].append(number)
    chosen = set[int]()
    for name, numbers in members.items():
        order = random_permutation(len(numbers), text_key("val"), config.seed, text_key(name))
        chosen.update(numbers[n] for n in order[: round(config.val_fraction * len(numbers))])
    note = f"val: {len(chosen):,} of {len(images):,} images, at random by class"
    return chosen, note if len(members) > 1 else note.removesuffix(" by class")


def _compared(found: Found, groups: dict[Place, str], column: str) -> Found:
    """A note of groups that several splits have."""
    if len(found.parts) < 2:
        raise InputError(
            f"--group_column {column}: there is nothing to divide; add --val_fraction 0.2"
        )
    inside: dict[str, set[str]] = defaultdict(set)
    for split, images in found.parts.items():
        for image in images:
            inside[groups[image.path, image.offset]].add(split)
    both = sorted(name for name, splits in inside.items() if len(splits) > 1)
    note = f"no value of {column} is in two splits"
    if both:
        note = (
            f"WARNING: {len(both):,} of {len(inside):,} values of {column} have images in "
            f"{' and '.join(sorted(inside[both[0]]))}, the first is {both[0]}: a validation would "
            "flatter; without its column of splits --val_fraction 0.2 divides the list again"
        )
    return Found(found.parts, found.spelled, [*found.notes, note])
