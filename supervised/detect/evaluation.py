"""Evaluation of detectors: average precision over the validation images, and its place in
``results.json``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from xcit_dino.errors import InputError
from xcit_dino.eval.features import eval_mode
from xcit_dino.eval.results import write_result
from xcit_dino.supervised.detect.coco import Detections, Scores, coco_scores
from xcit_dino.supervised.detect.config import DetectConfig, DetectionConfig
from xcit_dino.supervised.detect.data import EvalTransform, View, scaled, to_network
from xcit_dino.supervised.detect.masks import encoded
from xcit_dino.supervised.detect.network import Detector
from xcit_dino.supervised.targets import TaskEvaluation
from xcit_dino.train.distributed import dist


def detected(
    model: Detector, task: DetectionConfig, view: View, device: torch.device
) -> Detections:
    """What a network in evaluation mode finds in an image, the highest score first."""
    (found,) = model([to_network(view.image, task, device)])
    boxes, labels, scores = (found[name].cpu() for name in ("boxes", "labels", "scores"))
    boxes = torch.from_numpy(scaled(boxes.numpy(), view.image.shape[:2], view.size))
    masks = None
    if task.masks:
        # one by one: a hundred masks of a large image would take gigabytes
        pairs = zip(found["masks"].cpu(), boxes, strict=True)
        pasted = (paste_masks_in_image(m[None], b[None], view.size)[0] for m, b in pairs)
        masks = [shape for mask in pasted for shape in encoded(mask.numpy() >= 0.5)]
    return Detections(boxes.numpy(), labels.numpy() - 1, scores.numpy(), masks)


@dataclass(frozen=True)
class DetectEvaluation(TaskEvaluation):
    """Detections in the validation images, whole and one by one."""

    config: DetectConfig
    model: Detector

    def metrics(self, scores: Scores) -> dict[str, float]:
        return scores.metrics

    def measure(self) -> Scores:
        """COCO's metrics over the validation images, on all ranks together.

        Raises:
            InputError: no validation image has an object.
        """
        task, truth, found = self.config.detection, {}, {}
        with dist.together(), eval_mode(self.model), torch.inference_mode():
            for sample, view in self.views(EvalTransform(task)):
                truth[sample] = view.target
                found[sample] = detected(self.model, task, view, self.world.device)
        parts: list[Any] = [None] * self.world.size
        if self.world.size == 1:
            parts = [(truth, found)]
        else:
            torch.distributed.all_gather_object(parts, (truth, found))
        if not any(len(target) for part in parts for target in part[0].values()):
            raise InputError(f"--data_path {self.data.val.root}: no image of it has an object")
        return dist.from_main(lambda: self._scores(parts))

    def _scores(self, parts: list[Any]) -> Scores:
        truth, found = ({n: x for part in parts for n, x in part[side].items()} for side in (0, 1))
        boxes = replace(coco_scores(truth, found, self.data.classes), images=len(truth))
        if not self.config.detection.masks:
            return boxes
        return boxes.with_masks(coco_scores(truth, found, self.data.classes, masks=True))

    def record(self, scores: Scores, facts: dict[str, Any], checkpoint: Path) -> None:
        """Print the scores and write ``detect`` to ``results.json``."""
        task = self.config.detection
        protocol = self.protocol(facts, checkpoint, scores.images) | {
            "detector": "Mask R-CNN" if task.masks else "Faster R-CNN",
            "backbone": "finetuned" if task.finetune else "frozen",
            "resize": task.eval_side,
            "long_side": task.long_side,
        }
        shown = "  ".join(f"{key} {value:.2f}" for key, value in scores.metrics.items())
        print(f"detect: {shown}", flush=True)
        for name, values in scores.by_class.items():
            shown = "  ".join(f"{key} {value:6.2f}" for key, value in values.items())
            print(f"  {name:<24} {shown}", flush=True)
        absent = [name for name in self.data.classes if name not in scores.by_class]
        if absent:
            print(f"  {len(absent)} classes have no object there: {', '.join(absent[:6])}"
                  + (" ..." if len(absent) > 6 else ""), flush=True)  # fmt: skip
        write_result(
            self.config.run.output_dir, "detect", scores.metrics, protocol,
            weights_file=checkpoint.name, by_class=scores.by_class, absent_classes=len(absent),
        )  # fmt: skip
