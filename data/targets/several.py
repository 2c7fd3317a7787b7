"""Several labels an image, as a table of all images of a split."""

from __future__ import annotations

import numpy as np

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.formats import decode_labels
from xcit_dino.errors import InputError

CHUNK = 4096  # images read at a time


def label_table(index: ShardIndex, config: LoaderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, C]: 1 where an image has a label; bool [N]: whether its labels are known).

    Raises:
        InputError: the shards hold no such labels.
    """
    classes = index.target_classes or []
    if index.targets != "labels" or not classes:
        raise InputError(
            f"--data_path {index.root}: its images have no lists of labels; pack them with: "
            "xcit-dino shards make SRC DST --multi_labels FILE"
        )
    table = np.zeros((index.num_samples, len(classes)), np.uint8)
    known = np.zeros(index.num_samples, bool)
    source = open_source(index, config)
    for first in range(0, index.num_samples, CHUNK):
        samples = range(first, min(first + CHUNK, index.num_samples))
        places = [index.locate_target(sample) for sample in samples]
        for sample, raw in zip(samples, source.read_many(places), strict=True):
            try:
                numbers = decode_labels(raw) if isinstance(raw, bytes) and raw else None
            except BadImage:
                continue  # counted as unreadable
            if numbers is not None and (not len(numbers) or numbers.max() < len(classes)):
                table[sample, numbers] = 1
                known[sample] = True
    return table, known
