"""Masks of a source: which belongs to which image, and their values as class numbers."""

from __future__ import annotations

import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import PIL.Image

from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.pack.labels import one_form
from xcit_dino.data.pack.targets.conventions import CONVENTIONS, MaskCoding, voc_colors
from xcit_dino.data.targets.formats import Mask
from xcit_dino.errors import InputError, one_line

IMAGE_ENDINGS = ("_leftImg8bit",)
MASK_ENDINGS = (
    "_gtFine_labelIds", "_gtFine_labelTrainIds", "_gtCoarse_labelIds", "_labelIds",
    "_labelTrainIds", "_L", "_mask", "_label", "_labels", "_seg", "_gt", "_segmentation",
)  # fmt: skip
OTHERS = ("_instanceIds", "_instanceTrainIds", "_color")  # Cityscapes' other files beside a mask
SHOWN = 20  # unknown values named
SAMPLED = 20  # masks read to say which values there are


def pair_masks(
    images: Sequence[Image], masks: Sequence[Image], coding: MaskCoding
) -> tuple[list[Image], list[str]]:
    """Images with their masks as targets, and notes on those without.

    A mask belongs to the image of the same stem; usual endings (``_mask``, ``_gtFine_labelIds``)
    do not count. Of several of one stem the one whose folders resemble the image's most is taken,
    and a mask belongs to one image.

    Raises:
        InputError: none fits, or two fit equally well.
    """
    by_stem: dict[str, list[Image]] = defaultdict(list)
    for mask in _of_coding(masks, coding):
        by_stem[_stem(mask.name, MASK_ENDINGS)].append(mask)
    wishes = dict[int, Image]()
    for number, image in enumerate(images):
        found = by_stem.get(_stem(image.name, IMAGE_ENDINGS)) or by_stem.get(_stem(image.name, ()))
        if found is not None:
            wishes[number] = _best(image, found)
    owners = _owners(images, wishes)
    paired = [
        image._replace(target=wishes[number])
        for number, image in enumerate(images)
        if number in owners
    ]
    without = [image.name for number, image in enumerate(images) if number not in owners]
    used = {wishes[number].name for number in owners}
    if not paired:
        raise InputError(
            f"--masks: none of {len(masks):,} masks has the name of an image (the first mask is "
            f"{masks[0].name}, the first image {images[0].name})"
        )
    notes = []
    if without:
        notes.append(f"skipped: {len(without):,} images without a mask (the first: {without[0]})")
    if idle := sum(map(len, by_stem.values())) - len(used):
        notes.append(f"skipped: {idle:,} masks without an image")
    return paired, notes


def _of_coding(masks: Sequence[Image], coding: MaskCoding) -> list[Image]:
    """Without Cityscapes' other files: instances, colors, and the ids of the other numbering."""
    train_ids = coding.classes == CONVENTIONS["cityscapes"].classes and (7, 0) not in coding.values
    other = "_labelIds" if train_ids else "_labelTrainIds"
    stems = [PurePosixPath(mask.name).stem for mask in masks]
    both = {stem.rpartition("_")[2] for stem in stems} >= {"labelIds", "labelTrainIds"}
    endings = (*OTHERS, other) if both else OTHERS
    return [mask for mask, s in zip(masks, stems, strict=True) if not s.endswith(endings)]


def _stem(name: str, endings: Sequence[str]) -> str:
    stem = PurePosixPath(one_form(name)).stem
    return next((stem.removesuffix(end) for end in endings if stem.endswith(end)), stem)


def _likeness(image: Image, mask: Image) -> int:
    """How many folders their paths share."""
    one, other = (Counter(PurePosixPath(one_form(x.name)).parts[:-1]) for x in (image, mask))
    return (one & other).total()


def _owners(images: Sequence[Image], wishes: dict[int, Image]) -> set[int]:
    """Numbers of the images that get the masks they ask for: of several that ask for the same one,
    the one whose folders resemble the mask's most.

    Raises:
        InputError: two resemble it equally.
    """
    asking: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for number, mask in wishes.items():
        asking[mask.name, mask.path, mask.offset].append(number)
    owners = set[int]()
    for numbers in asking.values():
        mask = wishes[numbers[0]]
        ranked = sorted(numbers, key=lambda n: _likeness(images[n], mask), reverse=True)
        if len(ranked) > 1:
            first, second = (images[number] for number in ranked[:2])
            if _likeness(first, mask) == _likeness(second, mask):
                raise InputError(
                    f"--masks: {mask.name} has the name of {first.name} and of {second.name}; name "
                    "the folder of one kind of images as SRC, or put the masks into folders like "
                    "the images'"
                )
        owners.add(ranked[0])
    return owners


def _best(image: Image, masks: list[Image]) -> Image:
    if len(masks) == 1:
        return masks[0]
    ranked = sorted(masks, key=lambda mask: _likeness(image, mask), reverse=True)
    if _likeness(image, ranked[0]) == _likeness(image, ranked[1]):
        raise InputError(
            f"--masks: {ranked[0].name} and {ranked[1].name} both have the name of {image.name}; "
            "name the folder of one kind of masks"
        )
    return ranked[0]


# ---------------------------------------------------------------------------- values


def read_mask(image: Image, coding: MaskCoding) -> Mask:
    """Class numbers of one mask [H, W]; the largest value of the type where pixels do not count.

    Raises:
        BadImage: unreadable, or with values that ``--mask_classes`` does not know.
    """
    try:
        values = raw_values(image, coding)
        return _classes_of(values, coding)
    except BadImage as error:
        raise BadImage(f"its mask {image.name}: {error}") from None


def raw_values(image: Image, coding: MaskCoding | None) -> np.ndarray:
    """The values of a mask as stored: int32 [H, W]; of a palette the indices, of colors 0xRRGGBB.

    Raises:
        BadImage: unreadable, or in color where values are numbers.
    """
    raw = read_image(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = PIL.Image.open(io.BytesIO(raw))
            if picture.format not in ("PNG", "BMP", "GIF", "TIFF", "PPM"):
                raise BadImage(f"{picture.format} changes values; masks are PNG, BMP, GIF or TIFF")
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImage(f"{picture.width}x{picture.height} pixels")
            if coding is not None and coding.colored:
                return _packed_colors(np.asarray(picture.convert("RGB")))
            if picture.mode == "1":
                return np.asarray(picture).astype(np.int32)
            if picture.mode in ("RGB", "RGBA"):
                return _gray_or_voc(np.asarray(picture.convert("RGB")), coding)
            if picture.mode in ("L", "P") or picture.mode.startswith("I"):
                return np.asarray(picture).astype(np.int32)
            raise BadImage(f"pixels of mode {picture.mode}")
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None


def _packed_colors(rgb: np.ndarray) -> np.ndarray:
    parts = rgb.astype(np.int32)
    return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]


def _gray_or_voc(rgb: np.ndarray, coding: MaskCoding | None) -> np.ndarray:
    """Values of an RGB image: gray ones are numbers, Pascal VOC's colors its classes."""
    if (rgb == rgb[..., :1]).all():
        return rgb[..., 0].astype(np.int32)
    if coding is not None and coding.classes == CONVENTIONS["voc"].classes:
        colors = voc_colors(len(coding.classes))
        packed = _packed_colors(rgb)
        table = {color: number for number, color in enumerate(colors)} | {0xE0E0C0: 255}
        found, places = np.unique(packed, return_inverse=True)
        values = np.array([table.get(int(color), -1) for color in found], np.int32)
        if (values >= 0).all():
            return values[places].reshape(packed.shape)
    raise BadImage(
        'a mask in color; give the colors of the classes with --mask_classes FILE.json: {"road": '
        '"#804080"}'
    )


def _classes_of(values: np.ndarray, coding: MaskCoding) -> Mask:
    if values.max(initial=0) < 1 << 16:  # without sorting all pixels
        counts = np.bincount(values.ravel())
        found, places = np.flatnonzero(counts), values
    else:
        found, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    table = dict(coding.values)
    ignored = int(np.iinfo(coding.dtype).max)
    numbers = [ignored if v in coding.ignored else table.get(v, -1) for v in found.tolist()]
    if -1 in numbers:
        amounts = counts[counts > 0]
        unknown = [
            f"{shown(int(v), coding.colored)} ({n:,} pixels)"
            for v, n, number in zip(found, amounts, numbers, strict=True) if number < 0
        ]  # fmt: skip
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise BadImage(
            f"values that --mask_classes does not name: {', '.join(unknown[:SHOWN])}{more}"
            + ("" if coding.colored else " (--mask_ignore: pixels of a value do not count)")
        )
    if places is values:
        lookup = np.zeros(len(counts), coding.dtype)
        lookup[found] = numbers
        return lookup[values]
    return np.array(numbers, coding.dtype)[places].reshape(values.shape)


def shown(value: int, colored: bool) -> str:
    return f"#{value:06x}" if colored else str(value)


def values_in(masks: Sequence[Image]) -> str:
    """The values of some masks, to be shown: ``0, 1, 2, 255``."""
    values, unreadable = set[int](), ""
    step = max(1, len(masks) // SAMPLED)
    for mask in masks[::step][:SAMPLED]:
        try:
            values |= set(np.unique(raw_values(mask, None)).tolist())
        except BadImage as error:
            unreadable = f"(unreadable: {error})"
    listed = ", ".join(map(str, sorted(values)[:SHOWN])) or unreadable
    return listed + (", ..." if len(values) > SHOWN else "")
