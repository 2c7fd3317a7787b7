"""Masks that a finished segmentation run predicts, for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.targets.loader import one_pass
from xcit_dino.data.targets.transforms import resized
from xcit_dino.errors import InputError
from xcit_dino.models.zoo import create_model
from xcit_dino.options import option_types, replace
from xcit_dino.provenance import read_results
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.data import SceneTransform
from xcit_dino.supervised.segment.evaluation import Predictor
from xcit_dino.supervised.segment.network import build_segmenter
from xcit_dino.supervised.targets import open_targets
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

Shown = tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]
SIDE = 256  # of pictures, in pixels


def predicted_masks(
    folder: Path, run: Mapping[str, Any], count: int
) -> tuple[list[Shown], list[str]]:
    """(photo [H, W, 3], its mask, the predicted mask, [H, W] each) of evenly spaced validation
    images, and the names of the classes.

    run: options of the run's ``config.yaml``.

    Raises:
        InputError: no checkpoint, or no shards.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise InputError("no whole checkpoint in the run folder")
    known = option_types(SegmentConfig)
    config = replace(SegmentConfig(), {k: v for k, v in run.items() if k in known})
    channels = config.segmentation.channels
    data = open_targets(config.loader, "mask")
    backbone = create_model(config.model.arch, num_classes=0, in_chans=channels)
    network = build_segmenter(config, backbone, len(data.classes))
    network.load_state_dict(load_checkpoint(newest)["segmenter"])
    best = read_results(folder).get("segment", {}).get("chosen", {}).get("head", 0)
    predict = Predictor(network.eval(), config, torch.device("cpu"))
    last = data.val.num_samples - 1
    samples = np.unique(np.linspace(0, last, min(count, last + 1)).astype(np.int64))
    transform, shown = SceneTransform(config.segmentation), []
    loader = LoaderConfig(num_workers=0, bands=config.loader.bands)
    with torch.inference_mode():
        for _, scene in one_pass(data.val, loader, transform, samples):
            guess = predict(scene)[best].numpy().astype(np.uint16)
            shown.append(_small(scene.image, scene.mask, guess))
    return shown, data.classes


def _small(image: NDArray[np.uint8], mask: NDArray[np.uint16], guess: NDArray[np.uint16]) -> Shown:
    """The three at one size, the longer side at most SIDE."""
    factor = min(1.0, SIDE / max(image.shape[:2]))
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    y = np.arange(height) * mask.shape[0] // height
    x = np.arange(width) * mask.shape[1] // width
    return resized(image, height, width), mask[y[:, None], x], guess[y[:, None], x]
