"""``xcit-dino duplicates``: near-duplicates inside a set, leaks between train and val, outliers.

``DST/duplicates.csv`` the images to leave out (``shards make --exclude``), ``pairs.csv`` all pairs,
``outliers.csv`` the images least similar to their neighbors, ``pairs.png`` and ``outliers.png``
pictures of some. Labels are not needed.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xcit_dino.data.io.storage import open_source, read_origin
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import cached_features
from xcit_dino.eval.knn import Search
from xcit_dino.eval.neighbors import evenly_spaced
from xcit_dino.eval.pictures.render import Pixels, mosaic, photos
from xcit_dino.eval.results import write_result
from xcit_dino.eval.retrieval import near
from xcit_dino.eval.retrieval.config import DuplicatesConfig
from xcit_dino.eval.retrieval.near import Neighborhood, Pair
from xcit_dino.eval.target import Network, networks, resolve
from xcit_dino.files import check_own_folder, unfinished_folder
from xcit_dino.progress import progress
from xcit_dino.train.distributed import dist

WRITTEN = {"duplicates.csv", "pairs.csv", "outliers.csv", "pairs.png", "outliers.png"}
PER_ROW = 4  # pairs, and twice as many outliers, in a row of a picture
GAP = 12  # pixels between pairs
Name = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class Images:
    """Readable images of one split or two, in one numbering: rows."""

    indexes: dict[str, ShardIndex]
    splits: np.ndarray
    """int64 [N]: which of ``indexes``."""
    samples: np.ndarray
    """int64 [N]: numbers within their split."""
    features: np.ndarray
    """float32 [N, D]."""
    thumbnails: Tensor
    """uint8 [N, 32, 32]."""

    def split(self, row: int) -> str:
        return list(self.indexes)[self.splits[row]]

    def label(self, row: int) -> int:
        return int(self.indexes[self.split(row)].labels[self.samples[row]])


def run(config: DuplicatesConfig) -> None:
    """Write the folder atomically, and ``duplicates`` to ``results.json``.

    Raises:
        InputError: no weights or shards, or fewer than two readable images.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    dst = Path(os.path.abspath(config.dst or config.target.output_dir / "duplicates"))
    dist.from_main(lambda: check_own_folder(dst, "duplicates", WRITTEN.__contains__))
    indexes = indexes_of(config, context)
    network = next(networks(config.target, target))
    caches = {
        split: cached_features(network, index, split, context) for split, index in indexes.items()
    }
    if not world.is_main:
        return  # the rest is the work of one process
    seconds: dict[str, dict[str, float]] = {}
    with timed(seconds, "thumbnails"):
        images = read(indexes, {split: cache.path for split, cache in caches.items()}, context)
    with timed(seconds, "neighbors"):
        search = Search(images.features, gpu=world.device.type == "cuda")
        found = near.neighborhood(search, images.features, near.K)
    with timed(seconds, "comparison"):
        pairs = near.near_duplicates(
            search, images.features, found, images.thumbnails.to(world.device), config.threshold
        )
    total = round(sum(part["wall"] for part in seconds.values()), 1)
    dropped = near.leave_out(pairs, np.lexsort((images.samples, -images.splits)))
    metrics = counts(images, pairs, dropped)
    with unfinished_folder(dst) as folder:
        shown = write(folder, images, pairs, dropped, found, context, config)
    print(summary(metrics), flush=True)
    print(f"near-duplicates: {dst} ({total:,.1f} s, given the features)", flush=True)
    write_result(
        config.target.output_dir, "duplicates", metrics,
        protocol(config, context, network, indexes, len(images.samples)),
        written=str(dst), shown=shown, weights_file=target.weights.name, wall_seconds=total,
        seconds=seconds,
    )  # fmt: skip


@contextmanager
def timed(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    """Add how long a block took: by the clock, and busy, the sum over this process's threads."""
    wall, busy = time.monotonic(), time.process_time()
    yield
    seconds[part] = {
        "wall": round(time.monotonic() - wall, 2), "busy": round(time.process_time() - busy, 2)
    }  # fmt: skip


def indexes_of(config: DuplicatesConfig, context: Context) -> dict[str, ShardIndex]:
    """The splits to compare; val only where there is one, with a line."""
    indexes = {}
    for split in sorted(config.splits):
        try:
            indexes[split] = context.index(split)
        except InputError as reason:
            if split == "train" or "train" not in indexes:
                raise
            if dist.is_main():
                print(f"only train is searched: {reason}", flush=True)
    return indexes


def read(indexes: dict[str, ShardIndex], folders: dict[str, Path], context: Context) -> Images:
    """Features and thumbnails of all images that can be read."""
    parts = []
    for number, (split, index) in enumerate(indexes.items()):
        seen = np.flatnonzero(np.load(folders[split] / "seen.npy"))
        samples, thumbnails = read_thumbnails(index, seen, split, context)
        features = np.load(folders[split] / "cls.npy", mmap_mode="r")[samples]
        parts.append((np.full(len(samples), number), samples, features, thumbnails))
    splits, samples, features, thumbnails = zip(*parts, strict=True)
    if sum(map(len, samples)) < 2:
        raise InputError(f"--data_path {context.data_path}: fewer than two images can be read")
    return Images(
        indexes, np.concatenate(splits), np.concatenate(samples), np.concatenate(features),
        torch.cat(thumbnails),
    )  # fmt: skip


def read_thumbnails(
    index: ShardIndex, samples: np.ndarray, split: str, context: Context
) -> tuple[np.ndarray, Tensor]:
    """(int64 [M] ascending, uint8 [M, 32, 32]): the readable ones of some samples, their central
    squares."""
    small = dataclasses.replace(context, resize=near.SIDE, crop=near.SIDE)
    found: list[tuple[np.ndarray, Tensor]] = []
    with progress(f"thumbnails {split}", len(samples), "images") as bar:
        for batch, _, numbers in small.images(index, samples, labeled=False):
            found.append((np.array(numbers), near.thumbnail(batch)))
            bar.advance(len(numbers))
    if not found:
        return np.empty(0, np.int64), torch.zeros(0, near.SIDE, near.SIDE, dtype=torch.uint8)
    numbers = np.concatenate([part[0] for part in found]).astype(np.int64)
    order = np.argsort(numbers)
    return numbers[order], torch.cat([part[1] for part in found])[torch.from_numpy(order)]


def counts(images: Images, pairs: Sequence[Pair], dropped: dict[int, Pair]) -> dict[str, float]:
    """Numbers of pairs, of images to leave out, of images of one split with a near-duplicate in the
    other, and of pairs with different labels."""
    between = [p for p in pairs if images.splits[p.first] != images.splits[p.second]]
    labels = [(images.label(p.first), images.label(p.second)) for p in pairs]
    found = {
        "images": len(images.samples),
        "pairs": len(pairs),
        "left_out": len(dropped),
        "other_label": sum(min(both) >= 0 and both[0] != both[1] for both in labels),
    }
    if len(images.indexes) > 1:
        ends = {row for pair in between for row in (pair.first, pair.second)}
        found["leaked_val"] = sum(images.split(row) == "val" for row in ends)
        found["leaked_train"] = len(ends) - found["leaked_val"]
    return {name: float(count) for name, count in found.items()}


def summary(metrics: dict[str, float]) -> str:
    """The counts in a sentence."""
    number = {name: f"{int(count):,}" for name, count in metrics.items()}
    text = (
        f"{number['pairs']} pairs of near-duplicates among {number['images']} images, "
        f"{number['other_label']} with different labels; {number['left_out']} images to leave out"
    )
    if "leaked_val" in number:
        text += (
            f"; leaks: {number['leaked_val']} images of val are in train too "
            f"({number['leaked_train']} of train)"
        )
    return text


def protocol(
    config: DuplicatesConfig, context: Context, network: Network, indexes: dict[str, ShardIndex],
    count: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that must match for two counts to be comparable."""
    return (
        network.facts
        | context.protocol
        | {
            "evaluation": "duplicates",
            "threshold": config.threshold,
            "neighbors": near.K,
            "thumbnails": f"{near.SIDE} px, gray",
            "precision": config.target.precision,
            "images": count,
        }
        | {f"{split}_index": index.checksum for split, index in indexes.items()}
    )


# -- what is written -------------------------------------------------------------------------------


def write(
    folder: Path,
    images: Images,
    pairs: Sequence[Pair],
    dropped: dict[int, Pair],
    found: Neighborhood,
    context: Context,
    config: DuplicatesConfig,
) -> list[list[Any]]:
    """Write all files; returns the pairs in the picture: split, sample, split, sample, correlation
    of each."""
    outliers, cosines = near.outlying(found)
    outliers, cosines = outliers[: config.outliers], cosines[: config.outliers]
    used = {row for pair in pairs for row in (pair.first, pair.second)} | {*outliers.tolist()}
    names = names_of(images, used, context)
    write_csv(
        folder / "duplicates.csv", "path split sample why correlation cosine of of_split",
        (duplicate_row(images, names, row, pair) for row, pair in sorted(dropped.items())),
    )  # fmt: skip
    write_csv(
        folder / "pairs.csv",
        "path split sample label path_2 split_2 sample_2 label_2 correlation cosine",
        ((*names[p.first], images.label(p.first), *names[p.second], images.label(p.second),
          f"{p.correlation:.4f}", f"{p.cosine:.4f}") for p in pairs),
    )  # fmt: skip
    write_csv(
        folder / "outliers.csv", "path split sample cosine",
        ((*names[row], f"{cosine:.4f}")
         for row, cosine in zip(outliers.tolist(), cosines.tolist(), strict=True)),
    )  # fmt: skip
    some = [pairs[n] for n in evenly_spaced(len(pairs), config.examples)] if pairs else []
    draw(folder / "pairs.png", images, [[p.first, p.second] for p in some], PER_ROW, context)
    shown = [[int(row)] for row in outliers[: config.examples]]
    draw(folder / "outliers.png", images, shown, 2 * PER_ROW, context)
    return [
        [*(x for row in (p.first, p.second) for x in (images.split(row), int(images.samples[row]))),
         round(p.correlation, 4)]
        for p in some
    ]  # fmt: skip


def duplicate_row(images: Images, names: dict[int, Name], row: int, pair: Pair) -> tuple[Any, ...]:
    """One line of duplicates.csv."""
    of = near.other(pair, row)
    why = "duplicate" if images.splits[row] == images.splits[of] else "leak"
    scores = f"{pair.correlation:.4f}", f"{pair.cosine:.4f}"
    return (*names[row], why, *scores, *names[of][:2])


def write_csv(path: Path, header: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        writer.writerows(rows)


def names_of(images: Images, rows: Iterable[int], context: Context) -> dict[int, Name]:
    """Row -> (path as it was packed, split, sample); the key where the shards do not hold it."""
    sources = {s: open_source(index, context.loader) for s, index in images.indexes.items()}
    known = {}
    for row in sorted(set(rows)):
        split, sample = images.split(row), int(images.samples[row])
        key, path = read_origin(sources[split], images.indexes[split], sample)
        known[row] = (path or key, split, sample)
    return known


def draw(
    path: Path, images: Images, groups: Sequence[Sequence[int]], per_row: int, context: Context
) -> None:
    """Write a picture of groups of images side by side; nothing if there are none."""
    pixels: dict[int, Pixels] = {}
    rows = np.array([row for group in groups for row in group], np.int64)
    for number, index in enumerate(images.indexes.values()):
        own = rows[images.splits[rows] == number] if len(rows) else rows
        found = photos(index, images.samples[own].tolist(), context)
        pixels |= {int(row): found[n] for row in own if (n := int(images.samples[row])) in found}
    tiles = [[pixels[row] for row in group] for group in groups if all(r in pixels for r in group)]
    if tiles:
        Image.fromarray(np.vstack(list(_lines(tiles, per_row)))).save(path)


def _lines(tiles: Sequence[Sequence[Pixels]], per_row: int) -> Iterator[Pixels]:
    """Rows of the picture, padded to the same width."""
    for first in range(0, len(tiles), per_row):
        parts = [mosaic([group]) for group in tiles[first : first + per_row]]
        gap = np.full((len(parts[0]), GAP, 3), 255, np.uint8)
        parts += [np.full_like(parts[0], 255)] * (min(per_row, len(tiles)) - len(parts))
        yield np.hstack([piece for part in parts for piece in (part, gap)])
