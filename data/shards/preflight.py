"""Preflight of a planned run on given shards: steps per epoch, workers and storage it needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xcit_dino.cores import usable_cores
from xcit_dino.data.shards.config import CheckConfig
from xcit_dino.data.shards.verify import Finding

CROP_SECONDS = 1.2e-3  # cropping 2x224 + 10x96 on one core: bench/crops.py, "crops alone"


def preflight(
    num_samples: int, mean_bytes: int, finding: Finding, config: CheckConfig
) -> Iterator[str]:
    """Lines on a run of ``nodes x gpus``: steps per epoch, dropped samples, what starves its GPUs.

    Args:
        num_samples: images of the training split.
        mean_bytes: mean size of an encoded image.
        finding: gives the measured decoding speed.
        config: the planned run.
    """
    nodes, gpus, per_gpu = config.nodes or 1, config.gpus or 1, config.batch_size_per_gpu
    batch = nodes * gpus * per_gpu
    steps, dropped = divmod(num_samples, batch)
    layout = f"nodes x GPUs x images: {nodes} x {gpus} x {per_gpu}, a global batch of {batch:,}"
    if not steps:
        yield (
            f"{layout}\n  STARVES: {num_samples:,} samples are fewer than one global batch; take "
            f"at most {max(num_samples // per_gpu, 1)} GPUs in all or --batch_size_per_gpu "
            f"{max(num_samples // (nodes * gpus), 1)}"
        )
        return
    yield (
        f"{layout}, {steps:,} steps per epoch on every rank, {dropped:,} samples dropped "
        f"({dropped / num_samples:.2%}, other ones every epoch)"
    )
    workers = max(config.workers, 1)
    if finding.decoded:
        seconds = finding.seconds / finding.decoded + CROP_SECONDS
        yield (
            f"  {workers} workers feed a GPU about {workers / seconds:,.0f} images/s (estimate: "
            f"decoding as measured here, and {CROP_SECONDS * 1e3:.1f} ms for 2x224 + 10x96 crops)"
        )
        yield from _speed(workers, seconds, mean_bytes, config, gpus)
    if gpus * workers > usable_cores():
        yield f"  a node needs {gpus * workers} cores for that; this machine has {usable_cores()}"


def _speed(
    workers: int, seconds: float, mean_bytes: int, config: CheckConfig, gpus: int
) -> Iterator[str]:
    """Storage bandwidth and workers that ``--images_per_second`` needs."""
    if (rate := config.images_per_second) is None:
        return
    storage = rate * gpus * mean_bytes / 1e6
    yield f"  at {rate:,.0f} images/s a GPU, storage must give a node {storage:,.1f} MB/s"
    if workers / seconds < rate:
        yield (
            f"  STARVES: {workers} workers are too few for that; "
            f"--num_workers {int(np.ceil(rate * seconds))} would do"
        )
