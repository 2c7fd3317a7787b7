"""What a sample may have beside its image: a mask of classes, boxes, several labels, or values.

``KEY.mask``
    a PNG of one channel, 8 or 16 bits: the class of each pixel, from 0 on; the largest value of the
    type (255, 65535) marks pixels that count neither in training nor in evaluation.
``KEY.boxes``
    JSON: ``boxes`` [[x0, y0, x1, y1], ...] in pixels of the stored image (the right and lower edges
    lie behind the last pixel), ``labels`` [class, ...]; optionally one entry a box of ``crowd``
    (COCO's iscrowd), ``difficult`` (Pascal VOC), ``area`` and ``segmentation`` (COCO's polygons or
    run lengths); and ``image_id``, the source's number of the image.
``KEY.labels``
    JSON: [class, ...], the labels of an image that may have several, or none.
``KEY.values``
    JSON: [number, ...], one for each quantity that was measured of the image.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.errors import one_line

PNG = b"\x89PNG\r\n\x1a\n"
Mask = NDArray[np.uint8 | np.uint16]
Labels = NDArray[np.int64]
Measured = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """The objects of one image; every array has one row an object."""

    boxes: NDArray[np.float32]
    """[n, 4]: x0, y0, x1, y1 in pixels."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float32]
    """Square pixels: of the object where the source has it, else of the box."""
    segmentation: list[Any] = field(default_factory=list)
    """COCO's, one entry an object; empty where there is none."""
    image_id: Any = None

    def __len__(self) -> int:
        return len(self.labels)


def ignored_value(mask: Mask) -> int:
    """The value of pixels that do not count."""
    return int(np.iinfo(mask.dtype).max)


def decode_mask(raw: bytes) -> Mask:
    """uint8 or uint16 [H, W].

    Raises:
        BadImage: no PNG of one channel, or damaged.
    """
    if not raw.startswith(PNG):
        raise BadImage("the mask is no PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"the mask has {image.width}x{image.height} pixels")
            if image.mode == "I;16":
                return np.asarray(image).astype(np.uint16)
            if image.mode not in ("L", "P"):
                raise BadImage(f"the mask is a PNG of mode {image.mode}, not of one channel")
            return np.asarray(image)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"the mask cannot be decoded: {one_line(error)}") from None


def encode_mask(mask: Mask) -> bytes:
    """The inverse of :func:`decode_mask`, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def decode_boxes(raw: bytes) -> Boxes:
    """Parse a ``.boxes`` member.

    Raises:
        BadImage: not of the form in the module's docstring.
    """
    try:
        content = json.loads(raw)
        boxes = np.asarray(content["boxes"], np.float32).reshape(-1, 4)
        labels = np.asarray(content["labels"], np.int64).reshape(-1)
        sides = boxes[:, 2:] - boxes[:, :2]
        found = Boxes(
            boxes,
            labels,
            np.asarray(content.get("crowd") or np.zeros(len(labels)), bool),
            np.asarray(content.get("difficult") or np.zeros(len(labels)), bool),
            np.asarray(content.get("area") or sides.prod(1), np.float32),
            list(content.get("segmentation") or ()),
            content.get("image_id"),
        )
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise BadImage(f"the boxes cannot be read: {one_line(error)}") from None
    columns = (found.boxes, found.crowd, found.difficult, found.area)
    if any(len(column) != len(labels) for column in columns) or (
        len(found.segmentation) not in (0, len(labels))
    ):
        raise BadImage("the boxes' lists differ in length")
    if not np.isfinite(found.boxes).all() or (labels < 0).any():
        raise BadImage("boxes that are not finite, or labels below 0")
    return found


def decode_labels(raw: bytes) -> Labels:
    """int64 [n], ascending: a ``.labels`` member.

    Raises:
        BadImage: no list of numbers from 0 on.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list) or not all(type(n) is int and n >= 0 for n in content):
        raise BadImage("the labels are no list of numbers")
    return np.unique(np.array(content, np.int64))


def decode_values(raw: bytes) -> Measured:
    """float64 [n]: a ``.values`` member.

    Raises:
        BadImage: no list of finite numbers.
    """
    try:
        content = np.array(json.loads(raw), np.float64)
    except (ValueError, TypeError, RecursionError):
        content = np.empty(0)
    if content.ndim != 1 or not len(content) or not np.isfinite(content).all():
        raise BadImage("the values are no list of numbers")
    return content


def decode_target(kind: str, raw: bytes) -> Mask | Boxes | Labels | Measured:
    """A target of any kind (``mask``, ``boxes``, ``labels`` or ``values``)."""
    decoders = {
        "mask": decode_mask, "boxes": decode_boxes, "labels": decode_labels,
        "values": decode_values,
    }  # fmt: skip
    return decoders[kind](raw)


def counts(target: Mask | Boxes | Labels | Measured) -> bool:
    """Whether something can be measured on a target: a pixel that counts, an object that is neither
    a crowd nor difficult."""
    if isinstance(target, Boxes):
        return not (target.crowd | target.difficult).all()
    return bool((target != ignored_value(target)).any())  # pyright: ignore[reportArgumentType]


def check_target(
    target: Mask | Boxes | Labels | Measured, height: int, width: int, classes: int | None
) -> list[int]:
    """The classes that occur in a target.

    Raises:
        BadImage: it does not fit its image, or has classes beyond ``classes`` (None: any).
    """
    if isinstance(target, Boxes):
        present = np.unique(target.labels).tolist()
        x0, y0, x1, y1 = target.boxes.T
        if (x0 < 0).any() or (y0 < 0).any() or (x1 > width).any() or (y1 > height).any():
            raise BadImage(f"a box leaves the image of {width}x{height} pixels")
        if ((x1 <= x0) | (y1 <= y0)).any():
            raise BadImage("a box of no area")
    elif target.dtype.kind == "f":
        if classes not in (None, len(target)):
            raise BadImage(f"{len(target)} values instead of {classes}")
        return []
    elif target.ndim == 1:
        present = target.tolist()
    else:
        if target.shape != (height, width):
            raise BadImage(
                f"its mask has {target.shape[1]}x{target.shape[0]} pixels, the image "
                f"{width}x{height}"
            )
        ignored = ignored_value(target)  # pyright: ignore[reportArgumentType]
        present = [value for value in np.unique(target).tolist() if value != ignored]
    if classes is not None and (unknown := [value for value in present if value >= classes]):
        raise BadImage(f"classes {unknown} of {classes} in its target")
    return present
