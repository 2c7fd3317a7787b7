"""Labels in the ``metadata.csv`` of Hugging Face's ImageFolder, which lies beside the images."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from xcit_dino.data.columns.arrow import open_schema
from xcit_dino.data.pack.labels import Place, by_name
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.tables import LABEL_COLUMNS, first_row, normalized, read_text

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
KEY = "file_name"  # the column that makes it one (datasets, "Create an image dataset")


def metadata_labels(
    listing: Listing, src: Path | None, label_column: str | None
) -> dict[Place, str] | None:
    """Labels of the images that such files name; None: there are none.

    A label is what a column of a usual name holds (``label``, ``class`` ...), or ``label_column``:
    captions, boxes and the like are none. Paths count from the folder of the file.

    Raises:
        InputError: the file is unreadable, or does not fit the images.
    """
    found: dict[Place, str] = {}
    files = [name for name in listing.tables if PurePosixPath(name).name.lower() in NAMES]
    for name in files if src is not None and src.is_dir() else []:
        assert src is not None
        heads = _heads(src / name)
        if KEY not in normalized(heads):
            continue
        listing.tables.remove(name)
        if label_column is None and not set(normalized(heads)) & set(LABEL_COLUMNS):
            others = [head for head in heads if normalized([head]) != [KEY]]
            if others:
                listing.notes.append(
                    f"{name} has no column called label; not read: {', '.join(others[:4])} "
                    "(--label_column takes one)"
                )
            continue
        above = name.removesuffix(PurePosixPath(name).name)
        images = [
            image._replace(name=image.name.removeprefix(above))
            for image in listing.images
            if image.name.startswith(above)
        ]
        found |= by_name(images, src / name, label_column, listing.notes)
        listing.notes.append(f"labels are those of {name}")
    return found or None


def _heads(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return list(open_schema(path).names)
    if suffix == ".csv":
        return first_row(path)
    try:
        row = json.loads(read_text(path).partition("\n")[0])
    except (ValueError, RecursionError):
        return []
    return list(row) if isinstance(row, dict) else []
