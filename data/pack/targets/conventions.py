"""Which values of a mask mean which class: named conventions, or a file of class names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xcit_dino.data.pack.tables import read_text
from xcit_dino.errors import InputError

VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CITYSCAPES = {  # cityscapesScripts, helpers/labels.py: ids of the 19 classes that are evaluated
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag"""
COLOR = re.compile(r"#[0-9a-fA-F]{6}")
LARGEST = 65_534  # classes of a 16-bit mask; 65535 is ignored


@dataclass(frozen=True)
class MaskCoding:
    """How the masks of a source are read."""

    classes: tuple[str, ...]
    values: tuple[tuple[int, int], ...]
    """(value, class) of each value that is a class; colors are 0xRRGGBB."""
    ignored: tuple[int, ...]
    """Values of pixels that do not count."""
    colored: bool = False
    """Values are colors of an RGB image."""

    def __post_init__(self) -> None:
        assert len(self.classes) <= LARGEST

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if len(self.classes) <= 255 else np.uint16


def voc_colors(count: int) -> list[int]:
    """Pascal VOC's colors of classes 0 to ``count`` - 1 as 0xRRGGBB (devkit, ``VOClabelcolormap``:
    the bits of a number, dealt out to red, green and blue from the highest bit down)."""
    colors = []
    for number in range(count):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append(rgb[0] << 16 | rgb[1] << 8 | rgb[2])
    return colors


def _numbered(names: Sequence[str], ignored: tuple[int, ...], first: int = 0) -> MaskCoding:
    values = tuple((first + number, number) for number in range(len(names)))
    return MaskCoding(tuple(names), values, ignored)


def _cityscapes() -> MaskCoding:
    values = tuple((value, number) for number, value in enumerate(CITYSCAPES.values()))
    others = sorted({*range(34), 255} - {value for value, _ in values})
    return MaskCoding(tuple(CITYSCAPES), values, tuple(others))


CONVENTIONS: Mapping[str, MaskCoding] = {
    "ade20k": _numbered(re.split(r",\s+", ADE20K), (0, 255), first=1),
    "camvid": _numbered(CAMVID, (11, 255)),
    "cityscapes": _cityscapes(),
    "cityscapes_train_ids": _numbered(list(CITYSCAPES), (255,)),
    "voc": _numbered(VOC, (255,)),
}


def mask_coding(name: str, ignore: tuple[int, ...]) -> MaskCoding:
    """The coding of ``--mask_classes``: a convention, or a file.

    A text file names one class per line, the first for value 0. JSON maps names to values, to lists
    of values or to colors ``"#rrggbb"``; classes are numbered in its order.

    Args:
        ignore: more values that do not count.

    Raises:
        InputError: no such convention or file, or one value for two classes.
    """
    known = CONVENTIONS.get(name)
    coding = known or _from_file(Path(name))
    twice = [value for value in ignore if value in dict(coding.values)]
    if twice:
        names = ", ".join(coding.classes[dict(coding.values)[value]] for value in twice)
        raise InputError(f"--mask_ignore {twice[0]}: --mask_classes has it for {names}")
    usual = () if coding.colored or 255 in dict(coding.values) else (255,)
    ignored = sorted({*coding.ignored, *ignore, *usual})
    return MaskCoding(coding.classes, coding.values, tuple(ignored), coding.colored)


def _from_file(path: Path) -> MaskCoding:
    if not path.is_file():
        raise InputError(
            f"--mask_classes {path}: no such file, and no convention of that name "
            f"({', '.join(CONVENTIONS)})"
        )
    text = read_text(path)
    if path.suffix.lower() != ".json":
        names = [line.strip() for line in text.rstrip().splitlines()]
        if not names or "" in names or len(set(names)) < len(names):
            raise InputError(f"--mask_classes {path}: one class per line, each once, no empty line")
        _check_count(path, len(names))
        return _numbered(names, ())
    try:
        content = json.loads(text)
        items = {str(name): v if isinstance(v, list) else [v] for name, v in content.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(
            f'--mask_classes {path}: not of the form {{"road": 0, "car": [1, 2]}}'
        ) from None
    _check_count(path, len(items))
    return _from_items(path, items)


def _check_count(path: Path, count: int) -> None:
    if not 1 <= count <= LARGEST:
        raise InputError(f"--mask_classes {path}: {count} classes; 1 to {LARGEST:,} are possible")


def _from_items(path: Path, items: dict[str, list[object]]) -> MaskCoding:
    flat = [value for values in items.values() for value in values]
    colored = bool(flat) and all(isinstance(v, str) and COLOR.fullmatch(v) for v in flat)
    numbers = all(type(v) is int and 0 <= v <= 65_535 for v in flat)
    if not colored and not numbers:
        raise InputError(
            f'--mask_classes {path}: values are numbers from 0 to 65535, or colors as "#0080ff"'
        )
    found: dict[int, int] = {}
    for number, (name, values) in enumerate(items.items()):
        for value in values:
            plain = int(value[1:], 16) if isinstance(value, str) else int(value)  # type: ignore
            if plain in found:
                other = list(items)[found[plain]]
                raise InputError(f"--mask_classes {path}: {value} stands for {other} and {name}")
            found[plain] = number
    return MaskCoding(tuple(items), tuple(found.items()), (), colored)
