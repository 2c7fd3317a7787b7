"""Several labels or values an image, as a table of all images of a split."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.formats import check_target, decode_target
from xcit_dino.errors import InputError

CHUNK = 4096  # images read at a time


def target_table(index: ShardIndex, config: LoaderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(Targets [N, C], bool [N]: whether they are known). Of labels uint8, 1 where an image has
    one; of values float64.

    Raises:
        InputError: the shards hold no such targets.
    """
    count = len(index.target_classes or ())
    if index.targets not in ("labels", "values") or not count:
        raise InputError(
            f"--data_path {index.root}: its images have no lists of labels or values; pack them "
            "with: xcit-dino shards make SRC DST --multi_labels FILE"
        )
    table = np.zeros((index.num_samples, count), np.uint8 if index.targets == "labels" else float)
    known = np.zeros(index.num_samples, bool)
    source = open_source(index, config)
    for first in range(0, index.num_samples, CHUNK):
        samples = range(first, min(first + CHUNK, index.num_samples))
        places = [index.locate_target(sample) for sample in samples]
        for sample, raw in zip(samples, source.read_many(places), strict=True):
            if isinstance(raw, bytes) and raw:
                with suppress(BadImage):  # counted as unreadable
                    target: Any = decode_target(index.targets, raw)
                    check_target(target, 0, 0, count)
                    if index.targets == "labels":
                        table[sample, target] = 1
                    else:
                        table[sample] = target
                    known[sample] = True
    return table, known
