"""Instance masks: COCO's polygons and run lengths -> arrays and back, by pycocotools."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.targets.formats import Boxes
from xcit_dino.errors import one_line

RunLengths = dict[str, Any]
"""COCO's, compressed: ``size`` [height, width] and ``counts``."""


def _library() -> Any:
    return importlib.import_module("pycocotools.mask")


def run_lengths(target: Boxes, height: int, width: int) -> list[RunLengths]:
    """Of every object of an image.

    Raises:
        BadImage: an object has no mask, or one that pycocotools does not read.
    """
    if len(target.segmentation) < len(target):
        raise BadImage("its objects have no masks; leave out --masks")
    return [_run_lengths(shape, height, width) for shape in target.segmentation]


def _run_lengths(shape: Any, height: int, width: int) -> RunLengths:
    """As COCO's ``annToRLE``."""
    library = _library()
    try:
        if isinstance(shape, list) and shape:
            found = library.merge(library.frPyObjects(shape, height, width))
        elif isinstance(shape, dict) and isinstance(shape["counts"], list):
            found = library.frPyObjects(shape, height, width)
        elif isinstance(shape, dict):
            found = {"size": shape["size"], "counts": shape["counts"].encode()}
        else:
            raise ValueError("an object has none")
    except Exception as error:  # pycocotools raises different types
        raise BadImage(f"a mask cannot be read: {one_line(error)}") from None
    if list(found["size"]) != [height, width]:
        raise BadImage(f"a mask is for {found['size']} pixels, the image has {[height, width]}")
    return found


def decoded(masks: list[RunLengths], height: int, width: int) -> NDArray[np.uint8]:
    """[n, H, W] of 0 and 1."""
    if not masks:
        return np.zeros((0, height, width), np.uint8)
    with warnings.catch_warnings():  # pycocotools' of numpy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        return _library().decode(masks).transpose(2, 0, 1)


def encoded(masks: NDArray[np.bool_]) -> list[RunLengths]:
    """The inverse of :func:`decoded`."""
    if not len(masks):
        return []
    return _library().encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))


def area(mask: RunLengths) -> float:
    """In pixels."""
    return float(_library().area(mask))
