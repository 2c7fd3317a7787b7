"""Label propagation: the objects of a video's first frame, followed by features alone.

DINO ``eval_video_segmentation.py``, after Jabri et al. (arXiv 2006.14613): each patch of a frame
takes the labels of its most similar patches in the first frame and the frames before it, within a
window around its own place. Nothing is trained.

Shape suffixes: H W rows and columns of patches, D features, C labels (0 is the background),
N frames, Q patches that look for similar ones, K patches among which they look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xcit_dino.eval.video.config import LabelPropagation

TILE = 16  # patches to a side for which similar ones are searched for at a time
Mask = NDArray[np.uint8]


def propagate(
    features: Iterable[Tensor], first: Tensor, options: LabelPropagation
) -> Iterator[Tensor]:
    """Yield the soft labels of every frame after the first.

    Holds the features and labels of ``n_last_frames`` + 2 frames, however long the video.

    Args:
        features: float [H, W, D] of every frame in order, the first included.
        first: float [C, H, W], labels of the first frame's patches.

    Yields:
        float [C, H, W], summing to 1 over the labels.
    """
    stream = iter(features)
    start = F.normalize(next(stream), dim=-1), first
    before = deque[tuple[Tensor, Tensor]](maxlen=options.n_last_frames)
    for feature in stream:
        feature = F.normalize(feature, dim=-1)
        context_NHWD, labels_NCHW = map(torch.stack, zip(start, *before, strict=True))
        labels = next_labels(feature, context_NHWD, labels_NCHW, options)
        before.append((feature, labels))
        yield labels


def next_labels(
    feature_HWD: Tensor, context_NHWD: Tensor, labels_NCHW: Tensor, options: LabelPropagation
) -> Tensor:
    """Labels (C, H, W) of one frame from those of the frames before it; features of length 1.

    The frame is cut into tiles, each of which sees only what lies in the windows of its patches:
    the result is that of the whole matrix of similarities, which would take gigabytes.
    """
    H, W, _ = feature_HWD.shape
    reach = options.size_mask_neighborhood or max(H, W)
    result = torch.empty_like(labels_NCHW[0])
    for rows in _tiles(H):
        for columns in _tiles(W):
            near = _around(rows, reach, H), _around(columns, reach, W)
            apart = (
                _apart(rows, near[0], reach)[:, None, :, None]
                | _apart(columns, near[1], reach)[None, :, None, :]
            )  # beyond the window: tile's rows, columns, context's rows, columns
            outside_QK = apart.flatten(2).flatten(0, 1).repeat(1, len(context_NHWD))
            keys_KD = context_NHWD[:, near[0], near[1]].flatten(0, 2)
            values_KC = labels_NCHW[:, :, near[0], near[1]].permute(0, 2, 3, 1).flatten(0, 2)
            queries_QD = feature_HWD[rows, columns].flatten(0, 1)
            cosine_QK = queries_QD @ keys_KD.T
            cosine_QK = cosine_QK.masked_fill(outside_QK.to(cosine_QK.device), -torch.inf)
            labels_QC = weights(cosine_QK, options) @ values_KC
            tile = result[:, rows, columns]
            tile.copy_(labels_QC.T.unflatten(1, tile.shape[1:]))
    return result


def weights(cosine_QK: Tensor, options: LabelPropagation) -> Tensor:
    """Weights (Q, K) that sum to 1 over K: exp(cosine / T) of the ``topk`` largest, and of those
    equal to the last of them, as in DINO; 0 elsewhere."""
    last = cosine_QK.topk(min(options.topk, cosine_QK.shape[1]), dim=1).values[:, -1:]
    found = (cosine_QK / options.temperature).exp().masked_fill(cosine_QK < last, 0)
    return found / found.sum(1, keepdim=True)


def _tiles(length: int) -> list[slice]:
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def _around(part: slice, reach: int, length: int) -> slice:
    return slice(max(0, part.start - reach), min(length, part.stop + reach))


def _apart(part: slice, near: slice, reach: int) -> Tensor:
    """Which of two ranges of places are more than ``reach`` apart: bool, one row per place of
    ``part``."""
    ours, theirs = (torch.arange(each.start, each.stop) for each in (part, near))
    return (ours[:, None] - theirs).abs() > reach


# -- between masks and the labels of patches


def patch_labels(mask: Mask, labels: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Labels float (C, H, W) of patches from a mask of pixels: of the pixel in a patch's middle.

    Args:
        mask: [height, width].
        labels: [C], the mask's numbers, ascending.
        size: H, W.
    """
    small = np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return torch.from_numpy(small[None] == labels[:, None, None]).float()


def pixel_labels(
    soft_CHW: Tensor, labels: NDArray[np.uint8], network: tuple[int, int], frame: tuple[int, int]
) -> Mask:
    """A mask [*frame] from the soft labels of patches: enlarged bilinearly to the size that the
    network saw, each label scaled to [0, 1] over the frame, the largest at each pixel, which is
    repeated in the frame's own size."""
    large = F.interpolate(soft_CHW[None], size=network, mode="bilinear", align_corners=False)[0]
    least, most = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    # a label that is everywhere the same stays as it is (0 / 0 in DINO)
    scaled = torch.where(most > least, (large - least) / (most - least), large)
    mask = labels[scaled.argmax(0).cpu().numpy()]
    return np.asarray(Image.fromarray(mask).resize((frame[1], frame[0]), Image.Resampling.NEAREST))
