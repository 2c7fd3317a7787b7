"""``shards make --tile``: scenes and slides into tiles, the images that are then packed.

Tiles are written one behind the other into files in the folder of the shards to be, because packing
shuffles them and a scene is read in order; they go when the shards are complete. Each file is one
row of panels (``grid.py``), so that an interrupted run goes on with the rows that are missing, and
all processes can work on one scene. Splits and labels are those of the scenes: the tiles of one
never lie in two splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xcit_dino.data.decode.extras import MissingLibrary
from xcit_dino.data.decode.native import Wanted, check_size
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.io.storage import MAX_BYTES
from xcit_dino.data.pack.classes import Part
from xcit_dino.data.pack.image_file import Image, Place
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.scenes.encode import encode_tile, stored_kind
from xcit_dino.data.scenes.foreground import Background, find_background
from xcit_dino.data.scenes.grid import Panel, bands, starts
from xcit_dino.data.scenes.reader import Scene, open_scene
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import printable
from xcit_dino.data.shards.kinds import FOUR, RGB, Kinds
from xcit_dino.errors import InputError
from xcit_dino.files import atomic_path
from xcit_dino.progress import progress

MAX_TILES = 20_000_000  # of a scene: more are damage


class How(NamedTuple):
    """The options that decide on tiles."""

    tile: int
    stride: int
    least: float
    """Share of foreground."""
    background: str
    pixels: str
    page: int | None
    nodata: float | None
    max_pixels: int | None

    @staticmethod
    def of(config: MakeConfig) -> How:
        assert config.tile is not None
        return How(
            config.tile, config.stride or config.tile, config.min_foreground, config.background,
            config.pixels, config.page, config.nodata, config.max_pixels,
        )  # fmt: skip


class Facts(NamedTuple):
    """What is known of a scene before it is cut."""

    height: int
    width: int
    pixel_bytes: int
    kind: str
    """Of its tiles in the set."""
    is_four: bool
    """Of four channels, of which three are kept."""
    background: Background


def cut_scenes(
    parts: dict[str, Part], config: MakeConfig, work: Path
) -> tuple[dict[str, Part], MakeConfig, list[dict[str, Any]]]:
    """(the splits with tiles in place of scenes, the options that are left for packing them, what
    could not be used).

    Raises:
        InputError: no scene can be cut, or they are of several kinds.
    """
    how = How.of(config)
    bad: list[dict[str, Any]] = []
    facts = _look_at_all(parts, how, config, bad)
    kind, notes = _one_kind(facts, how, config, bad)
    work.mkdir(parents=True, exist_ok=True)
    result = {}
    for split, part in parts.items():
        tiles, labels, counts = _cut_part(part, facts, kind, how, config, work, bad)
        if not tiles:
            raise InputError(_no_tiles(config, counts, bad))
        lines = part.notes + notes + _lines(counts, how)
        result[split] = Part(tiles, labels, part.classes, lines)
        notes = []
    nodata = None if kind == RGB else config.nodata
    return result, dataclasses.replace(config, pixels=kind, page=None, nodata=nodata), bad


def digest_of_scenes(parts: dict[str, Part], config: MakeConfig) -> str:
    """Of all that the shards depend on, known before a scene is opened."""
    anywhere = {"src": "", "dst": Path(), "root": None, "num_workers": None}
    digest = hashlib.sha256(repr(dataclasses.replace(config, **anywhere)).encode())
    for split, part in parts.items():
        scenes = [(i.name, i.size, Path(i.path).stat().st_mtime_ns) for i in part.images]
        text = repr((split, scenes, part.labels, part.classes))
        digest.update(text.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------- looking at scenes


def _look_at_all(
    parts: dict[str, Part], how: How, config: MakeConfig, bad: list[dict[str, Any]]
) -> dict[Image, Facts]:
    """The scenes that can be cut."""
    scenes = [image for part in parts.values() for image in part.images]
    found: dict[Image, Facts] = {}
    with progress("Look at the scenes", len(scenes), "scenes") as bar:
        tasks = [(image, how) for image in scenes]
        for image, facts in zip(
            scenes, map_processes(_look, tasks, config.num_workers, bar), strict=True
        ):
            if isinstance(facts, Facts):
                found[image] = facts
            else:
                bad.append({"source": printable(image.name), "reason": facts})
    if not found:
        raise InputError(f"{config.src}: no scene can be cut into tiles: {bad[-1]['reason']}")
    return found


def _look(task: tuple[Image, How], advance: Advance) -> Facts | str:
    image, how = task
    try:
        with _open(image, how) as scene:
            return _facts(scene, how)
    except MissingLibrary as error:
        raise InputError(f"{printable(image.name)}: {error}") from None
    except BadImage as error:
        return str(error)
    finally:
        advance(1)


def _open(image: Image, how: How) -> Scene:
    return open_scene(image, how.page, how.max_pixels)


def _facts(scene: Scene, how: How) -> Facts:
    short = min(scene.height, scene.width)
    if how.tile > short:
        raise BadImage(
            f"--tile {how.tile} is larger than its {scene.width} x {scene.height} pixels; "
            f"--tile {short} fits"
            if short >= 8 else f"{scene.width} x {scene.height} pixels are too few for tiles"
        )  # fmt: skip
    count = len(starts(scene.height, how.tile, how.stride)) * len(
        starts(scene.width, how.tile, how.stride)
    )
    if count > MAX_TILES:
        raise BadImage(f"{count:,} tiles; a larger --stride makes fewer")
    wanted = Wanted(max_pixels=how.max_pixels or MAX_PIXELS)
    check_size(how.tile, how.tile, scene.channels, np.dtype(scene.dtype), wanted)
    if (size := how.tile**2 * scene.pixel_bytes) > MAX_BYTES:
        raise BadImage(f"a tile of {size:,} bytes: at most {MAX_BYTES:,}; lower --tile")
    kind, is_four = stored_kind(scene, how.pixels)
    background = find_background(scene, how.background if how.least else "nodata", how.nodata)
    return Facts(scene.height, scene.width, scene.pixel_bytes, kind, is_four, background)


def _one_kind(
    facts: dict[Image, Facts], how: How, config: MakeConfig, bad: list[dict[str, Any]]
) -> tuple[str, list[str]]:
    """The kind of all tiles; takes scenes of others than ``--pixels`` away, and lists them.

    Raises:
        InputError: several, or none as given.
    """
    kinds = Kinds()
    for image, found in facts.items():
        kinds.counts[found.kind] += 1
        kinds.examples.setdefault(found.kind, printable(image.name))
    listed = ", ".join(
        f"{kinds.counts[kind]:,} {kind} ({kinds.examples[kind]})" for kind in kinds.names
    )
    if how.pixels == "auto":
        if len(kinds.names) > 1:
            raise InputError(
                f"{config.src}: scenes of several kinds: {listed}; --pixels {kinds.names[0]} takes "
                "those alone"
            )
        kind = kinds.names[0]
    else:
        kind = how.pixels
        if kind not in kinds.counts:
            raise InputError(
                f"--pixels {kind}: the scenes are {listed}; leave it out, or name that one"
            )
    for image in [image for image, found in facts.items() if found.kind != kind]:
        reason = f"{facts.pop(image).kind}, and --pixels is {kind}"
        bad.append({"source": printable(image.name), "reason": reason})
    notes = []
    if any(found.is_four for found in facts.values()):
        notes.append(f"pixels: {FOUR}, of which three are used as RGB; --pixels 4xuint8 keeps all")
    return kind, notes


# ---------------------------------------------------------------------------- cutting


class _Task(NamedTuple):
    scene: Image
    facts: Facts
    how: How
    panels: list[Panel]
    tiles: Path
    listed: Path


def _cut_part(
    part: Part, facts: dict[Image, Facts], kind: str, how: How, config: MakeConfig, work: Path,
    bad: list[dict[str, Any]],
) -> tuple[list[Image], list[int], Counter[str]]:  # fmt: skip
    """The tiles of one split, their labels, and counts for the notes."""
    tasks: list[_Task] = []
    known: list[int] = []
    for image, label in zip(part.images, part.labels, strict=True):
        if (found := facts.get(image)) is not None:
            rows = _tasks(image, found, how, kind, work)
            tasks += rows
            known += [label] * len(rows)
    total = sum(len(panel.ys) * len(panel.xs) for task in tasks for panel in task.panels)
    done = [task.listed.exists() for task in tasks]
    start = sum(
        len(panel.ys) * len(panel.xs)
        for task, is_done in zip(tasks, done, strict=True) if is_done for panel in task.panels
    )  # fmt: skip
    todo = [task for task, is_done in zip(tasks, done, strict=True) if not is_done]
    with progress("Cut tiles", total, "tiles", start=start) as bar:
        for _ in map_processes(_cut_rows, todo, config.num_workers, bar):
            pass
    tiles: list[Image] = []
    labels: list[int] = []
    counts: Counter[str] = Counter(
        scenes=len({task.scene for task in tasks}), tiles=total,
        slides=sum(facts[i].background.saturation is not None for i in part.images if i in facts),
    )  # fmt: skip
    for task, label in zip(tasks, known, strict=True):
        taken = _taken(task, counts, bad)
        tiles += taken
        labels += [label] * len(taken)
    return tiles, labels, counts


def _tasks(image: Image, facts: Facts, how: How, kind: str, work: Path) -> list[_Task]:
    status = Path(image.path).stat()
    key = (str(Path(image.path).resolve()), status.st_size, status.st_mtime_ns, image.offset,
           image.name, how, facts, kind)  # fmt: skip
    digest = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    rows = bands(facts.height, facts.width, how.tile, how.stride, facts.pixel_bytes)
    return [
        _Task(image, facts, how, panels, work / f"tiles-{digest}-{n}.images",
              work / f"tiles-{digest}-{n}.jsonl")
        for n, panels in enumerate(rows)
    ]  # fmt: skip


def _cut_rows(task: _Task, advance: Advance) -> None:
    """Write the tiles of one row of panels, and a list of them, which comes last."""
    try:
        scene = _open(task.scene, task.how)
    except BadImage as error:
        raise InputError(f"{task.scene.path}: {error}, though it could be read before") from None
    with (
        scene,
        atomic_path(task.listed) as listed, listed.open("w", encoding="ascii") as lines,
        atomic_path(task.tiles) as tiles, tiles.open("wb") as data,
    ):  # fmt: skip
        at = 0
        for panel in task.panels:
            for y, x, values in _tiles_of(scene, panel):
                record: dict[str, Any] = {"y": y, "x": x}
                if isinstance(values, str):
                    record["reason"] = values
                elif _share(task, values) < task.how.least:
                    record["background"] = True
                else:
                    raw = encode_tile(values, task.facts.kind, task.facts.background)
                    data.write(raw)
                    record |= {"offset": at, "size": len(raw)}
                    at += len(raw)
                lines.write(json.dumps(record) + "\n")
                advance(1)


def _share(task: _Task, values: np.ndarray) -> float:
    """Of the foreground in a tile."""
    return float(task.facts.background.foreground(values).mean()) if task.how.least else 1.0


def _tiles_of(scene: Scene, panel: Panel) -> Iterator[tuple[int, int, Any]]:
    """Yield (y, x, pixels or why they cannot be read) of each tile of a panel."""
    y0, x0, height, width = panel.box
    tile = panel.tile
    try:
        values = scene.read(y0, x0, height, width)
    except BadImage as error:
        if len(panel.ys) * len(panel.xs) == 1:
            yield y0, x0, str(error)
            return
        for y in panel.ys:  # the others may be intact
            for x in panel.xs:
                yield from _tiles_of(scene, Panel([y], [x], tile))
        return
    for y in panel.ys:
        for x in panel.xs:
            yield y, x, values[y - y0 : y - y0 + tile, x - x0 : x - x0 + tile]


def _taken(task: _Task, counts: Counter[str], bad: list[dict[str, Any]]) -> list[Image]:
    """The tiles that a finished task wrote."""
    scene, how, found = task.scene, task.how, []
    with task.listed.open(encoding="ascii") as lines:
        for record in map(json.loads, lines):
            y, x = record["y"], record["x"]
            name = f"{scene.name}@{x},{y}"
            if "offset" in record:
                place = Place(
                    scene.name, task.facts.width, task.facts.height, x, y, how.tile, how.stride
                )
                found.append(
                    Image(name, str(task.tiles), record["offset"], record["size"], place=place)
                )
            elif "reason" in record:
                bad.append({"source": printable(name), "reason": record["reason"]})
            else:
                counts["background"] += 1
    return found


def _lines(counts: Counter[str], how: How) -> list[str]:
    lines = [f"tiles: {counts['tiles']:,} of {how.tile} px from {counts['scenes']:,} scenes"]
    if how.stride > how.tile:
        gap = how.stride - how.tile
        lines.append(f"tiles: --stride leaves {gap} px between them, which are in no tile")
    if how.least:
        lines.append(
            f"tiles: {counts['background']:,} of them have less than {how.least:g} foreground and "
            f"are left out; {counts['slides']:,} of the scenes were treated as slides"
        )
    return lines


def _no_tiles(config: MakeConfig, counts: Counter[str], bad: list[dict[str, Any]]) -> str:
    if counts["background"]:
        return (
            f"--min_foreground {config.min_foreground:g}: all {counts['background']:,} tiles have "
            "less; lower it, or choose another --background"
        )
    return f"{config.src}: no tile can be used: {bad[-1]['reason']}"
