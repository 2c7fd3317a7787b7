"""``xcit-dino propagate``: DAVIS 2017 label propagation (DINO ``eval_video_segmentation.py``) with
the features of any backbone, and J, F and J&F where there are masks to compare with.

``RUN/propagate/NETWORK-DIGEST/masks/VIDEO/FRAME.png``: predicted masks, indexed, in the layout that
DAVIS's own evaluation reads; ``.../overlays/VIDEO/``: some of them over their frames. DIGEST is
that of the protocol: a video that an interrupted command has finished is not propagated again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xcit_dino.errors import InputError, warn
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures.false_color import picture
from xcit_dino.eval.pictures.media import resized
from xcit_dino.eval.ranges import OutputRange, refuse_nonfinite, warn_constant
from xcit_dino.eval.results import write_result
from xcit_dino.eval.target import resolve_without_shards
from xcit_dino.eval.video.config import PropagateConfig
from xcit_dino.eval.video.methods import Method, methods, network_size
from xcit_dino.eval.video.pictures import overlay, shown_frames, write_mask
from xcit_dino.eval.video.propagation import patch_labels, pixel_labels, propagate
from xcit_dino.eval.video.score import Scores, gathered, metrics_of, score
from xcit_dino.eval.video.videos import (
    BadVideo,
    Mask,
    Video,
    find_videos,
    is_whole,
    read_mask,
    read_pixels,
)
from xcit_dino.files import check_writable, unfinished_folder
from xcit_dino.inputs import BYTES
from xcit_dino.options import options
from xcit_dino.progress import track
from xcit_dino.provenance import digest
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

FOLDER = "propagate"


def run(config: PropagateConfig) -> None:
    """Propagate all videos, and write ``propagate`` (and ``propagate/random`` ...) to
    ``results.json`` where there are masks to compare with.

    Raises:
        InputError: no weights, or no video that can be used.
    """
    if config.videos is None:
        raise InputError("--videos: name the folder of DAVIS 2017, or a folder of frames")
    world = dist.init(config.device)
    check_writable(config.output_dir, "name another folder for the results")
    videos, unusable = find_videos(config.videos, config.masks)
    refuse_none(videos, unusable, config)
    target, context = resolve_without_shards(config, world)
    if context.inputs.channels > 3:
        context = replace(context, show_channels=(1, 2, 3))
    checksum = hashlib.sha256("".join(video.checksum() for video in videos).encode()).hexdigest()
    for method in methods(config, target, context):
        began = time.monotonic()
        protocol = protocol_of(config, method, context) | {"videos_checksum": checksum}
        folder = config.output_dir / FOLDER / f"{method.name}-{digest(protocol)}"
        task = Task(config, context, method, folder)
        scores, reasons = gathered(*task.all_videos(videos[world.rank :: world.size]))
        reasons |= unusable
        refuse_none(scores, reasons, config)
        if world.is_main:
            facts: dict[str, Any] = {"wall_seconds": round(time.monotonic() - began, 2)}
            if method.name == "pretrained":
                facts["weights_file"] = target.weights.name
            report(config, task, protocol, scores, reasons, facts)
    dist.barrier()


def refuse_none(usable: Any, reasons: dict[str, str], config: PropagateConfig) -> None:
    """Raise InputError with a reason where no video is left."""
    if not usable:
        name, reason = next(iter(reasons.items()))
        more = f"; {len(reasons) - 1} more cannot be used" if len(reasons) > 1 else ""
        raise InputError(f"--videos {config.videos}: {name}: {reason}{more}")


def protocol_of(config: PropagateConfig, method: Method, context: Context) -> dict[str, Any]:
    """Everything that affects the masks, apart from the videos."""
    inputs = context.inputs
    found = method.facts | dict(options(config.propagation)) | {"evaluation": "propagate"}
    found["tap"] = config.tap
    found |= {"image_size": config.image_size, "interpolation": "bicubic"}
    found |= {"mean": list(inputs.mean), "std": list(inputs.std), "precision": config.precision}
    if inputs.window != BYTES:
        found["window"] = [list(bounds) for bounds in inputs.window]
    return found


def report(
    config: PropagateConfig,
    task: Task,
    protocol: dict[str, Any],
    scores: dict[str, Scores],
    reasons: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Print what was found, and store the result if masks could be compared with."""
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}", flush=True)
    for name, found in scores.items():
        if found.late:
            numbers = ", ".join(map(str, found.late))
            print(f"{name}: objects that the first mask does not show are background: {numbers}")
    print(f"masks: {task.folder / 'masks'}", flush=True)
    scored = {name: found for name, found in scores.items() if found.objects}
    if not scored:
        print("no J and F: they need masks of three frames or more", flush=True)
        return
    metrics = metrics_of(list(scored.values()))
    shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
    print(f"propagate, {task.method.name}: {shown}", flush=True)
    counts = {
        "videos": len(scored),
        "objects": sum(len(found.objects) for found in scored.values()),
        "frames": sum(found.frames for found in scored.values()),
        "unusable_videos": len(reasons) + len(scores) - len(scored),
    }
    write_result(
        config.output_dir, f"propagate{task.method.suffix}", metrics, protocol | counts,
        masks=str(task.folder.relative_to(config.output_dir)),
        j_and_f_by_video={n: round(metrics_of([s])["j_and_f"], 2) for n, s in scored.items()},
        **facts,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Propagation of videos by one method, into one folder."""

    config: PropagateConfig
    context: Context
    method: Method
    folder: Path

    def all_videos(self, videos: list[Video]) -> tuple[dict[str, Scores], dict[str, str]]:
        """Scores by video, and of those that cannot be used the reasons.

        Raises:
            InputError: the network's outputs are not finite.
        """
        scores, reasons = dict[str, Scores](), dict[str, str]()
        seen = OutputRange(self.method.width, self.context.device)
        for video in track(videos, f"propagate {self.method.name}", len(videos), "videos"):
            try:
                scores[video.name] = self.one_video(video, seen)
            except BadVideo as reason:
                reasons[video.name] = str(reason)
        if seen.constant() and dist.is_main():
            warn_constant("features of patches")
        return scores, reasons

    def one_video(self, video: Video, seen: OutputRange) -> Scores:
        """Write the masks of a video, unless an earlier try has, and score them.

        Raises:
            BadVideo: it cannot be used.
        """
        whole = is_whole(video.masks[video.frames[0].stem])
        masks, overlays = (self.folder / kind / video.name for kind in ("masks", "overlays"))
        if not masks.is_dir():
            with unfinished_folder(overlays) as shown, unfinished_folder(masks) as folder:
                for number, (frame, mask) in enumerate(self.predicted(video, whole, seen)):
                    stem = video.frames[number].stem
                    write_mask(folder / f"{stem}.png", mask)
                    if number in shown_frames(video):
                        true = video.masks.get(stem)
                        contours = read_mask(true, mask.shape, whole) if true else None
                        photo = overlay(picture(frame, self.context), mask, contours)
                        Image.fromarray(photo).save(shown / f"{stem}.jpg", quality=90)
        return score(video, masks, whole)

    @torch.no_grad()
    def predicted(
        self, video: Video, whole: bool, seen: OutputRange
    ) -> Iterator[tuple[NDArray[Any], Mask]]:
        """Yield every frame with its mask; the first one's is the given one.

        Raises:
            BadVideo: a frame or the first mask cannot be used.
        """
        frames = read_pixels(video, self.context)
        first = next(frames)
        size = first.shape[0], first.shape[1]
        path = video.masks[video.frames[0].stem]
        mask = read_mask(path, size, whole)
        if not mask.any():
            raise BadVideo(f"mask {path.name} holds no object")
        yield first, mask
        if self.method.features is None:
            yield from ((frame, mask) for frame in frames)
            return
        network = network_size(size, self.config.image_size, self.method.multiple)
        latest = [first]

        def features() -> Iterator[Tensor]:
            for frame in chain([first], frames):
                latest[0] = frame
                yield self.features(frame, network, seen)

        stream = features()
        start = next(stream)
        labels = np.unique(np.append(mask, np.uint8(0)))
        soft = patch_labels(mask, labels, (start.shape[0], start.shape[1])).to(start.device)
        for lost in labels[~soft.flatten(1).any(1).cpu().numpy()]:
            warn(f"{video.name}: object {lost} is smaller than a patch and cannot be followed")
        for found in propagate(chain([start], stream), soft, self.config.propagation):
            yield latest[0], pixel_labels(found, labels, network, size)

    def features(self, frame: NDArray[Any], size: tuple[int, int], seen: OutputRange) -> Tensor:
        """Features (h, w, D) of a frame [H, W, C], resized to ``size``."""
        assert self.method.features is not None
        images = torch.tensor(resized(frame, *size)).permute(2, 0, 1)[None]
        dtype = resolve_precision(self.config.precision, self.context.device)
        with autocast(self.context.device, dtype):
            (found,) = self.method.features(self.context.normalize(images))
        refuse_nonfinite(float((~found.isfinite()).sum()))  # before the video counts as finished
        seen.add(found.float().flatten(0, 1))
        return found.float()
