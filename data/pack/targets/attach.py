"""``--masks``, ``--boxes``, ``--multi_labels`` of ``shards make``: give each image its target."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from xcit_dino.data.pack.archives import list_archive
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import ARCHIVE, Listing
from xcit_dino.data.pack.sources import list_folder
from xcit_dino.data.pack.targets.boxes import pair_boxes, read_annotations
from xcit_dino.data.pack.targets.conventions import CONVENTIONS, MaskCoding, mask_coding
from xcit_dino.data.pack.targets.masks import pair_masks, values_in
from xcit_dino.data.pack.targets.several import attach_labels, attach_values
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.errors import InputError


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the samples of a source have beside their images."""

    kind: str
    """``mask``, ``boxes``, ``labels`` or ``values``."""
    classes: list[str]
    coding: MaskCoding | None = None


def attach_targets(
    listing: Listing, config: MakeConfig, src: Path | None, work: Path
) -> Targets | None:
    """Give the images of a source their targets; images without one are left out, with a note.

    Raises:
        InputError: files that cannot be read or that belong to no image.
    """
    _check_one(config)
    if config.boxes:
        found = read_annotations(config.boxes)
        if not listing.images:
            return None  # said later, with the reason
        listing.images, notes = pair_boxes(listing.images, found)
        listing.notes += notes
        return Targets("boxes", found.classes)
    for kind, path, attach in (
        ("labels", config.multi_labels, attach_labels),
        ("values", config.values, attach_values),
    ):
        if path:
            if not listing.images:
                return None
            listing.images, names = attach(
                listing.images, path, config.label_column, listing.notes, config.group_column
            )
            return Targets(kind, names)
    if not config.masks:
        return None
    masks = _masks(listing, config, src, work)
    if config.mask_classes is None:
        raise InputError(
            f"--mask_classes is missing: what do the values {values_in(masks)} of --masks mean? "
            f"Give a file with one class name per line, the first for value 0, or one of "
            f"{', '.join(CONVENTIONS)}"
        )
    coding = mask_coding(config.mask_classes, config.mask_ignore)
    if not listing.images:
        raise InputError(f"--masks: {config.src} holds no images beside them")
    listing.images, notes = pair_masks(listing.images, masks, coding)
    listing.notes += notes
    return Targets("mask", list(coding.classes), coding)


def _check_one(config: MakeConfig) -> None:
    """Refuse two kinds of targets, or lists beside a label."""
    kinds = [n for n in ("masks", "boxes", "multi_labels", "values") if getattr(config, n)]
    if len(kinds) > 1:
        raise InputError(f"--{kinds[0]} and --{kinds[1]}: an image has one target; pack two sets")
    if config.labels is not None and {"multi_labels", "values"} & set(kinds):
        raise InputError(f"--labels: an image has these or --{kinds[0]}; leave one of them out")


def _masks(listing: Listing, config: MakeConfig, src: Path | None, work: Path) -> list[Image]:
    """All files of ``--masks``; those that are part of the source are taken out of its images."""
    found = []
    for name in config.masks:
        inside = _inside(name, src)
        if inside is not None:
            mine = [image for image in listing.images if _below(image.name, inside)]
            listing.images = [image for image in listing.images if not _below(image.name, inside)]
        elif Path(name).is_dir():
            mine = list_folder(Path(name), work).images
        elif ARCHIVE.search(name) and Path(name).is_file():
            mine = list_archive(Path(name), work).images
        else:
            raise InputError(f"--masks {name}: no such folder, neither here nor in {config.src}")
        if not mine:
            raise InputError(f"--masks {name}: no images (PNG, BMP, GIF, TIFF) in it")
        found += mine
    return found


def _inside(name: str, src: Path | None) -> str | None:
    """The folder of masks as a path inside the source, or None if it lies elsewhere."""
    if src is None:
        return None
    if src.is_dir():
        for path in (Path(name), src / name):
            real, root = os.path.realpath(path), os.path.realpath(src)
            if path.is_dir() and real.startswith(root + os.sep):
                return os.path.relpath(real, root)
        return None
    return None if Path(name).exists() else name.strip("/")


def _below(name: str, folder: str) -> bool:
    return name.startswith(folder + "/") or f"/{folder}/" in name
