"""Scenes and slides in the colors of their patches (``shards make --tile``).

``maps/SCENE-patches.png`` and ``maps/SCENE-foreground.png``: every patch of every tile in its
place, the mean where tiles overlap; the colors are the same in all scenes of a set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.pack.image_file import Place
from xcit_dino.eval.dense.components import PatchColors
from xcit_dino.eval.dense.grids import Grids
from xcit_dino.eval.pictures.scene_map import EMPTY, SceneGrid, enlarged, file_names
from xcit_dino.eval.pictures.scene_map import grids as scenes_of

MOST = 2048  # pixels of a picture's longer side, if a patch is not to have less than one


def write_scenes(
    grids: Grids, colors: PatchColors, places: list[Place | None], folder: Path
) -> None:
    """Write the pictures of all scenes in the folder of their maps; row n is at ``places[n]``."""
    scenes = scenes_of(places)
    for scene, name in zip(
        scenes, file_names([scene.place.scene for scene in scenes]), strict=True
    ):
        for part in ("patches", "foreground"):
            picture = assembled(scene, places, grids, colors, part)
            Image.fromarray(enlarged(picture)).save(folder / f"{name}-{part}.png")


def assembled(
    scene: SceneGrid, places: list[Place | None], grids: Grids, colors: PatchColors, part: str
) -> NDArray[np.uint8]:
    """A scene of tiles, one pixel a patch or less, [H, W, 3]; ``part``: of :class:`Colored`."""
    height, width = scene.place.scene_height, scene.place.scene_width
    rows = [row for row in scene.rows if row in grids]
    finest = max((max(grids[row].shape[:2]) for row in rows), default=1)
    scale = min(finest / scene.place.tile, MOST / max(height, width))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    total = np.zeros((*shape, 3), np.float32)
    count = np.zeros((*shape, 1), np.uint16)
    for row in rows:
        place = places[row]
        assert place is not None
        box = [_span(corner, place.tile, scale) for corner in (place.y, place.x)]
        at = tuple(slice(*ends) for ends in box)
        size = total[at].shape[1::-1]
        tile = Image.fromarray(getattr(colors(grids[row]), part))
        total[at] += np.asarray(tile.resize(size, Image.Resampling.BOX))
        count[at] += 1
    mean = np.rint(total / np.maximum(count, 1))
    return np.where(count > 0, mean, EMPTY).astype(np.uint8)


def _span(first: int, length: int, scale: float) -> tuple[int, int]:
    """Pixels of a tile's side, at least one."""
    begin = round(first * scale)
    return begin, max(begin + 1, round((first + length) * scale))
