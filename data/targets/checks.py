"""Whether the images of shards have what a command needs beside them, or labels; free of torch."""

from __future__ import annotations

import numpy as np

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError

SEVERAL = ("labels", "values")  # kinds of targets in place of one label


def require_targets(index: ShardIndex, kind: str | None = None) -> None:
    """Refuse shards without targets, or with targets of another kind.

    Raises:
        InputError: names the option that packs them.
    """
    if index.targets is None or (kind and index.targets != kind):
        wanted = kind or "mask"
        options = "--masks FOLDER" if wanted == "mask" else "--boxes FILE_OR_FOLDER"
        has = f"{index.targets}, not {wanted}" if index.targets else "neither masks nor boxes"
        raise InputError(
            f"--data_path {index.root}: its images have {has}; pack them with: "
            f"xcit-dino shards make SRC DST {options}"
        )


def check_labels(index: ShardIndex) -> None:
    """Check that there are labels; single images without one count as unreadable.

    Raises:
        InputError: no image has one, or there are no images.
    """
    if not index.num_samples:
        raise InputError(f"--data_path {index.root}: holds no images")
    if index.targets in SEVERAL and (np.asarray(index.labels) < 0).all():
        what = "several labels" if index.targets == "labels" else "values"
        raise InputError(
            f"--data_path {index.root}: the images have {what}, which are for `xcit-dino knn`, "
            "`linear` and `evaluate` alone; pack them with one label each (--labels) for this "
            "command"
        )
    if (np.asarray(index.labels) < 0).all():
        raise InputError(
            f"--data_path {index.root}: the images have no labels, which an accuracy needs; "
            "pack class sub-folders or a list of path,label with: xcit-dino shards make SRC DST"
        )
