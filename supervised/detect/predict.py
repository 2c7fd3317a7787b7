"""Boxes that a finished detection run predicts, for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.targets.loader import Pixels, one_pass
from xcit_dino.data.targets.transforms import nearest, resized
from xcit_dino.errors import InputError
from xcit_dino.models.zoo import create_model
from xcit_dino.options import option_types, replace
from xcit_dino.supervised.detect.coco import Detections
from xcit_dino.supervised.detect.config import DetectConfig
from xcit_dino.supervised.detect.data import EvalTransform, View, fitted, scaled
from xcit_dino.supervised.detect.evaluation import detected
from xcit_dino.supervised.detect.masks import RunLengths, decoded
from xcit_dino.supervised.detect.network import build_detector
from xcit_dino.supervised.targets import open_targets
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

SIDE = 400  # the longer one, of pictures, in pixels
SHOWN_FROM = 0.5  # scores of boxes that are shown
NO_CLASS = 65_535


class Shown(NamedTuple):
    """Objects in an image, of those known or of those predicted."""

    boxes: NDArray[np.float32]
    """[n, 4]: x0, y0, x1, y1 in pixels of the picture."""
    labels: NDArray[np.int64]
    """[n]."""
    masks: NDArray[np.int64] | None
    """[H, W]: the class of each pixel, NO_CLASS where there is no object; None without masks."""


def predicted_boxes(
    folder: Path, run: Mapping[str, Any], count: int
) -> tuple[list[tuple[Pixels, Shown, Shown]], list[str]]:
    """(image [H, W, C] in the set's own units, its objects, the predicted ones) of evenly spaced
    validation images, and the names of the classes.

    run: options of the run's ``config.yaml``.

    Raises:
        InputError: no checkpoint, or no shards.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise InputError("no whole checkpoint in the run folder")
    known = option_types(DetectConfig)
    config = replace(DetectConfig(), {k: v for k, v in run.items() if k in known})
    task, data = config.detection, open_targets(config.loader, "boxes")
    backbone = create_model(config.model.arch, num_classes=0, in_chans=task.channels)
    network = build_detector(task, backbone, len(data.classes)).eval()
    network.load_state_dict(load_checkpoint(newest)["detector"])
    last = data.val.num_samples - 1
    samples = np.unique(np.linspace(0, last, min(count, last + 1)).astype(np.int64))
    loader = LoaderConfig(num_workers=0, bands=config.loader.bands)
    with torch.inference_mode():
        views = one_pass(data.val, loader, EvalTransform(task), samples)
        found = [(v, detected(network, task, v, torch.device("cpu"))) for _, v in views]
    return [_small(view, detections) for view, detections in found], data.classes


def _small(view: View, found: Detections) -> tuple[Pixels, Shown, Shown]:
    """At the size of a picture."""
    target = view.target
    sure = np.flatnonzero(found.scores >= SHOWN_FROM)
    masks = None if found.masks is None else [found.masks[number] for number in sure]
    shapes = None if found.masks is None else target.segmentation
    return (
        resized(view.image, *fitted(view.size, SIDE, SIDE)),
        _shown(view, target.boxes, target.labels, shapes),
        _shown(view, found.boxes[sure], found.labels[sure], masks),
    )


def _shown(
    view: View,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: list[RunLengths] | None,
) -> Shown:
    sides = fitted(view.size, SIDE, SIDE)
    classes = None
    if masks is not None:
        classes = np.full(sides, NO_CLASS, np.int64)
        shapes = nearest(decoded(masks, *view.size), *sides, 0, 0)
        for shape, label in zip(shapes[::-1], labels[::-1], strict=True):  # the surest on top
            classes[shape > 0] = label
    return Shown(scaled(boxes, view.size, sides), labels, classes)
