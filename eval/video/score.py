"""J and F of every object of a video from files of masks, and their means over all objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed
from PIL import Image

from xcit_dino.eval.video.metrics import Mask, Statistics, contour_f, jaccard, statistics
from xcit_dino.eval.video.videos import Video, read_mask
from xcit_dino.train.distributed import dist

MEASURES: dict[str, Callable[[Mask, Mask], float]] = {"j": jaccard, "f": contour_f}


@dataclass(frozen=True)
class Scores:
    """Of one video."""

    objects: dict[int, dict[str, Statistics]]
    """Number of an object of the first mask -> J and F; empty where there is nothing to compare
    with."""
    frames: int
    """Compared with masks."""
    late: tuple[int, ...]
    """Objects of later masks that the first does not show; they count as background."""


def score(video: Video, predicted: Path, whole: bool) -> Scores:
    """Compare the masks of a folder with the video's own: of all frames that have one but the first
    and the last of them, as DAVIS does.

    Raises:
        BadVideo: a mask cannot be read, or has another size than its frame.
    """
    first = np.asarray(Image.open(predicted / f"{video.frames[0].stem}.png"))
    numbers = set(np.unique(first[first > 0]).tolist())
    values: dict[int, dict[str, list[float]]] = {n: {m: [] for m in MEASURES} for n in numbers}
    stems, late = list(video.masks)[1:-1], set[int]()
    for stem in stems:
        guess = np.asarray(Image.open(predicted / f"{stem}.png"))
        true = read_mask(video.masks[stem], (guess.shape[0], guess.shape[1]), whole)
        late |= set(np.unique(true[true > 0]).tolist()) - numbers
        for number, found in values.items():
            for name, measure in MEASURES.items():
                found[name].append(measure(guess == number, true == number))
    objects = {
        number: {name: statistics(found[name]) for name in MEASURES}
        for number, found in values.items()
        if stems
    }
    return Scores(objects, len(stems), tuple(sorted(late)))


def metrics_of(scores: Sequence[Scores]) -> dict[str, float]:
    """Means over all objects of all videos, in percent, under DAVIS's names."""
    objects = [one for video in scores for one in video.objects.values()]
    found = {
        f"{measure}_{part}": 100 * float(np.mean([getattr(one[measure], part) for one in objects]))
        for measure in MEASURES
        for part in Statistics._fields
    }
    return {"j_and_f": (found["j_mean"] + found["f_mean"]) / 2} | found


def gathered(
    scores: dict[str, Scores], reasons: dict[str, str]
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Those of all ranks, by name."""
    parts = [(scores, reasons)] * dist.world_size()
    if dist.world_size() > 1:
        torch.distributed.all_gather_object(parts, (scores, reasons))
    every = {name: found for part, _ in parts for name, found in part.items()}
    skipped = {name: reason for _, part in parts for name, reason in part.items()}
    return dict(sorted(every.items())), dict(sorted(skipped.items()))
