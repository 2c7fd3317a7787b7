"""Average precision of boxes and masks, by pycocotools."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.targets.formats import Boxes
from xcit_dino.errors import InputError
from xcit_dino.supervised.detect.masks import RunLengths, area

METRICS = {  # name -> row of COCOeval.stats
    "ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar_100": 8
}  # fmt: skip


class Detections(NamedTuple):
    """Of one image, in pixels of the stored image."""

    boxes: NDArray[np.float32]
    """[n, 4]: x0, y0, x1, y1."""
    labels: NDArray[np.int64]
    """[n]: from 0 on."""
    scores: NDArray[np.float32]
    masks: list[RunLengths] | None = None


@dataclass(frozen=True)
class Scores:
    """In percent."""

    metrics: dict[str, float]
    """Without those of sizes of which there is no object."""
    by_class: dict[str, dict[str, float]]
    """``ap`` and ``ap50`` of every class that has an object."""
    images: int = 0
    """That could be read."""

    def with_masks(self, masks: Scores) -> Scores:
        """These, and those of masks under ``mask_ap`` and so on."""
        by_class = {
            name: values | {f"mask_{key}": value for key, value in masks.by_class[name].items()}
            for name, values in self.by_class.items()
        }
        renamed = {f"mask_{name}": value for name, value in masks.metrics.items()}
        return Scores(self.metrics | renamed, by_class, self.images)


def require_pycocotools() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        importlib.import_module("pycocotools.coco")
        return importlib.import_module("pycocotools.cocoeval")
    except ImportError:
        raise InputError(
            "detect measures by pycocotools, which is not installed: "
            "pip install 'xcit-dino[detect]'"
        ) from None


def coco_scores(
    truth: Mapping[int, Boxes],
    found: Mapping[int, Detections],
    classes: Sequence[str],
    masks: bool = False,
) -> Scores:
    """COCO's metrics of images by number, of boxes or of masks. Crowds count as in COCO, and
    difficult objects as crowds do: what lies on them is neither right nor wrong.

    Raises:
        InputError: pycocotools is not installed.
    """
    evaluation = require_pycocotools().COCOeval(iouType="segm" if masks else "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.cocoGt = _dataset(classes, list(truth), _objects(truth, masks))
        evaluation.cocoDt = _dataset(classes, list(truth), _detected(found, masks))
        evaluation.params.imgIds = sorted(truth)
        evaluation.params.catIds = list(range(len(classes)))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    percent = 100 * evaluation.stats
    metrics = {name: float(percent[row]) for name, row in METRICS.items() if percent[row] >= 0}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]
    by_class = {
        name: {
            "ap": round(100 * float(precision[:, :, number].mean()), 4),
            "ap50": round(100 * float(precision[0, :, number].mean()), 4),
        }
        for number, name in enumerate(classes)
        if precision[0, 0, number] >= 0
    }
    return Scores(metrics, by_class)


def _dataset(classes: Sequence[str], images: list[int], objects: list[dict[str, Any]]) -> Any:
    """A ``COCO`` of these annotations."""
    data = importlib.import_module("pycocotools.coco").COCO()
    data.dataset = {
        "images": [
            {"id": number, "height": 0, "width": 0} for number in images
        ],  # of polygons only
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
        "annotations": [{"id": number} | item for number, item in enumerate(objects, start=1)],
    }
    data.createIndex()
    return data


def _objects(truth: Mapping[int, Boxes], masks: bool) -> list[dict[str, Any]]:
    items = []
    for image, target in truth.items():
        shapes = target.segmentation if masks else [None] * len(target)
        ignored = target.crowd | target.difficult
        rows = zip(target.boxes, target.labels, target.area, ignored, shapes, strict=True)
        for box, label, size, crowd, shape in rows:
            facts = {"area": float(size), "iscrowd": int(crowd), "segmentation": shape}
            items.append(_item(image, box, label) | facts)
    return items


def _detected(found: Mapping[int, Detections], masks: bool) -> list[dict[str, Any]]:
    items = []
    for image, detections in found.items():
        boxes, labels, scores, shapes = detections
        shapes = (shapes or []) if masks else [None] * len(labels)
        for box, label, score, shape in zip(boxes, labels, scores, shapes, strict=True):
            item = _item(image, box, label)
            size = area(shape) if shape else item["bbox"][2] * item["bbox"][3]
            facts = {"area": size, "iscrowd": 0, "score": float(score), "segmentation": shape}
            items.append(item | facts)
    return items


def _item(image: int, box: NDArray[np.float32], label: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box.tolist()
    return {"image_id": image, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0]}
