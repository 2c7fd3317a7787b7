"""Maps of scenes: what was computed of each tile, back in its place (``shards make --tile``).

``maps/SCENE.npy`` float32 [rows, columns, D], one cell a tile, NaN where there is none, such as one
without foreground; ``maps/SCENE.png`` its first three principal components as red, green and blue,
the same in all scenes; ``maps/scenes.csv`` which file belongs to which scene, and its grid.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.pack.image_file import Place
from xcit_dino.data.scenes.grid import starts
from xcit_dino.eval.pictures.false_color import FalseColor, of_components

SIDE = 1024  # pixels of a picture's longer side at least, if a tile is to be seen as a square
MAX_CELLS = 50_000_000  # of a scene: more are damage
SAMPLE = 20_000  # tiles of which the principal components are found
EMPTY = 255  # gray of a cell without a tile


@dataclass
class SceneGrid:
    """The tiles of one scene that there are."""

    place: Place
    """Of any of them."""
    rows: list[int]
    """Of the table of features, one a tile."""
    cells: list[tuple[int, int]]
    """(row, column) of each on the grid."""
    shape: tuple[int, int]


def place_of(facts: dict[str, Any]) -> Place | None:
    """Where a sample's ``.json`` says that it lies, or None where it is no tile."""
    values = [facts.get(name) for name in Place._fields]
    if not isinstance(values[0], str) or not all(type(value) is int for value in values[1:]):
        return None
    place = Place(*values)  # type: ignore[arg-type]
    if min(place[1:3]) < 1 or place.tile < 1 or place.stride < 1:
        return None
    cells = (place.scene_width // place.stride + 2) * (place.scene_height // place.stride + 2)
    return place if cells <= MAX_CELLS else None


def grids(places: list[Place | None]) -> list[SceneGrid]:
    """The scenes of a table whose row n lies at ``places[n]``, sorted by name."""
    found: dict[tuple[Any, ...], SceneGrid] = {}
    corners: dict[tuple[Any, ...], tuple[dict[int, int], dict[int, int]]] = {}
    for row, place in enumerate(places):
        if place is None:
            continue
        key = (*place[:3], place.tile, place.stride)
        if key not in found:
            ys, xs = (
                {corner: n for n, corner in enumerate(starts(side, place.tile, place.stride))}
                for side in (place.scene_height, place.scene_width)
            )
            corners[key] = ys, xs
            found[key] = SceneGrid(place, [], [], (len(ys), len(xs)))
        ys, xs = corners[key]
        if place.y in ys and place.x in xs:
            found[key].rows.append(row)
            found[key].cells.append((ys[place.y], xs[place.x]))
    return [found[key] for key in sorted(found) if found[key].rows]


def write_maps(features: np.ndarray, places: list[Place | None], folder: Path) -> int:
    """Write the maps of all scenes in a table of features [N, D]; returns how many there are, and
    creates no folder where there are none."""
    scenes = grids(places)
    if not scenes:
        return 0
    folder.mkdir()
    names = file_names([scene.place.scene for scene in scenes])
    colors = _colors(features, [row for scene in scenes for row in scene.rows])
    with (folder / "scenes.csv").open(
        "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as file:
        writer = csv.writer(file)
        writer.writerow(("file", "rows", "columns", "tiles", *Place._fields[:3], "tile", "stride"))
        for scene, name in zip(scenes, names, strict=True):
            _write_map(features, scene, folder / name, colors)
            place = scene.place
            writer.writerow(
                (name, *scene.shape, len(scene.rows), *place[:3], place.tile, place.stride)
            )
    return len(scenes)


def _write_map(features: np.ndarray, scene: SceneGrid, path: Path, colors: FalseColor) -> None:
    shape = (*scene.shape, features.shape[1])
    table = np.lib.format.open_memmap(path.with_name(path.name + ".npy"), "w+", np.float32, shape)
    table[:] = np.nan
    picture = np.full((*scene.shape, 3), EMPTY, np.uint8)
    for row, cell in zip(scene.rows, scene.cells, strict=True):
        table[cell] = features[row]
        picture[cell] = colors(unit_rows(features[row][None]))[0]
    table.flush()
    Image.fromarray(enlarged(picture)).save(path.with_name(path.name + ".png"))


def _colors(features: np.ndarray, rows: list[int]) -> FalseColor:
    """Of unit features, as k-NN compares them."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))
    sample = unit_rows(features[np.asarray(rows)[chosen]])
    if min(sample.shape) < 2:  # a single tile varies in nothing
        return FalseColor(np.zeros((sample.shape[1], 3), np.float32), np.full(3, 0.5, np.float32))
    return of_components(sample)


def unit_rows(rows: np.ndarray) -> NDArray[np.float32]:
    """Of Euclidean length 1."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each cell as a square of equal pixels, so that the picture has about SIDE a side."""
    times = max(1, SIDE // max(picture.shape[:2]))
    return picture.repeat(times, 0).repeat(times, 1)


def file_names(scenes: list[str]) -> list[str]:
    """A plain name for the files of each scene, all different: ``north/a.tif`` -> ``north-a``.
    Names in shards may be anything."""
    taken: set[str] = set()
    return [_free(_plain(scene), taken) for scene in scenes]


def _plain(scene: str) -> str:
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", scene)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip(".-")[:100] or "scene"


def _free(name: str, taken: set[str]) -> str:
    def numbered() -> Iterator[str]:
        yield name
        for number in range(2, len(taken) + 3):
            yield f"{name}-{number}"

    found = next(one for one in numbered() if one.casefold() not in taken)
    taken.add(found.casefold())
    return found
