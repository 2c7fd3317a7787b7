"""Boxes of a source: COCO's JSON or Pascal VOC's XML, one list of objects an image."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.labels import one_form
from xcit_dino.errors import InputError

PER_BOX = ("boxes", "labels", "crowd", "difficult", "area", "segmentation")


@dataclass
class Annotated:
    """What the files of ``--boxes`` hold."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name of the image: the content of a ``.boxes`` member, and its ``size`` (height, width) or
    None."""
    classes: list[str] = field(default_factory=list)
    is_xml: bool = False
    """The names have no suffix: they are those of the XML files."""
    notes: list[str] = field(default_factory=list)


def read_annotations(paths: Sequence[Path]) -> Annotated:
    """Read COCO JSON files, or folders of Pascal VOC XML.

    Raises:
        InputError: another form, categories that differ between files, or boxes of a category that
            there is not.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"--boxes {path}: no such file or folder")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(folders) < len(paths):
        raise InputError("--boxes: name JSON files, or folders of XML, not both")
    found = _read_voc(folders) if folders else _read_coco(paths)
    present = Counter(label for item in found.objects.values() for label in item["labels"])
    if empty := [name for number, name in enumerate(found.classes) if not present[number]]:
        found.notes.append(f"classes without instances: {', '.join(empty[:6])}" + (
            f" and {len(empty) - 6} more" if len(empty) > 6 else ""))  # fmt: skip
    if bare := sum(not item["labels"] for item in found.objects.values()):
        found.notes.append(f"{bare:,} images have no object, and stay as such")
    return found


# ---------------------------------------------------------------------------- COCO


def _read_coco(paths: Sequence[Path]) -> Annotated:
    found, numbers = Annotated(), None
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            images, annotations = content["images"], content["annotations"]
            if numbers is not None and categories != numbers:
                raise InputError(f"--boxes {path}: other categories than in {paths[0]}")
            numbers = categories
            order = sorted(categories)
            found.classes = [categories[number] for number in order]
            _take_coco(found, path, images, annotations, {n: i for i, n in enumerate(order)})
        except OSError as error:
            raise InputError(f"--boxes {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"--boxes {path}: not COCO's JSON of images, annotations and categories "
                f"({type(error).__name__}: {error})"
            ) from None
    return found


def _take_coco(
    found: Annotated, path: Path, images: Any, annotations: Any, numbers: dict[int, int]
) -> None:
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        of_image[annotation["image_id"]].append(annotation)
    for image in images:
        name, mine = str(image["file_name"]), of_image.pop(image["id"], [])
        if name in found.objects:
            raise InputError(
                f"--boxes {path}: {name} is listed twice; pack the splits one by one, with --split"
            )
        item: dict[str, Any] = {key: [] for key in PER_BOX if key != "difficult"}
        for a in mine:
            number = numbers.get(a["category_id"])
            if number is None:
                raise InputError(
                    f"--boxes {path}: {name} has a box of category {a['category_id']!r}, which is "
                    "not among its categories"
                )
            x, y, width, height = map(float, a["bbox"])
            item["boxes"].append([x, y, x + width, y + height])
            item["labels"].append(number)
            item["crowd"].append(int(a.get("iscrowd") or 0))
            item["area"].append(float(a.get("area") or width * height))
            item["segmentation"].append(a.get("segmentation"))
        if not any(item["segmentation"]):
            del item["segmentation"]
        size = (image.get("height"), image.get("width"))
        size = size if all(size) else None  # some tools write null or 0
        found.objects[name] = item | {"image_id": image["id"], "size": size}
    if of_image:
        count = sum(map(len, of_image.values()))
        found.notes.append(f"skipped: {count:,} boxes of images that {path.name} does not list")


# ---------------------------------------------------------------------------- Pascal VOC


def _read_voc(folders: Sequence[Path]) -> Annotated:
    found, names = Annotated(is_xml=True), set[str]()
    for folder in folders:
        for path in sorted(folder.rglob("*.xml")):
            item, classes = _read_xml(path)
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found.objects:
                raise InputError(f"--boxes: {name}.xml is in two folders")
            found.objects[name] = item | {"classes": classes}
            names |= set(classes)
    if not found.objects:
        raise InputError(f"--boxes {folders[0]}: no XML files in it")
    found.classes = sorted(names)
    numbers = {name: number for number, name in enumerate(found.classes)}
    for item in found.objects.values():
        item["labels"] = [numbers[name] for name in item.pop("classes")]
    return found


def _read_xml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The objects of one XML, and their classes' names. Its pixels are counted from 1, and the last
    row and column belong to the box (VOC devkit)."""
    try:
        raw = path.read_bytes()
        if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:  # could expand without bound
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(raw)
        item: dict[str, Any] = {"boxes": [], "difficult": []}
        classes = []
        for thing in root.iter("object"):
            box = thing.find("bndbox")
            if box is None:
                raise ValueError("an object without a bndbox")
            x0, y0, x1, y1 = (float(box.findtext(n, "")) for n in ("xmin", "ymin", "xmax", "ymax"))
            item["boxes"].append([x0 - 1, y0 - 1, x1, y1])
            item["difficult"].append(int(thing.findtext("difficult") or 0))
            classes.append((thing.findtext("name") or "").strip())
        if "" in classes:
            raise ValueError("an object without a name")
        height, width = (int(root.findtext(f"size/{n}") or 0) for n in ("height", "width"))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(f"--boxes {path}: {error}") from None
    return item | {"size": (height, width) if height and width else None}, classes


# ---------------------------------------------------------------------------- images


def pair_boxes(images: Sequence[Image], found: Annotated) -> tuple[list[Image], list[str]]:
    """Images with their objects as targets (JSON), and notes on those without.

    A file name of COCO's is a path below some folder of the source; XML belongs to the image of its
    stem.

    Raises:
        InputError: none fits, or a name fits several images.
    """
    by_name: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        by_name[_parts(image.name, found.is_xml)[-1]].append(image)
    claims: dict[str, list[str]] = defaultdict(list)
    of_name, missing = dict[str, Image](), []
    for name in found.objects:
        parts = _parts(name, False)
        fitting = by_name.get(parts[-1], [])
        if len(fitting) > 1:
            fitting = [i for i in fitting if _agree(_parts(i.name, found.is_xml), parts)]
        if len(fitting) > 1:
            raise InputError(
                f"--boxes: {name} may be {fitting[0].name} or {fitting[1].name}; name the folder "
                "of one kind of images as SRC"
            )
        if fitting:
            of_name[name] = fitting[0]
            claims[fitting[0].name].append(name)
        else:
            missing.append(name)
    paired = {}
    for image_name, names in claims.items():
        name = _own(image_name, names, found.is_xml)
        missing += [other for other in names if other != name]
        data = json.dumps(found.objects[name], separators=(",", ":")).encode()
        paired[image_name] = of_name[name]._replace(target=data)
    if not paired:
        raise InputError(
            f"--boxes: none of {len(found.objects):,} names is that of an image (the first is "
            f"{next(iter(found.objects))}, the first image {images[0].name})"
        )
    notes = list(found.notes)
    if missing:
        notes.append(
            f"skipped: boxes of {len(missing):,} images that the source lacks (the first: "
            f"{missing[0]})"
        )
    if without := [image.name for image in images if image.name not in paired]:
        notes.append(f"skipped: {len(without):,} images that --boxes does not name (the first: "
                     f"{without[0]})")  # fmt: skip
    return list(paired.values()), notes


def _own(image: str, names: Sequence[str], stem_only: bool) -> str:
    """The one of several names that is the image's; raises InputError where it is not clear."""
    if len(names) == 1:
        return names[0]
    own = [name for name in names if _agree(_parts(image, stem_only), _parts(name, False))]
    if len(own) != 1:
        raise InputError(
            f"--boxes: {names[0]} and {names[1]} may both be {image}; name the folder that holds "
            "the images of all of them as SRC"
        )
    return own[0]


def _parts(name: str, stem_only: bool) -> tuple[str, ...]:
    """Folders and name of a file, with or without its suffix."""
    path = PurePosixPath(one_form(name))
    return (*path.parts[:-1], path.stem if stem_only else path.name)


def _agree(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two paths ends with the other."""
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


# ---------------------------------------------------------------------------- one image


def checked_boxes(raw: bytes, height: int, width: int, notes: Counter[str]) -> bytes:
    """A target as it is stored: boxes clipped to the image, those of no area left out.

    Args:
        notes: counts what was changed.

    Raises:
        BadImage: the image has another size than the annotation says.
    """
    item = json.loads(raw)
    size = item.pop("size")
    if size is not None and tuple(size) != (height, width):
        raise BadImage(
            f"its boxes are for {size[1]}x{size[0]} pixels, the image has {width}x{height}"
        )
    boxes = np.asarray(item["boxes"], np.float64).reshape(-1, 4)
    limits = np.array([width, height, width, height], np.float64)
    clipped = np.round(np.clip(boxes, 0, limits), 3).astype(np.float32)  # as it will be read
    with np.errstate(invalid="ignore"):
        keep = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        # half a pixel is how annotations round
        notes["boxes clipped to their image"] += int(
            ((np.abs(clipped - boxes) > 0.5).any(1) & keep).sum()
        )
        stored = np.round(boxes, 3).astype(np.float32)
        inside = (stored[:, 2] > stored[:, 0]) & (stored[:, 3] > stored[:, 1])
    notes["boxes outside their image left out"] += int((inside & ~keep).sum())
    notes["boxes of no area left out"] += int((~inside).sum())
    if "area" in item:  # of an object cannot exceed that of its box
        most = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
        cut = (np.clip(boxes, 0, limits) != boxes).any(1)
        item["area"] = np.where(cut, np.minimum(item["area"], most), item["area"]).tolist()
    for key in PER_BOX:
        if key in item:
            item[key] = [value for value, kept in zip(item[key], keep, strict=True) if kept]
    item["boxes"] = np.round(clipped[keep].astype(np.float64), 3).tolist()
    return json.dumps(item, sort_keys=True, separators=(",", ":")).encode()
