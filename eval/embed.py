"""``xcit-dino embed``: features of a split's images, in files that other tools can read.

``DST/features.npy`` float32 [N, D], one class token per image (not normalized);
``DST/images.csv`` the image of each row; ``DST/neighbors.png`` some images, each followed by
those most similar to it. Of tiles (``shards make --tile``) also ``DST/maps/``, a map of each scene
(``eval/pictures/scene_map.py``). With ``--patches true`` the features of every patch too
(``eval/dense/patches.py``). With ``--baselines`` also those of a randomly initialized network and
of raw pixels. Labels are not needed.
"""

from __future__ import annotations

import csv
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io.storage import open_source, read_facts
from xcit_dino.data.pack.image_file import Place
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.config import EmbedConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.dense.patches import draw_patches, grid_features_of, write_patches
from xcit_dino.eval.features import cached_features
from xcit_dino.eval.neighbors import nearest_others
from xcit_dino.eval.pictures.false_color import check_shown
from xcit_dino.eval.pictures.render import Pixels, mosaic, photos
from xcit_dino.eval.pictures.scene_map import place_of, write_maps
from xcit_dino.eval.target import networks, resolve
from xcit_dino.files import check_own_folder, unfinished_folder
from xcit_dino.progress import track
from xcit_dino.train.distributed import dist

WRITTEN = re.compile(r"(features|neighbou?rs)(-random|-pixels)?\.(npy|png)|images\.csv"
                     r"|maps(-random|-pixels)?|patches(-random)?(\.png)?")  # fmt: skip
NEIGHBORS = 8
COPY_ROWS = 1 << 16
GAP = 16  # pixels between an image and its neighbors


def run(config: EmbedConfig) -> None:
    """Write the folder atomically.

    Raises:
        InputError: no weights or shards, or none of the images can be read.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    check_shown(config.show_channels, context)
    context = replace(context, show_channels=config.show_channels)
    index = context.index(config.split)
    if not index.num_samples:
        raise InputError(f"--data_path {index.root}: holds no images")
    dst = config.dst or config.target.output_dir / "embeddings" / config.split
    dst = Path(os.path.abspath(dst))
    dist.from_main(lambda: check_free(dst))
    names = dst / "images.csv"
    before = names.read_bytes() if names.is_file() else None
    places: list[Place | None] = []
    with unfinished_folder(dst) if world.is_main else nullcontext(dst) as own:
        unfinished = dist.from_main(lambda: own)
        for network in networks(config.target, target):
            cache = cached_features(network, index, config.split, context)
            samples = np.flatnonzero(np.load(cache.path / "seen.npy"))
            if not len(samples):
                raise InputError(f"--data_path {index.root}: none of the images can be read")
            ending = network.suffix.replace("/", "-")
            grids = unfinished / f"patches{ending}"
            dense = grid_features_of(network, config, context)
            if dense is not None:
                write_patches(dense, index, samples, grids)
            if not world.is_main:
                continue
            features = copy_rows(
                cache.path / "cls.npy", samples, unfinished / f"features{ending}.npy"
            )
            if config.examples:
                picture = neighbors(index, samples, features, context, config)
                Image.fromarray(picture).save(unfinished / f"neighbors{ending}.png")
            if not ending:
                places = write_names(index, samples, unfinished / "images.csv", context.loader)
            if count := write_maps(features, places, unfinished / f"maps{ending}"):
                print(f"{network.name}: maps of {count:,} scenes in {dst / f'maps{ending}'}")
            if dense is not None:
                chosen = examples_of(config, samples)
                shown = dict(zip(chosen.tolist(), samples[chosen].tolist(), strict=True))
                draw_patches(dense, index, shown, grids, places)
            print(f"{network.name}: {len(samples):,} images, {features.shape[1]} features each")
    if world.is_main:
        replaced = before not in (None, names.read_bytes())
        print(f"features: {dst}{', in place of those of other images' * replaced}", flush=True)
    dist.barrier()


def check_free(dst: Path) -> None:
    """Check that the target is free, or holds what an earlier call wrote.

    Raises:
        InputError: it contains something else, or cannot be written.
    """
    check_own_folder(dst, "embed", lambda name: bool(WRITTEN.fullmatch(name)))
    # somebody's own files may have these names
    check_own_folder(dst, "embed", lambda _: (dst / "features.npy").exists())


def copy_rows(source: Path, rows: np.ndarray, target: Path) -> np.ndarray:
    """Copy some rows of an ``.npy`` file to another file; returns it memory-mapped."""
    table = np.load(source, mmap_mode="r")
    shape = (len(rows), table.shape[1])
    result = np.lib.format.open_memmap(target, "w+", table.dtype, shape)
    for first in range(0, len(rows), COPY_ROWS):
        part = slice(first, first + COPY_ROWS)
        result[part] = table[rows[part]]
    result.flush()
    return result


def write_names(
    index: ShardIndex, samples: np.ndarray, path: Path, loader: LoaderConfig
) -> list[Place | None]:
    """Write one line per image: row, sample number, shard, key, original file, label, class, and
    of a tile its scene and corner. Returns the places of tiles, None of other images."""
    places: list[Place | None] = []
    source = open_source(index, loader)
    classes = index.classes or []
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "sample", "shard", "key", "source", "label", "class",
                         "scene", "x", "y"))  # fmt: skip
        for row, sample in enumerate(track(samples.tolist(), "names", len(samples), "images")):
            shard, label = index.locate(sample)[0], int(index.labels[sample])
            known = (label, classes[label] if label < len(classes) else "") if label >= 0 else ""
            key, facts = read_facts(source, index, sample)
            places.append(place := place_of(facts))
            origin = (key, str(facts.get("source", "")))
            corner = (place.scene, place.x, place.y) if place else ("", "", "")
            writer.writerow(
                (row, sample, index.shards[shard], *origin, *(known or ("", "")), *corner)
            )
    return places


def examples_of(config: EmbedConfig, samples: np.ndarray) -> np.ndarray:
    """Rows of the images that are shown."""
    count = min(config.examples, len(samples))
    return np.random.default_rng(config.seed).choice(len(samples), count, replace=False)


def neighbors(
    index: ShardIndex,
    samples: np.ndarray,
    features: np.ndarray,
    context: Context,
    config: EmbedConfig,
) -> Pixels:
    """A mosaic: each row is a query image, followed by the most similar others, nearest first."""
    chosen = examples_of(config, samples)
    nearest, _ = nearest_others(features, chosen, NEIGHBORS)
    numbers = samples[np.column_stack((chosen, nearest))]
    pixels = photos(index, numbers.ravel().tolist(), context)
    known = [[n for n in row if n in pixels] for row in numbers.tolist() if row[0] in pixels]
    tiles = [[pixels[n] for n in row] for row in known]
    queries = mosaic([row[:1] for row in tiles])
    if len(samples) == 1:
        return queries
    gap = np.full((len(queries), GAP, 3), 255, np.uint8)
    return np.hstack((queries, gap, mosaic([row[1:] for row in tiles])))
