"""``xcit-dino shards check DST``: verify that all samples are present, whole and decodable.

Shards that have no index (img2dataset's, or any WebDataset tars) get one first, from their headers.
With ``--nodes`` or ``--gpus`` a preflight reports whether the data fit a planned run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.pack.archives import compressed, compressed_in, decompression
from xcit_dino.data.pack.shard_job import PLAN, QUARANTINE
from xcit_dino.data.pack.tables import read_text
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.pixels import RGB8, PixelFormat, Statistics
from xcit_dino.data.shards.config import CheckConfig
from xcit_dino.data.shards.foreign import find_pixels
from xcit_dino.data.shards.index import INDEX, ShardIndex, is_url
from xcit_dino.data.shards.index_writer import ShardPart, write_index
from xcit_dino.data.shards.kinds import PixelOptions, lines_on
from xcit_dino.data.shards.members import (
    Members,
    class_names,
    count_labels,
    members_of,
    parse_members,
)
from xcit_dino.data.shards.preflight import preflight
from xcit_dino.data.shards.scan import APART, IMAGE_EXTENSIONS, scan_shard
from xcit_dino.data.shards.split_names import SPLITS, split_folders, split_of
from xcit_dino.data.shards.verify import Finding, verify_shards
from xcit_dino.errors import InputError
from xcit_dino.files import write_atomic
from xcit_dino.progress import progress

REPORT = "check.jsonl"
SHOWN = 20  # problems printed; all of them are in the report


def check(config: CheckConfig) -> int:
    """Check every split below ``config.dst``; returns 1 if anything is wrong with a sample.

    Raises:
        InputError: no shards there.
    """
    if is_url(config.dst):
        raise InputError(
            f"{config.dst}: check shards where they lie on a disk; their index.json and "
            "index.*.npy can then be copied beside them"
        )
    problems = 0
    folders = _folders(Path(config.dst))
    if not config.rebuild and all((f / INDEX).exists() for f in folders):
        options = ("page", "nodata", "max_pixels", "image_key", "label_key")
        given = {"hash": config.hash, "pixels": config.pixels != "auto"} | {
            name: getattr(config, name) is not None for name in options
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(f"--{name}: the shards have an index already; add --rebuild")
    for folder in folders:
        try:
            if config.rebuild or not (folder / INDEX).exists():
                build_index(folder, config)
        except OSError as error:
            raise InputError(f"{folder}: the index cannot be written: {error.strerror}") from None
        index = ShardIndex.load(folder)
        finding = verify_shards(index, config.sample, config.num_workers)
        problems += len(finding.bad)
        _report(index, finding)
        is_train = split_of(folder.name)[0] not in ("val", "test")
        if (config.nodes is not None or config.gpus is not None) and is_train:
            for line in preflight(index.num_samples, int(index.sizes.mean()), finding, config):
                print(line)
    return 1 if problems else 0


def _folders(dst: Path) -> list[Path]:
    """The folders of shards below ``dst``, one a split."""
    if not dst.is_dir():
        raise InputError(f"{dst}: no such folder")
    if (dst / INDEX).exists():
        return [dst]
    below = sorted(path for path in dst.iterdir() if path.is_dir() and _holds_shards(path))
    known = split_folders(path.name for path in below)
    loose = [name for name in _tars(dst) if "/" not in name]
    if known and not loose:
        for path in below:
            if path.name in known:
                _print_split(path, known)
            else:
                print(f"skipped: {path} holds shards, but its name is not that of a split")
        return [path for path in below if path.name in known]
    if packed := compressed_in(dst):
        raise InputError(
            f"{packed[0]} is compressed, and shards are read at any place; decompress them: "
            f"{decompression(dst, packed[0])}"
        )
    if not _tars(dst):
        raise InputError(
            f"{dst} holds no shards (*.tar); make some: xcit-dino shards make SRC {dst}"
        )
    names = {name: split_of(name.removesuffix(".tar"))[0] for name in _tars(dst)}
    if len(splits := sorted(set(filter(None, names.values())))) > 1:
        example = next(name for name, split in names.items() if split == splits[0])
        raise InputError(
            f"{dst} holds shards of {' and '.join(splits)} together, by their names ({example}); "
            f"move each into a folder of its own, {dst}/train and {dst}/val, or every image would "
            "be a training image"
        )
    return [dst]


def _holds_shards(folder: Path) -> bool:
    return (folder / INDEX).exists() or bool(_tars(folder))


def _print_split(folder: Path, known: dict[str, str]) -> None:
    """Print which split a folder serves as, if its name is another."""
    split = known[folder.name]
    others = [name for name, other in known.items() if other == "val"]
    if split == "test" and others:
        print(f"split: {folder} is used by no command, because {others[0]} is the validation set")
    elif folder.name not in SPLITS:
        print(f"split: {folder} serves as {'val' if split == 'test' else split}")


def _tars(folder: Path) -> list[str]:
    """Names of the shards below a folder, in the order in which they are numbered."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.tar") if path.is_file())
    return sorted(str(p) for p in paths if not any(part.startswith(".") for part in p.parts))


# ---------------------------------------------------------------------------- building an index


def build_index(folder: Path, config: CheckConfig) -> None:
    """Index the shards of a folder from their headers.

    Class names are kept if an earlier index or a ``classes.txt`` (one per line) lists them, and so
    are those of masks and boxes (``target_classes.txt``).
    """
    names, classes = _tars(folder), _classes(folder)
    for name in names:
        if compressed(folder / name):
            command = decompression(folder, folder / name)
            raise InputError(
                f"{folder / name} is compressed, and shards are read at any place; decompress "
                f"them: {command}"
            )
    members = _members(folder, config)
    if members.label != "cls":
        found = Counter[str]()
        tasks = [(str(folder), name, members) for name in names]
        with progress(f"Read labels of {folder.name}", len(names), "shards") as bar:
            for counts in map_processes(_count_labels, tasks, config.num_workers, bar):
                found += counts
        classes = class_names(found, members.label, classes)
        members = members_of({"members": members.dump()}, classes)
    tasks = [(str(folder), name, config.hash or _hashed(folder), members) for name in names]
    with progress(f"Index {folder.name}", len(names), "shards") as bar:
        parts = map_processes(_index_shard, tasks, config.num_workers, bar)
        options = _options(folder, config)
        write_index(
            folder,
            parts,
            classes,
            lambda index: find_pixels(index, options, config),
            _classes(folder, "target_classes"),
            members.dump(),
        )
    if not ShardIndex.load(folder).num_samples:
        (folder / INDEX).unlink()
        raise InputError(f"{folder}: its {len(names)} tars hold no images")


def _options(folder: Path, config: CheckConfig) -> PixelOptions:
    """What the command line says of the pixels, otherwise what the present index does."""
    options = PixelOptions.of(config)
    with contextlib.suppress(InputError):
        before = ShardIndex.load(folder).pixels
        if options == PixelOptions.of(CheckConfig(dst=config.dst)) and before != RGB8:
            return PixelOptions(before.name, before.page, before.nodata, before.max_pixels)
    return options


def _members(folder: Path, config: CheckConfig) -> Members:
    """What the options say, else the present index."""
    if config.image_key or config.label_key:
        return parse_members(config.image_key, config.label_key)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return members_of(json.loads((folder / INDEX).read_bytes()), None)
    return Members()


def _count_labels(task: tuple[str, str, Members], advance: Advance) -> Counter[str]:
    folder, name, members = task
    path = Path(folder) / name
    with path.open("rb") as file:
        descriptor = file.fileno()
        counts = count_labels(
            lambda at, length: os.pread(descriptor, length, at), path.stat().st_size, members
        )
    advance(1)
    return counts


def _index_shard(task: tuple[str, str, bool, Members], advance: Advance) -> ShardPart:
    folder, name, with_sha256, members = task
    part = scan_shard(folder, name, with_sha256=with_sha256, members=members)
    advance(1)
    return part


def _classes(folder: Path, kind: str = "classes") -> list[str] | None:
    """Names of the labels' classes, or of the targets' (``kind`` ``target_classes``)."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        classes = json.loads((folder / INDEX).read_bytes())[kind]
        if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
            return classes
    if not (folder / f"{kind}.txt").exists():
        return None
    return read_text(folder / f"{kind}.txt").rstrip().splitlines()


def _hashed(folder: Path) -> bool:
    """Whether the present index has checksums, which a new one should keep."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        shards = json.loads((folder / INDEX).read_bytes())["shards"]
        return bool(shards) and all(shard["sha256"] for shard in shards)
    return False


# ---------------------------------------------------------------------------- the report


def _report(index: ShardIndex, finding: Finding) -> None:
    """A table of what was checked, and the first problems; all of them go into check.jsonl."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "result", title=escape(index.root), title_justify="left")
    for name, value in _rows(index, finding):
        table.add_row(name, escape(value))
    console = Console()
    console.print(table)
    if index.pixels.statistics is not None:
        console.print(_channels(index.pixels, index.pixels.statistics))
        for line in lines_on(index.pixels)[1:]:
            console.print(escape(f"  {line}"), soft_wrap=True)
    hints = _hints(index, finding)
    for line in [*_packing_notes(Path(index.root)), *hints, *finding.deep.lines()]:
        console.print(escape(f"  {line}"), soft_wrap=True)
    for item in finding.bad[:SHOWN]:
        line = escape(f"  {item['shard']} {item['key']}: {item['reason']}")
        console.print(line, style="red", soft_wrap=True)
    report = Path(index.root) / REPORT
    if not finding.bad:
        with contextlib.suppress(OSError):
            report.unlink(missing_ok=True)  # of an earlier check
    else:
        where = _write_report(report, finding)
        console.print(f"[bold red]{len(finding.bad):,} problems[/] {escape(where)}", soft_wrap=True)


def _channels(form: PixelFormat, found: Statistics) -> Any:
    """A table of the statistics of each channel."""
    from rich.table import Table

    names = ("channel", "min", "0.1 %", "median", "99.9 %", "max", "mean", "std", "invalid")
    title = f"{form.name}, measured on {found.images:,} images"
    table = Table(*names, title=title, title_justify="left")
    low, mid, high = (found.percentile(share) for share in (0.1, 50, 99.9))
    columns = (found.minimum, low, mid, high, found.maximum, found.mean, found.std)
    for c, row in enumerate(zip(*columns, strict=True)):
        numbers = (f"{value:,.6g}" for value in row)
        table.add_row(str(c + 1), *numbers, f"{found.invalid[c]:.3%}")
    return table


def _hints(index: ShardIndex, finding: Finding) -> Iterator[str]:
    """Options that would take what was not read."""
    if (Path(index.root) / PLAN).exists():
        return
    others = [k for k in finding.passed if k.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if others and not finding.members.image:
        other = others[0].removeprefix(".")
        yield f"several images a sample: --rebuild --image_key {other} takes the .{other}"
    if not (np.asarray(index.labels) >= 0).any():
        keys = {".txt": "txt", ".json": "json:FIELD"}
        for kind in keys.keys() & finding.passed.keys():
            yield f"no labels; --rebuild --label_key {keys[kind]} reads them from the {kind}"


def _packing_notes(folder: Path) -> list[str]:
    """What ``shards make`` renamed or skipped when it packed these shards."""
    notes: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        notes = [str(line) for line in json.loads((folder / PLAN).read_bytes())["notes"]]
    with contextlib.suppress(OSError):
        count = (folder / QUARANTINE).read_bytes().count(b"\n")
        notes.append(f"skipped: {count:,} unusable, listed in {folder / QUARANTINE}")
    return notes


def _write_report(path: Path, finding: Finding) -> str:
    try:
        lines = (json.dumps(item, sort_keys=True).encode() + b"\n" for item in finding.bad)
        write_atomic(path, lines)
    except OSError as error:  # shards are often kept read-only
        return f"(the first {SHOWN} above; {path} cannot be written: {error.strerror})"
    return f"(all in {path})"


def _rows(index: ShardIndex, finding: Finding) -> Iterator[tuple[str, str]]:
    counts, num_bytes = index.counts, index.shard_bytes
    yield "samples", f"{index.num_samples:,}"
    if not index.pixels.is_rgb8:
        yield "pixels", _pixels(index.pixels)
    yield (
        "shards",
        (
            f"{len(index.shards):,} of {counts.min():,} to {counts.max():,} samples, "
            f"{num_bytes.sum() / 1e6:,.1f} MB"
        ),
    )
    yield "image bytes", f"mean {index.sizes.mean() / 1e3:,.1f} kB, largest {index.sizes.max():,}"
    yield "checksums", f"{finding.hashed:,} of {len(index.shards):,} shards have one, compared"
    rate = finding.decoded / max(finding.seconds, 1e-9)
    yield "decoded", f"{finding.decoded:,} images, {rate:,.0f} a second a core"
    yield "duplicate keys", _duplicates(finding)
    yield "labels", _balance(index)
    if index.targets:
        yield "targets", _targets(index, finding)
    if apart := finding.passed[APART]:
        yield "joined by key", f"{apart:,} {APART}"
    kinds = [(kind, n) for kind, n in finding.passed.most_common() if kind not in (".json", APART)]
    if kinds:
        yield "not read", ", ".join(f"{n:,} {kind}" for kind, n in kinds[:6])
    yield "problems", f"{len(finding.bad):,}" if finding.bad else "none"
    yield "index", index.checksum[:16]


def _pixels(form: PixelFormat) -> str:
    line = lines_on(form)[0].removeprefix("pixels: ")
    page = f", page {form.page}" if form.page is not None else ""
    return line + page + (f", no-data {form.nodata:g}" if form.nodata is not None else "")


def _duplicates(finding: Finding) -> str:
    inside = sum(item["reason"] == "duplicate key" for item in finding.bad)
    across = finding.keys_across
    return f"{inside:,} in a shard, {across:,} across shards" + (" (harmless here)" * (across > 0))


def _targets(index: ShardIndex, finding: Finding) -> str:
    assert index.target_sizes is not None
    names = index.target_classes or []
    without = int((np.asarray(index.target_sizes) == 0).sum())
    empty = [name for number, name in enumerate(names) if not finding.instances[number]]
    text = f"{index.targets} of {len(names) or 'unnamed'} classes, {without:,} images without"
    if index.targets == "values":
        return f"values of {', '.join(names) or 'unnamed quantities'}, {without:,} images without"
    if empty:
        text += f"; in none of {finding.targets:,} read: {', '.join(empty[:6])}"
        text += f" and {len(empty) - 6} more" if len(empty) > 6 else ""
    return text


def _balance(index: ShardIndex) -> str:
    labels = np.asarray(index.labels)
    counts = np.bincount(labels[labels >= 0])
    if not counts.sum():
        return "none"
    num_classes = len(index.classes) if index.classes else len(counts)
    counts = np.pad(counts, (0, max(0, num_classes - len(counts))))
    empty = int((counts == 0).sum())
    without = f", {empty:,} of them without images" if empty else ""
    return (
        f"{num_classes:,} classes of {counts.min():,} to {counts.max():,} images{without} "
        f"(median {np.median(counts):,.0f}), {(labels < 0).sum():,} images without"
    )
