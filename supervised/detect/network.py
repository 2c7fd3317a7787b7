"""torchvision's Faster R-CNN and Mask R-CNN on a backbone's pyramid.

Torchvision's are the feature pyramid, the region proposals, the box and mask heads, their losses
and their settings. Ours: images come resized and normalized; which anchors and proposals an image
is trained on depends on (seed, epoch, sample) alone; coordinates stay float32 under autocast.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from xcit_dino.models.dense import (
    TappedBackbone,
    freeze_unused,
    map_sizes,
    pyramid_of,
    pyramid_taps,
)
from xcit_dino.supervised.detect.config import DetectionConfig

SIDE = 64  # of the images with which the maps' sizes are found
REPRESENTATION = 1024  # features of a proposal, torchvision's
MASK_DIM = 256  # channels of the mask head, torchvision's
RATIOS = (0.5, 1.0, 2.0)  # of the anchors' sides, torchvision's
Target = dict[str, Tensor]
"""``boxes`` [n, 4], ``labels`` [n] from 1 on, ``masks`` [n, H, W]; of detections ``scores``
[n] too, and their masks are [n, 1, 28, 28] of the box, from 0 to 1."""


class FeaturePyramid(TappedBackbone):
    """Images (B, C, H, W) -> float32 maps of strides 4, 8, 16, 32 and 64.

    dims: channels of the backbone's maps; out_channels: of all maps returned.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taps: Sequence[int],
        frozen: bool,
        pyramid: nn.Module,
        dims: list[int],
        out_channels: int,
    ) -> None:
        super().__init__(backbone, taps, frozen, pyramid)
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(dims, out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict((str(level), x) for level, x in enumerate(self.maps(images)))
        return OrderedDict((name, x.float()) for name, x in self.fpn(maps).items())


class Batching(GeneralizedRCNNTransform):
    """Pads the images of a batch to one size, a multiple of 32, with the mean color."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        return image, target

    def postprocess(
        self, result: list[Target], image_shapes: object, original_image_sizes: object
    ) -> list[Target]:
        return result


class Float32RPNHead(RPNHead):
    """Offsets in float32: anchors take their type, and bf16 has no pixel above 256."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, offsets = super().forward(x)
        return [score.float() for score in scores], [offset.float() for offset in offsets]


class Float32Predictor(FastRCNNPredictor):
    """See :class:`Float32RPNHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()


class KeyedSampler(BalancedPositiveNegativeSampler):
    """Samples each image's anchors or proposals by its own key."""

    keys: Sequence[int] = ()
    """One an image of the next batch."""
    drawn: Tensor
    """How many were sampled of the last batch, fewer than wanted where an image has fewer."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sampled: list[tuple[list[Tensor], list[Tensor]]] = []
        device = matched_idxs[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for key, image in zip(self.keys, matched_idxs, strict=True):
                torch.manual_seed(key)
                sampled.append(super().__call__([image]))
        positive, negative = ([pair[side][0] for pair in sampled] for side in (0, 1))
        self.drawn = torch.cat(positive + negative).sum()
        return positive, negative

    def share(self) -> Tensor:
        """Of the samples that the last batch should have had. Torchvision's losses are means over
        the samples of a batch; times this, the divisor is the same of any images, so that the mean
        over processes and micro-batches is that of the whole batch."""
        return self.drawn / (self.batch_size_per_image * len(self.keys))


class Detector(nn.Module):
    """Faster or Mask R-CNN; in training mode losses, else detections."""

    def __init__(self, backbone: FeaturePyramid, task: DetectionConfig, classes: int) -> None:
        super().__init__()
        anchors = AnchorGenerator(
            tuple((size,) for size in task.anchor_sizes), (RATIOS,) * len(task.anchor_sizes)
        )
        parts: dict[str, Any] = {
            "rpn_anchor_generator": anchors,
            "rpn_head": Float32RPNHead(backbone.out_channels, len(RATIOS)),
            "box_predictor": Float32Predictor(REPRESENTATION, classes + 1),
            "box_batch_size_per_image": task.roi_samples,
        }
        if task.masks:
            predictor = MaskRCNNPredictor(MASK_DIM, MASK_DIM, classes + 1)
            self.rcnn: FasterRCNN = MaskRCNN(backbone, mask_predictor=predictor, **parts)
        else:
            self.rcnn = FasterRCNN(backbone, **parts)
        self.rcnn.transform = Batching(0, 0, [], [])
        rpn, roi_heads = cast(Any, self.rcnn.rpn), cast(Any, self.rcnn.roi_heads)
        self.samplers = [
            KeyedSampler(old.batch_size_per_image, old.positive_fraction)
            for old in (rpn.fg_bg_sampler, roi_heads.fg_bg_sampler)
        ]
        rpn.fg_bg_sampler, roi_heads.fg_bg_sampler = self.samplers

    def forward(
        self,
        images: list[Tensor],
        targets: list[Target] | None = None,
        keys: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Tensor] | list[Target]:
        """Normalized images [C, H, W] of any sizes -> their detections, or in training mode the
        losses; keys: two seeds an image, of its anchors and its proposals."""
        for number, sampler in enumerate(self.samplers):
            sampler.keys = [pair[number] for pair in keys]
        found = self.rcnn(images, targets)
        if not self.training:
            return found
        rpn, box = (sampler.share() for sampler in self.samplers)
        shares = {"loss_objectness": rpn, "loss_rpn_box_reg": rpn, "loss_mask": 1.0}
        return {name: loss * shares.get(name, box) for name, loss in found.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions exempt from weight decay."""
        spared = cast(FeaturePyramid, self.rcnn.backbone).no_weight_decay()
        return {f"rcnn.backbone.{name}" for name in spared}


def build_detector(task: DetectionConfig, backbone: nn.Module, classes: int) -> Detector:
    """A network with new heads.

    Raises:
        InputError: the backbone has no such layers, or takes images of one size only.
    """
    taps = task.taps or pyramid_taps(backbone)
    sizes = map_sizes(backbone, taps, SIDE, task.channels)
    pyramid, dims = pyramid_of(sizes), [dim for dim, _ in sizes]
    features = FeaturePyramid(backbone, taps, not task.finetune, pyramid, dims, task.fpn_dim)
    network = Detector(features, task, classes)
    if task.finetune:
        freeze_unused(network, lambda trial: trial_loss(trial, task.channels))
    return network


def trial_loss(network: nn.Module, channels: int) -> Tensor:
    """The loss of an empty image with one box."""
    weight = next(network.parameters())
    target = {
        "boxes": weight.new_tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.ones(1, dtype=torch.int64, device=weight.device),
        "masks": torch.ones(1, SIDE, SIDE, dtype=torch.uint8, device=weight.device),
    }
    images = [weight.new_zeros(channels, SIDE, SIDE)] * 2
    return torch.stack(list(network(images, [target] * 2, [(0, 0)] * 2).values())).sum()
