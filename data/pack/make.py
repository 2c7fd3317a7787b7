"""``xcit-dino shards make SRC DST``: images from anywhere into WebDataset shards and their index.

The plan comes first: all images, sorted by name, shuffled with a seed and cut into shards. Each
shard is then a function of the plan alone, so that the shards are the same bytes whatever the
number of processes, and a run that was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.columns.stage import find_tables, list_columns
from xcit_dino.data.columns.unread import unread
from xcit_dino.data.decode.rgb import Deep
from xcit_dino.data.pack.archives import compressed_in, decompression, list_archive
from xcit_dino.data.pack.classes import Part
from xcit_dino.data.pack.labels import FOUND_BESIDE
from xcit_dino.data.pack.layout import NO_LABELS, arrange
from xcit_dino.data.pack.listing import Listing, archive_stem
from xcit_dino.data.pack.lists import LIST_SUFFIXES, list_images
from xcit_dino.data.pack.shard_job import (
    PLAN,
    QUARANTINE,
    WORK,
    Shard,
    cut,
    fingerprint,
    load_measured,
    load_part,
    pack_shard,
)
from xcit_dino.data.pack.sources import list_folder
from xcit_dino.data.pack.splits import NONE
from xcit_dino.data.pack.targets.attach import Targets, attach_targets
from xcit_dino.data.pack.torchvision_sets import list_torchvision, torchvision_names
from xcit_dino.data.parallel import map_processes
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.scenes.cut import cut_scenes, digest_of_scenes
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import INDEX, ShardIndex
from xcit_dino.data.shards.index_writer import ShardPart, write_index
from xcit_dino.data.shards.kinds import RGB, PixelOptions, find_kind, lines_on, with_limit
from xcit_dino.data.shards.measure import merged
from xcit_dino.data.shards.split_names import SPLITS, split_folders
from xcit_dino.errors import InputError, suggest
from xcit_dino.files import write_atomic
from xcit_dino.progress import progress

GOES_ON = "the same command goes on where it stopped"


def make(config: MakeConfig) -> int:
    """Pack ``config.src`` into ``config.dst``; returns the exit code.

    Raises:
        InputError: the source holds nothing to pack, or the folder holds something else.
    """
    if config.split is None and config.dst.name in SPLITS:  # DST is named after its split
        if config.splits not in ((), NONE):
            raise InputError(f"--splits: {config.dst} is one split; give the folder above it")
        config = dataclasses.replace(config, dst=config.dst.parent, split=config.dst.name)
    with _locked(config.dst):
        work = config.dst / WORK
        try:
            listing, src = _list(config, work)
            targets = attach_targets(listing, config, src, work)
            if config.multi_labels or config.values:
                config = dataclasses.replace(config, labels=Path(NO_LABELS), label_column=None)
            elif targets and config.labels is None and not listing.is_list:
                config = dataclasses.replace(config, labels=Path(NO_LABELS))
            _without_arrays(listing, config)
            parts = arrange(listing, config, src)
            unusable: list[dict[str, Any]] = []
            if config.tile is not None:
                digest = digest_of_scenes(parts, config)
                if all(_has_tiles_of(config.dst / split, digest) for split in parts):
                    for split in parts:
                        _say_packed(config.dst / split)
                    return 0
                parts, config, unusable = cut_scenes(parts, config, work)
                parts = {
                    name: dataclasses.replace(part, scenes=digest) for name, part in parts.items()
                }
            config, lines = _with_kind(config, parts)
        except InputError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:  # such as a full disk, while tiles or tables are copied
            why = error.strerror or error
            raise InputError(f"{error.filename or config.dst}: {why}; {GOES_ON}") from None
        except KeyboardInterrupt:
            print(f"{config.dst}: {GOES_ON}", file=sys.stderr)
            raise
        # Of the source as a whole: they go into the first split's list.
        problems, notes = listing.bad + unusable, listing.finished().notes + lines
        notes += [f"skipped: {count:,} {what}" for what, count in listing.skipped.most_common()]
        for split, part in parts.items():
            part.notes[:0] = notes
            for line in part.notes:
                print(line)
            _pack(config.dst / split, part, problems, config, targets)
            problems, notes = [], []
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _without_arrays(listing: Listing, config: MakeConfig) -> None:
    """``.npy`` beside files that can only be images hold something else, unless a list or
    ``--pixels`` says otherwise."""
    images = [image for image in listing.images if not image.name.lower().endswith(".npy")]
    if config.pixels == "auto" and images and not listing.is_list:
        listing.skipped[".npy files (there are images beside them)"] += len(listing.images) - len(
            images
        )
        listing.skipped += Counter()  # without zeros
        listing.images = images


def _with_kind(config: MakeConfig, parts: dict[str, Part]) -> tuple[MakeConfig, list[str]]:
    """The options with the kind of the images in place of auto, and lines on it.

    Raises:
        InputError: several kinds, or another than that of the other split.
    """
    if config.bits is not None or _is_begun(config, parts):
        return dataclasses.replace(config, pixels=RGB), []  # refuses --page and --nodata
    images = [image for part in parts.values() for image in part.images]
    kind, lines = find_kind(images, PixelOptions.of(config), config.num_workers)
    given = {"page": config.page, "nodata": config.nodata} if kind == RGB else {}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name}: these are 8-bit images; --pixels 1xuint8 (or 3) reads it")
    if config.quality != 90 and kind != RGB:
        raise InputError(f"--quality: images of {kind} are stored without loss")
    for split in SPLITS:
        other = config.dst / split
        if split not in parts and (other / INDEX).exists():
            found = ShardIndex.load(other).pixels.name
            if found != kind:
                raise InputError(
                    f"{config.src}: these images are {kind}, those of {other} {found}; "
                    f"--pixels {found} takes them as such"
                )
    return dataclasses.replace(config, pixels=kind), lines


def _is_begun(config: MakeConfig, parts: dict[str, Part]) -> bool:
    """Whether this packing was begun, or finished, as 8-bit RGB, when that was the only kind."""
    if config.pixels != "auto" or (config.page, config.nodata) != (None, None):
        return False
    rgb = dataclasses.replace(config, pixels=RGB)
    plans = [
        _planned(config.dst / split) == fingerprint(cut(part, config.dst / split, rgb))
        for split, part in parts.items()
        if (config.dst / split / PLAN).exists()
    ]
    return bool(plans) and all(plans)


def _planned(folder: Path, what: str = "fingerprint") -> str | None:
    try:
        return json.loads((folder / PLAN).read_bytes())[what]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_tiles_of(folder: Path, scenes: str) -> bool:
    """Whether the folder holds the finished shards of these scenes, cut with the same options."""
    return _planned(folder, "scenes") == scenes and (folder / INDEX).exists()


def _say_packed(folder: Path) -> None:
    count = ShardIndex.load(folder).num_samples
    print(f"{folder}: {count:,} images are packed already; nothing to do")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One packing at a time in a folder; created, and removed if nothing was packed."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".packing.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another process is packing into this folder") from None
        try:
            yield
        finally:
            os.unlink(file.name)
            if is_new:
                with suppress(OSError):  # it holds shards
                    folder.rmdir()


def _list(config: MakeConfig, work: Path) -> tuple[Listing, Path | None]:
    """The images of the source, and its path if it has one."""
    src = Path(config.src)
    if not src.exists():
        if config.src.lower() in torchvision_names():
            root = config.root or config.dst.parent
            if config.label_column:
                raise InputError(f"--label_column: {config.src} comes with its labels")
            return list_torchvision(config.src.lower(), root, config.download, work), None
        raise InputError(
            f"{src}: no such folder, file or data set{suggest(config.src, torchvision_names())}"
        )
    if config.root or config.download:
        option = "root" if config.root else "download"
        raise InputError(f"--{option}: {src} exists, and is no data set that torchvision downloads")
    if src.is_dir() and (src / INDEX).exists():
        raise InputError(f"{src} holds shards already; train on it with --data_path {src}")
    if src.resolve() == config.dst.resolve():
        raise InputError(f"{src}: the shards need a folder of their own; give another DST")
    if tables := find_tables(src) if src.is_file() else []:
        return list_columns(tables, src, work, config), src
    if src.is_file() and src.suffix.lower() in (*LIST_SUFFIXES, ".txt"):
        _no_image_key(config)
        return list_images(src, config.label_column), src
    if src.is_dir():
        inside = config.dst if config.dst.resolve().is_relative_to(src.resolve()) else None
        listing = list_folder(src, work, FOUND_BESIDE, inside)
        if not listing.images and (tables := find_tables(src)):
            return list_columns(tables, src, work, config), src
        _no_image_key(config)
        return _no_shards(listing, src), src
    _no_image_key(config)
    if remedy := unread(src):
        raise InputError(f"{src} is not read: {remedy}")
    listing = _no_shards(list_archive(src, work), src)
    if split_folders([archive_stem(src.name)]):  # ILSVRC2012_img_train.tar is a train folder
        for n, image in enumerate(listing.images):
            listing.images[n] = image._replace(name=f"{archive_stem(src.name)}/{image.name}")
    return listing, src


def _no_image_key(config: MakeConfig) -> None:
    if config.image_key is not None:
        raise InputError(f"--image_key: {config.src} is no Parquet or Arrow file with columns")


def _no_shards(listing: Listing, src: Path) -> Listing:
    """Refuse WebDataset shards, which need an index only."""
    if not listing.skipped[".cls files"]:
        return listing
    folder = src if src.is_dir() else src.parent
    packed = compressed_in(folder)
    first = f"decompress them ({decompression(folder, packed[0])}), then " if packed else ""
    raise InputError(
        f"{src} holds WebDataset shards; {first}index them: xcit-dino shards check {folder}"
    )


def _pack(
    folder: Path,
    part: Part,
    problems: list[dict[str, Any]],
    config: MakeConfig,
    targets: Targets | None,
) -> None:
    """Write the shards of one split that are not there yet, then the index."""
    shards = cut(part, folder, config, targets and targets.coding)
    plan = {"fingerprint": fingerprint(shards), "notes": part.notes}
    if part.scenes is not None:
        plan["scenes"] = part.scenes
    if not _begin(folder, plan):
        _say_packed(folder)
        return
    work = folder / WORK
    work.mkdir(exist_ok=True)
    done = [shard for shard in shards if load_part(shard) is not None]
    todo = [shard for shard in shards if load_part(shard) is None]
    total = len(part.images)
    with progress(
        f"Pack {folder.name}", total, "images", start=sum(len(shard.images) for shard in done)
    ) as bar:
        try:
            for _ in map_processes(pack_shard, todo, config.num_workers, bar):
                pass
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror or error}; {GOES_ON}") from None
        except KeyboardInterrupt:
            print(f"{folder}: {GOES_ON}", file=sys.stderr)
            raise
    parts = [p for p in map(load_part, shards) if p is not None]
    bad = problems + [item for p in parts for item in p.damage]
    changed = _changed(parts, targets)
    if changed:  # for shards check, which prints it again
        write_atomic(folder / PLAN, json.dumps(plan | {"notes": part.notes + changed}))
    _finish(
        folder, parts, part.classes, bad, lambda: _measured(shards, parts),
        targets and targets.classes,
    )  # fmt: skip
    _summary(folder, bad)
    for line in changed:
        print(f"  {line}")
    for line in sum((p.deep for p in parts), Deep()).lines(config.bits):
        print(f"  {line}")


def _changed(parts: list[ShardPart], targets: Targets | None) -> list[str]:
    """What packing changed in the targets, and which of their classes do not occur."""
    if targets is None:
        return []
    counts = sum((Counter(part.notes) for part in parts), Counter())
    lines = [f"{count:,} {what}" for what, count in sorted(counts.items())]
    present = {number for part in parts for number in part.present}
    if targets.kind == "values":
        return lines
    if empty := [name for n, name in enumerate(targets.classes) if n not in present]:
        more = f" and {len(empty) - 6} more" if len(empty) > 6 else ""
        lines.append(f"classes in no image of this split: {', '.join(empty[:6])}{more}")
    return lines


def _measured(shards: list[Shard], parts: list[ShardPart]) -> PixelFormat:
    """What the images are, with their statistics."""
    how, largest = shards[0].encoding, max(part.largest for part in parts)
    if how.form is None:
        return with_limit(RGB8, largest)
    statistics = merged(how.form, shards[0].total, map(load_measured, shards))
    return with_limit(dataclasses.replace(how.form, statistics=statistics), largest)


def _begin(folder: Path, plan: dict[str, Any]) -> bool:
    """Prepare the folder; False if it holds the finished shards of the same plan.

    What was skipped or renamed is stored for ``shards check``, which prints it again.

    Raises:
        InputError: it holds shards of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _planned(folder)
    if before == plan["fingerprint"]:
        return not (folder / INDEX).exists()
    if before is not None or any(folder.glob("*.tar")) or (folder / INDEX).exists():
        raise InputError(
            f"{folder} holds shards of another source or of other options; "
            "delete them or give another DST"
        )
    write_atomic(folder / PLAN, json.dumps(plan))
    return True


def _undo(folder: Path) -> None:
    """Take away what a packing that came to nothing left, so that other options may follow."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for path in (*folder.glob("shard-*.tar"), folder / PLAN):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _finish(
    folder: Path, parts: list[ShardPart], classes: list[str] | None, bad: list[dict[str, Any]],
    pixels: Callable[[], PixelFormat], target_classes: list[str] | None,
) -> None:  # fmt: skip
    if not sum(len(part.offsets) for part in parts):
        _undo(folder)
        raise InputError(f"{folder}: none of the images is usable: {bad[0]['reason']}")
    lines = [json.dumps(item, sort_keys=True).encode() + b"\n" for item in bad]
    (folder / QUARANTINE).unlink(missing_ok=True)
    if lines:
        write_atomic(folder / QUARANTINE, lines)
    write_index(folder, parts, classes, pixels(), target_classes)
    shutil.rmtree(folder / WORK)


def _summary(folder: Path, bad: list[dict[str, Any]]) -> None:
    index = ShardIndex.load(folder)
    labeled = bool((np.asarray(index.labels) >= 0).any())
    classes = f" of {len(index.classes)} classes" if index.classes else ""
    classes = classes if labeled else " without labels"
    if index.targets:
        classes = "" if not labeled else classes
        named = {"mask": "masks", "labels": "several labels"}.get(index.targets, index.targets)
        names = index.target_classes or ()
        values = f" with values of {', '.join(names)}"
        more = f" with {named} of {len(names)} classes"
        classes += values if index.targets == "values" else more
    print(
        f"{folder}: {index.num_samples:,} images{classes} in {len(index.shards)} shards, "
        f"{index.shard_bytes.sum() / 1e6:,.1f} MB"
    )
    for line in lines_on(index.pixels):
        print(f"  {line}")
    if bad:
        print(f"  skipped: {len(bad):,} unusable, listed in {folder / QUARANTINE}")
