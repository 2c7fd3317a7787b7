"""Parquet and Arrow files whose columns hold encoded images: their columns, and their rows.

Row groups are read one after the other and in small batches, so that no table is held whole.
Formats: Apache Parquet; Arrow IPC streams, as ``datasets.save_to_disk`` writes them, and files.
Hugging Face's types (``Image``, ``ClassLabel``) stand in the schema's metadata, as JSON.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xcit_dino.data.pack.tables import LABEL_COLUMNS, NAME_COLUMNS, normalized
from xcit_dino.errors import InputError, suggest

SUFFIXES = (".parquet", ".arrow")
BATCH = 64  # rows; images of a megabyte are common
PYARROW = "pip install 'xcit-dino[parquet]'"
KEYED = (*LABEL_COLUMNS, "cls")


class Columns(NamedTuple):
    """Which columns of a table are what."""

    image: str | None
    """None: no column holds images; the rows name files."""
    label: str | None
    classes: tuple[str, ...] | None
    """Names of the numbers in ``label``, if the schema has them (``ClassLabel``)."""
    others: tuple[str, ...]
    """Columns that are not read."""


def open_schema(path: Path) -> Any:
    """The schema of a file.

    Raises:
        InputError: it cannot be read, or pyarrow is missing.
    """
    with _opened(path) as (schema, _):
        if len(set(schema.names)) < len(schema.names):  # decodes them, too
            raise InputError(f"{path} has several columns of one name")
        return schema


def rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row.

    Raises:
        InputError: damaged.
    """
    with _opened(path) as (_, batches):
        for batch in batches(columns):
            batch.validate(full=True)  # damaged offsets would be followed anywhere
            values = [batch.column(name) for name in columns]
            for row in range(batch.num_rows):
                yield tuple(value[row].as_py() for value in values)


def cells(path: Path) -> list[list[str]]:
    """A table without images as text, the names of its columns first; lists and bytes are left out.

    Raises:
        InputError: it cannot be read.
    """
    schema = open_schema(path)
    names = [n for n in schema.names if _is_scalar(schema.field(n).type)]
    found = [["" if v is None else str(v).strip() for v in row] for row in rows(path, names)]
    return [names, *found]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[list[str]], Iterable[Any]]]]:
    """The schema of a file, and a function of column names that reads its batches."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading it needs pyarrow: {PYARROW}") from None
    try:
        with contextlib.ExitStack() as stack:
            yield (_parquet if path.suffix.lower() == ".parquet" else _ipc)(path, stack)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read: {why}") from None


def _parquet(path: Path, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    import pyarrow.parquet

    # Without a buffer size, the images of a whole row group would be read at once.
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    stack.callback(file.close)
    return file.schema_arrow, lambda names: file.iter_batches(BATCH, columns=names)


def _ipc(path: Path, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    import pyarrow

    file = stack.enter_context(pyarrow.memory_map(str(path)))
    try:
        stream = pyarrow.ipc.open_stream(file)
        return stream.schema, lambda names: _slices(stream, names)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        whole = pyarrow.ipc.open_file(file)
        batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
        return whole.schema, lambda names: _slices(batches, names)


def _slices(batches: Iterable[Any], names: list[str]) -> Iterator[Any]:
    for batch in batches:
        chosen = batch.select(names)
        chosen.validate()
        for start in range(0, chosen.num_rows, BATCH):
            yield chosen.slice(start, BATCH)


# ---------------------------------------------------------------------------- which column is what


def find_columns(
    path: Path, schema: Any, image_key: str | None, label_column: str | None
) -> Columns:
    """Which column holds the images, and which one the labels.

    Raises:
        InputError: several could be, none is, or an option names none.
    """
    features = _features(schema)
    names = list(schema.names)
    for option, name in (("image_key", image_key), ("label_column", label_column)):
        if name is not None and name not in names:
            raise InputError(
                f"--{option} {name}: {path} has no such column; it has {', '.join(names)}"
                f"{suggest(name, names)}"
            )
    images = [name for name in names if _holds_images(schema.field(name).type, features.get(name))]
    arrays = [name for name in names if _is_list(schema.field(name).type)]
    if image_key is not None and image_key not in images:
        kind = schema.field(image_key).type
        raise InputError(_arrays(path, image_key) if image_key in arrays else (
            f"--image_key {image_key}: that column of {path} holds {kind}, not the bytes of images"
        ))  # fmt: skip
    if image_key is None and len(images) > 1:
        raise InputError(
            f"{path}: {', '.join(images)} hold images; choose with --image_key, such as "
            f"--image_key {images[0]}"
        )
    image = image_key or (images[0] if images else None)
    if image is None:
        _check_names(path, names, arrays)
    label = label_column or _label(path, schema, features, image)
    classes = (features.get(label or "") or {}).get("names")
    used = {image, label}
    return Columns(
        image, label, tuple(map(str, classes)) if classes else None,
        tuple(name for name in names if name not in used and not name.startswith("__")),
    )  # fmt: skip


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's type of each column, where the schema has them."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _holds_images(kind: Any, feature: dict[str, Any] | None) -> bool:
    import pyarrow.types as types

    if feature is not None and feature.get("_type") == "Image":
        return True
    if types.is_struct(kind):
        return any(kind.field(n).name == "bytes" and _is_bytes(kind.field(n).type)
                   for n in range(kind.num_fields))  # fmt: skip
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_scalar(kind: Any) -> bool:
    import pyarrow.types as types

    return not (_is_list(kind) or _is_bytes(kind) or types.is_struct(kind) or types.is_map(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow
    import pyarrow.types as types

    kind = kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _check_names(path: Path, names: list[str], arrays: list[str]) -> None:
    """Refuse a table that neither holds nor names images, with the command that helps."""
    known = dict(zip(normalized(names), names, strict=True))
    if pixels := [n for n in arrays if any(w in n.lower() for w in ("image", "img", "pixel"))]:
        raise InputError(_arrays(path, pixels[0]))
    if any(name in NAME_COLUMNS for name in known):
        return
    urls = [name for name in names if "url" in name.lower()]
    if urls:
        raise InputError(
            f"{path} holds addresses of images, not images; download them, and index the shards: "
            f"pip install img2dataset; img2dataset --url_list {path} --input_format parquet "
            f"--url_col {urls[0]} --output_format webdataset --output_folder shards; "
            "xcit-dino shards check shards"
        )
    raise InputError(f"{path}: no column holds the bytes of images; it has {', '.join(names)}")


def _arrays(path: Path, name: str) -> str:
    if path.suffix.lower() == ".parquet":
        load = f"datasets.Dataset.from_parquet('{path}')"
    else:
        load = f"datasets.Dataset.from_file('{path}')"
    script = f"{load}.cast_column('{name}', datasets.Image()).save_to_disk('encoded')"
    return (
        f"{path}: column {name} holds arrays of numbers; store them as images: pip install "
        f'datasets; python -c "import datasets; {script}"; then pack the folder encoded'
    )


def _label(
    path: Path, schema: Any, features: dict[str, dict[str, Any]], image: str | None
) -> str | None:
    """The column of labels: the one of type ``ClassLabel``, or one of a usual name.

    Raises:
        InputError: several.
    """
    found = [n for n, kind in features.items() if kind.get("_type") == "ClassLabel"]
    if not found:
        pairs = zip(normalized(schema.names), schema.names, strict=True)
        found = [
            name for plain, name in pairs
            if plain in KEYED and name != image and not _is_list(schema.field(name).type)
        ]  # fmt: skip
    if len(found) > 1:
        raise InputError(
            f"{path}: {', '.join(found)} could each be the label; choose with --label_column, "
            f"such as --label_column {found[0]}"
        )
    return found[0] if found else None
