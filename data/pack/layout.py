"""From names to splits and labels: which images make up train and val, and their class numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

from xcit_dino.data.columns.groups import divided
from xcit_dino.data.columns.metadata import metadata_labels
from xcit_dino.data.columns.unread import first_unread
from xcit_dino.data.pack.classes import (
    Part,
    are_numbers,
    check_names,
    class_names,
    compare_classes,
    numbered,
    several_labels,
)
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.labels import (
    by_name,
    composed,
    in_order,
    is_table,
    labels_beside,
    read_label_map,
)
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.lists import UNLABELED, exclude
from xcit_dino.data.pack.splits import NONE, Found, split_images, top_folders, unwrap
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.errors import InputError

FOLDER_LABELS, NO_LABELS = "folders", "none"  # values of --labels other than a file
MASKS = set("mask masks annotation annotations groundtruth ground_truth gt segmentation".split())


def arrange(listing: Listing, config: MakeConfig, src: Path | None) -> dict[str, Part]:
    """``{split: part}``; the split "" stands for DST itself.

    Raises:
        InputError: nothing to pack, labels that do not fit, options without effect, or a layout
            that can be read in two ways.
    """
    if not listing.images:
        raise InputError(_nothing(listing, config.src))
    found = _renamed(split_images(listing, config), config.split)
    if config.val_fraction or config.group_column:
        found = divided(found, listing, config, src)
    notes: dict[str, list[str]] = {
        split: [f"split: {found.spelled[split]}/ -> {split}"]
        if found.spelled.get(split, split) != split else []
        for split in found.parts
    }  # fmt: skip
    listing.notes += found.notes
    named, by_words = _named(listing, config, src, found)
    known = read_label_map(config.label_map) if config.label_map else listing.numbers
    if known is None:
        check_names(named, config)
    if not by_words and config.label_map is None:
        listing.notes += several_labels(named)
    flat = [s for s, part in named.items() if not any(image.label for image in part)]
    if flat and len(flat) < len(named):
        labeled = next(split for split in named if split not in flat)
        folder = shlex.quote(f"{labeled}={found.spelled.get(labeled, labeled)}")
        raise InputError(
            f"{config.src}: {flat[0]} has no labels, but {labeled} has; give them with --labels "
            f"FILE, or leave {flat[0]} out with --splits {folder}"
        )
    if flat and config.label_map:
        raise InputError(f"--label_map: {config.src} has no labels")
    classes = None
    if not flat and not (known is None and not by_words and are_numbers(named, config)):
        classes = class_names(named, config, known)
        compare_classes(named, notes, known, classes, "--label_map: " * bool(config.label_map))
    parts = {s: numbered(s, part, known, classes, listing) for s, part in named.items()}
    if flat:
        _hint_at_labels(named, notes, listing, config)
    parts = {split: _noted(part, notes[split]) for split, part in parts.items()}
    return exclude(parts, config.exclude) if config.exclude else parts


def _noted(part: Part, notes: list[str]) -> Part:
    return Part(part.images, part.labels, part.classes, notes + part.notes)


def _renamed(found: Found, split: str | None) -> Found:
    """Name the one split of a source as ``--split`` does."""
    if split is None:
        return found
    old = next(iter(found.parts))
    spelled = {split: found.spelled[old]} if old in found.spelled else {}
    return Found({split: found.parts[old]}, spelled, found.notes)


def _hint_at_labels(
    named: dict[str, list[Image]], notes: dict[str, list[str]], listing: Listing, config: MakeConfig
) -> None:
    """Note what could have been the labels of a set without any."""
    if config.labels is not None:
        return
    for split, part in named.items():
        tops = top_folders(part)
        if len(tops) == 1 and all("/" in image.name for image in part):
            notes[split].append(
                f"no labels: all images lie in one folder, {tops.pop()}/ (--labels folders: it is "
                "their class)"
            )
    for table in listing.tables[:1]:
        listing.notes.append(f"no labels: {table} was not read (--labels FILE reads a list)")


def _nothing(listing: Listing, src: str) -> str:
    found = ", ".join(f"{n:,} {what}" for what, n in listing.skipped.most_common(4))
    if listing.bad:
        found = f"{len(listing.bad)} unusable ({listing.bad[0]['reason']}) {found}"
    remedy = ""
    if Path(src).is_dir():
        kinds = [kind.removesuffix(" files") for kind in listing.skipped]
        remedy = first_unread(Path(src), [kind for kind in kinds if kind.startswith(".")])
    return f"{src} holds no images{f' (only {found})' if found else ''}{remedy}"


# ---------------------------------------------------------------------------- labels


def _named(
    listing: Listing, config: MakeConfig, src: Path | None, found: Found
) -> tuple[dict[str, list[Image]], bool]:
    """Images by split with the names of their classes; True where these are names of folders."""
    parts = found.parts
    if listing.is_list:
        if config.labels is not None and str(config.labels) != NO_LABELS:
            raise InputError(f"--labels: {config.src} is a list, which holds the labels itself")
        if config.labels is not None:
            return {s: [i._replace(label=None) for i in p] for s, p in parts.items()}, False
        parts = {s: [_labeled(i, i.label) for i in part] for s, part in parts.items()}
        return parts, False
    how = str(config.labels) if config.labels else ""
    beside = metadata_labels(listing, src, config.label_column) if how == "" else None
    if beside is not None:
        named = {
            s: [_labeled(i, beside.get((i.path, i.offset))) for i in part]
            for s, part in parts.items()
        }
        return named, False
    if config.label_column and (how in ("", FOLDER_LABELS, NO_LABELS)):
        raise InputError("--label_column: there is no list of labels; give one with --labels")
    if how == NO_LABELS:
        return parts, False
    tops = {split: top_folders(part) for split, part in parts.items()}
    classes = set[str]().union(*(names for names in tops.values() if len(names) > 1))
    in_folders = {
        split: len(names) > 1 or bool(names & classes) or (how == FOLDER_LABELS and bool(names))
        for split, names in tops.items()
    }
    if how == FOLDER_LABELS and not any(in_folders.values()):
        raise InputError(f"--labels folders: {config.src} has no folders")
    named = {s: _by_folder(part) if in_folders[s] else part for s, part in parts.items()}
    if how in ("", FOLDER_LABELS):
        if any(in_folders.values()):
            _check_masks(classes, found, config)
        return _devkit(named, in_folders, src), any(in_folders.values())
    flat = [split for split in parts if not in_folders[split]]
    if not flat:
        listing.notes.append(f"labels are those of {config.labels}, not the folders' names")
    return _from_file(listing, config, named, flat or list(parts)), len(flat) not in (0, len(parts))


def _labeled(image: Image, label: str | None) -> Image:
    label = composed(label.strip()) if label else None
    return image._replace(label=None if (label or "").lower() in UNLABELED else label)


def _by_folder(images: list[Image]) -> list[Image]:
    return [i._replace(label=composed(i.name.partition("/")[0]) if "/" in i.name else None)
            for i in images]  # fmt: skip


def _devkit(
    named: dict[str, list[Image]], in_folders: dict[str, bool], src: Path | None
) -> dict[str, list[Image]]:
    """ImageNet's labels of a flat validation set, where they lie beside it."""
    for split, part in named.items():
        if not in_folders[split] and split != "train" and src and (file := labels_beside(src)):
            if is_table(file):
                labels = by_name(part, file, None, [])
                named[split] = [i._replace(label=labels.get((i.path, i.offset))) for i in part]
            else:
                named[split] = in_order(part, file)
    return named


def _from_file(
    listing: Listing, config: MakeConfig, named: dict[str, list[Image]], splits: list[str]
) -> dict[str, list[Image]]:
    """Labels of ``--labels FILE`` for the images of some splits."""
    assert config.labels is not None
    if is_table(config.labels):
        images = unwrap(listing.images, splits=config.splits != NONE)
        chosen = {(i.path, i.offset) for split in splits for i in named[split]}
        images = [image for image in images if (image.path, image.offset) in chosen]
        labels = by_name(images, config.labels, config.label_column, listing.notes)
        return named | {
            s: [_labeled(i, labels.get((i.path, i.offset))) for i in named[s]] for s in splits
        }
    if config.label_column:
        raise InputError(f"--label_column: {config.labels} has no columns")
    if len(splits) > 1 and "val" in splits and "train" in splits:
        raise InputError(
            f"--labels {config.labels}: it holds labels in the order of the images, and there are "
            f"{' and '.join(splits)}; pack one at a time, such as --splits train=FOLDER"
        )
    return named | {s: in_order(named[s], config.labels) for s in splits}


def _check_masks(classes: set[str], found: Found, config: MakeConfig) -> None:
    """Refuse folders of masks as a class of their own."""
    masks = sorted(name for name in classes if name.lower() in MASKS)
    if masks and len(classes) <= 3 and config.labels is None:
        images = (sorted(classes - set(masks)) or ["images"])[0]
        pairs = [
            f"{split}={folder.replace('*', images, 1) if '*' in folder else f'{folder}/{images}'}"
            for split, folder in found.spelled.items()
        ] or [f"train={images}"]
        raise InputError(
            f"{config.src}: {masks[0]}/ beside {images}/ looks like masks of the images; name the "
            f"images alone with --splits {' '.join(map(shlex.quote, pairs))}, or say with --labels "
            "folders that both are classes"
        )
