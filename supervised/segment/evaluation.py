"""Evaluation of segmentation: sliding windows, mean intersection over union, and its place in
``results.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.packed import to_device
from xcit_dino.errors import InputError
from xcit_dino.eval.features import eval_mode
from xcit_dino.eval.results import write_result
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.data import IGNORED, Scene, SceneTransform
from xcit_dino.supervised.segment.heads import resized
from xcit_dino.supervised.segment.network import Segmenter
from xcit_dino.supervised.targets import TaskEvaluation
from xcit_dino.train.distributed import dist

CHUNK = 8  # windows in a forward pass


@dataclass(frozen=True)
class Scores:
    """Metrics of a confusion matrix, in percent."""

    miou: float
    """Mean intersection over union of the classes that occur in masks or predictions."""
    pixel_accuracy: float
    mean_accuracy: float
    """Mean share of a class's pixels that are found, over the classes that occur in masks."""
    iou: NDArray[np.float64]
    """[C]; NaN for classes that occur nowhere."""
    images: int = 0
    """That could be read."""

    @property
    def metrics(self) -> dict[str, float]:
        """For ``results.json`` and the log."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
        }


def scores_of(confusion: NDArray[np.int64], images: int = 0) -> Scores:
    """Scores of a confusion matrix [C, C]: rows are the masks' classes, columns the predicted."""
    matrix = confusion.astype(np.float64)
    right, truth = np.diag(matrix), matrix.sum(1)
    union = truth + matrix.sum(0) - right
    with np.errstate(divide="ignore", invalid="ignore"):
        iou, recall = 100 * right / union, 100 * right / truth
    total = max(matrix.sum(), 1)
    return Scores(
        float(np.nanmean(iou)),
        float(100 * right.sum() / total),
        float(np.nanmean(recall)),
        iou,
        images,
    )


def confusion_of(mask: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [C, C] of two masks of one shape; pixels that are IGNORED do not count."""
    counts = mask != IGNORED
    cells = mask[counts] * classes + predicted[counts]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Places of windows that cover a side, the last one at its end (mmseg ``slide_inference``)."""
    count = max(-(-(length - window) // stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


@dataclass(frozen=True)
class Predictor:
    """Predicts masks of whole images with a network in evaluation mode."""

    model: Segmenter
    config: SegmentConfig
    device: torch.device

    def __call__(self, scene: Scene) -> list[Tensor]:
        """Class numbers [H', W'], of the mask's size, by every head of the grid."""
        return [
            resized(logits[None], scene.mask.shape)[0].argmax(0) for logits in self.logits(scene)
        ]

    def logits(self, scene: Scene) -> list[Tensor]:
        """Mean logits [C, H, W] over the windows, by every head."""
        task = self.config.segmentation
        image = to_device(torch.from_numpy(scene.image), self.device).permute(2, 0, 1)[None]
        image = normalize(image, *task.normalization, *task.window_bounds)
        height, width = image.shape[-2:]
        size = task.crop_size
        image = torch.nn.functional.pad(
            image, (0, max(size - width, 0), 0, max(size - height, 0))
        )  # with the mean color, as in training
        stride = max(1, round(size * task.stride))
        rows, columns = image.shape[-2:]
        places = [
            (top, left)
            for top in window_starts(rows, size, stride)
            for left in window_starts(columns, size, stride)
        ]
        windows = torch.cat([image[..., y : y + size, x : x + size] for y, x in places])
        parts = [self.model(chunk) for chunk in windows.split(CHUNK)]
        return [
            self._assembled(torch.cat(head), places, (rows, columns))[:, :height, :width]
            for head in zip(*parts, strict=True)
        ]

    def _assembled(
        self, logits: Tensor, places: list[tuple[int, int]], sides: tuple[int, int]
    ) -> Tensor:
        """Logits of windows -> their mean over the image, [C, rows, columns]."""
        size = self.config.segmentation.crop_size
        total = logits.new_zeros(logits.shape[1], *sides, dtype=torch.float32)
        count = logits.new_zeros(sides, dtype=torch.float32)
        for (top, left), window in zip(places, logits, strict=True):
            at = (slice(top, top + size), slice(left, left + size))
            total[:, at[0], at[1]] += resized(window[None].float(), (size, size))[0]
            count[at] += 1
        return total / count


@dataclass(frozen=True)
class SegmentEvaluation(TaskEvaluation):
    """Sliding windows over the validation images."""

    config: SegmentConfig
    model: Segmenter

    def metrics(self, scores: list[Scores]) -> dict[str, float]:
        """Of the best head."""
        return scores[best_of(scores)].metrics

    def measure(self) -> list[Scores]:
        """Scores of every head of the grid over the validation images, on all ranks together."""
        classes, task = len(self.data.classes), self.config.segmentation
        heads = len(self.config.optim.lrs) if task.head == "linear" else 1
        totals = torch.zeros(heads, classes, classes, dtype=torch.int64)
        images = 0
        predict = Predictor(self.model, self.config, self.world.device)
        with dist.together(), eval_mode(self.model), torch.inference_mode():
            for _, scene in self.views(SceneTransform(task)):
                images += 1
                mask = to_device(torch.from_numpy(scene.mask.astype(np.int64)), self.world.device)
                for total, predicted in zip(totals, predict(scene), strict=True):
                    total += confusion_of(mask, predicted, classes).cpu()
        totals = totals.to(self.world.device)
        if self.world.size > 1:
            torch.distributed.all_reduce(totals)
        if not totals.any():
            raise InputError(f"--data_path {self.data.val.root}: no pixel of it counts")
        images = sum(dist.on_all_ranks(torch.tensor([images])).flatten().tolist())
        return [scores_of(total, images) for total in totals.cpu().numpy()]

    def record(self, scores: list[Scores], facts: dict[str, Any], checkpoint: Path) -> None:
        """Print the scores and write ``segment`` to ``results.json``."""
        task, best = self.config.segmentation, best_of(scores)
        protocol = self.protocol(facts, checkpoint, scores[best].images) | {
            "head": task.head,
            "backbone": "finetuned" if task.finetune else "frozen",
            "resize": task.short_side,
            "crop": task.crop_size,
            "stride": task.stride,
        }
        more: dict[str, Any] = {}
        if task.head == "linear":
            protocol["chosen_on"] = "the validation images, as in DINOv2"
            rates = zip(self.config.optim.lrs, scores, strict=True)
            more["grid"] = [{"lr": lr, **found.metrics} for lr, found in rates]
            more["chosen"] = {"lr": self.config.optim.lrs[best], "head": best}
        found = scores[best]
        named = zip(self.data.classes, found.iou.tolist(), strict=True)
        more["iou"] = {name: round(iou, 4) for name, iou in named if iou == iou}
        shown = "  ".join(f"{key} {value:.2f}" for key, value in found.metrics.items())
        print(f"segment: {shown}", flush=True)
        for name, iou in more["iou"].items():
            print(f"  {name:<24} {iou:6.2f}", flush=True)
        write_result(
            self.config.run.output_dir, "segment", found.metrics, protocol,
            weights_file=checkpoint.name, **more,
        )  # fmt: skip


def best_of(scores: list[Scores]) -> int:
    """The head of the highest mean IoU, the first of equals."""
    return max(range(len(scores)), key=lambda number: (scores[number].miou, -number))
