"""Class attention of a scene or slide that is too large for a network: tile by tile, read in parts
(``attention --tile``).

``DST/SCENE/attention.npy`` float16 [h, rows, columns], one cell a patch: 1 is attention spread
equally over a tile, so that tiles are comparable. Pictures are those of a photo, with one pixel a
patch, or a block of patches, averaged, so that no side exceeds :data:`MAX_SIDE`. Where the last
tile of a row or column overlaps the one before, it counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.native.single import taken
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.scenes.grid import starts
from xcit_dino.data.scenes.reader import Scene, open_scene
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures import false_color

MAX_SIDE = 4096  # of a picture
SOME = 4  # tiles of a scene whose colors are looked at

Values = NDArray[Any]


class SceneMaps:
    """Attention and reduced picture of one scene, put together from its tiles.

    Args:
        scene: open.
        tile: side in pixels, a multiple of ``patch``.
        patch: side of a patch in pixels.
        heads: of the class attention.
    """

    def __init__(self, scene: Scene, tile: int, patch: int, heads: int) -> None:
        self.patch, self.tile = patch, tile
        shape = (scene.height // patch, scene.width // patch)
        self.block = -(-max(shape) // MAX_SIDE)
        self.heat = np.zeros((heads, *shape), np.float16)
        self.photo = np.zeros((*shape, 3), np.uint8)
        self.corners = corners_of(scene, tile, patch)

    def add(self, y: int, x: int, photo: NDArray[np.uint8], heat: NDArray[np.float32]) -> None:
        """A tile's picture [tile, tile, 3] and attention [h, tile / patch, tile / patch]."""
        cells, p = self.tile // self.patch, self.patch
        place = (slice(y // p, y // p + cells), slice(x // p, x // p + cells))
        shares = heat / np.maximum(heat.sum((1, 2), keepdims=True), 1e-12)
        self.heat[:, *place] = shares * heat[0].size
        self.photo[place] = photo.reshape(cells, p, cells, p, 3).mean((1, 3)).round()

    def pictures(self, overlay: Any) -> dict[str, NDArray[np.uint8]]:
        """``head-0`` ..., ``mean`` and ``all``, side by side with the scene; ``overlay`` puts a map
        on a picture."""
        photo = reduced(self.photo, self.block).round().astype(np.uint8)
        maps = [reduced(heat.astype(np.float32), self.block) for heat in self.heat]
        named = {f"head-{n}": heat for n, heat in enumerate(maps)} | {"mean": np.mean(maps, 0)}
        shown = {name: overlay(photo, heat) for name, heat in named.items()}
        return shown | {"all": np.concatenate([photo, *shown.values()], 1)}


def reduced(cells: Values, block: int) -> NDArray[np.float32]:
    """[H, W, ...] averaged over blocks; cells that do not fill one at the edge are left out."""
    rows, columns = (side // block for side in cells.shape[:2])
    whole = cells[: rows * block, : columns * block].astype(np.float32)
    return whole.reshape(rows, block, columns, block, *cells.shape[2:]).mean((1, 3))


def open_for(path: Path, context: Context, tile: int) -> Scene:
    """The scene; for a ``with``.

    Raises:
        BadImage: it cannot be read, or not in parts and is too large to be read whole, or smaller
            than a tile.
    """
    image = Image(path.name, str(path), size=path.stat().st_size)
    scene = open_scene(image, context.form.page, context.form.max_pixels)
    if tile > (short := min(scene.height, scene.width)):
        scene.__exit__()
        raise BadImage(f"--tile {tile} is larger than its {scene.width} x {scene.height} pixels"
                       f"; at most {short} fit")  # fmt: skip
    return scene


def corners_of(scene: Scene, tile: int, patch: int) -> list[tuple[int, int]]:
    """(y, x) of all tiles, on whole patches; pixels at the edge that fill none are left out."""
    rows, columns = (
        starts(side // patch * patch, tile, tile) for side in (scene.height, scene.width)
    )
    return [(y, x) for y in rows for x in columns]


def read_tile(scene: Scene, y: int, x: int, tile: int, context: Context) -> Values:
    """Values [tile, tile, C] as the network takes them.

    Raises:
        BadImage: damaged, or other channels than the network takes.
    """
    values = scene.read(y, x, tile, tile)
    if scene.has_alpha and scene.channels == context.inputs.channels + 1:
        values = values[..., :-1]
    if values.shape[-1] == 1 and values.dtype == np.uint8 and false_color.is_plain(context):
        values = values.repeat(3, -1)  # as packing makes RGB of gray
    return taken(values, context.inputs, None, scene.nodata)


def some_tiles(path: Path, tile: int, context: Context) -> Iterator[Values]:
    """A few tiles, evenly spaced."""
    with open_for(path, context, tile) as scene:
        corners = corners_of(scene, tile, 1)
        for n in np.unique(np.linspace(0, len(corners) - 1, SOME).astype(int)):
            y, x = corners[n]
            yield read_tile(scene, y, x, tile, context)


def check_whole(tile: int, patch: int) -> None:
    """Raise InputError for tiles that are not of whole patches."""
    if tile % patch:
        whole = max(1, round(tile / patch)) * patch
        raise InputError(f"--tile {tile}: must be a multiple of the patch, {patch}; take {whole}")
