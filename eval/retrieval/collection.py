"""What is searched for in what: Oxford and Paris revisited, Copydays, or any folders of images."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.pack.listing import hidden
from xcit_dino.errors import InputError, one_line
from xcit_dino.eval.pictures.media import SUFFIXES
from xcit_dino.eval.retrieval.config import RetrieveConfig
from xcit_dino.eval.retrieval.ranking import Truth
from xcit_dino.models.weights.formats import read_pickle

ORIGINAL, STRONG = "original", "strong"  # folders of Copydays
KINDS = 6  # of files, in a message
COPYDAYS_DEPTH = 20  # images of a ranking that count (DINO)
SETUPS = {  # of Oxford and Paris revisited -> (relevant, junk): kinds of images in the ground truth
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class Collection:
    """Images to search for and to search in."""

    kind: str
    """``roxford5k``, ``rparis6k``, ``copydays`` or ``folders``."""
    queries: list[Path]
    bank: list[Path]
    roots: tuple[Path, Path]
    """Folders of queries and bank, to which names are relative."""
    truths: dict[str, list[Truth]]
    """Setup -> a truth for each query; the metrics of setup ``hard`` are called ``map_hard``, those
    of ``""`` plainly ``map``."""
    depth: int | None = None
    """Images of a ranking that count; None: all."""
    distractors: list[Path] = field(default_factory=list)
    """Part of the bank, its last ones."""

    def name_of_query(self, number: int) -> str:
        """Path of a query below its folder."""
        return self.queries[number].relative_to(self.roots[0]).as_posix()

    def name_in_bank(self, row: int) -> str:
        """Path of an image below its folder, of a distractor as it was found."""
        path = self.bank[row]
        own = row < len(self.bank) - len(self.distractors)
        return path.relative_to(self.roots[1]).as_posix() if own else str(path)

    def checksum(self) -> str:
        """Of names and sizes of all images, and of what is relevant."""
        found = hashlib.sha256()
        for path in (*self.queries, *self.bank):
            size = path.stat().st_size if path.exists() else None
            found.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
        for setup, truths in self.truths.items():
            found.update(setup.encode())
            for truth in truths:
                found.update(truth.relevant.tobytes() + b"|" + truth.junk.tobytes() + b"\n")
        return found.hexdigest()


def open_collection(config: RetrieveConfig) -> Collection:
    """The images that the options name; the layout is recognized by what the folder holds.

    Raises:
        InputError: missing folders or images, or a ground truth that cannot be used.
    """
    if config.bank is None:
        raise InputError("--bank: name the folder of the images to search")
    folder = existing(config.bank, "bank")
    ground_truth = sorted(folder.glob("gnd_*.pkl"))
    copydays = (folder / ORIGINAL).is_dir()
    if (ground_truth or copydays) and (config.queries or config.relevant):
        option = "queries" if config.queries else "relevant"
        raise InputError(f"--{option}: not beside {folder}, which has its own; leave it out")
    if ground_truth:
        found = revisited(ground_truth[0], folder / "jpg")
    else:
        found = copies(folder) if copydays else own_folders(config, folder)
    distractors = images_below(config.distractors, "distractors") if config.distractors else []
    if shared := common(distractors, found.bank):
        raise InputError(
            f"--distractors {config.distractors}: {shared:,} of its images are in the bank "
            "already; name a folder of others"
        )
    return Collection(
        found.kind, found.queries, [*found.bank, *distractors], found.roots, found.truths,
        found.depth, distractors,
    )  # fmt: skip


def existing(folder: Path, option: str) -> Path:
    """The folder; raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"--{option} {folder}: no such folder")
    return folder


def images_below(folder: Path, option: str) -> list[Path]:
    """All images in a folder and below it but hidden ones (macOS's ``._a.jpg``), sorted by path.

    Raises:
        InputError: there is none.
    """
    found = (p for p in existing(folder, option).rglob("*") if p.suffix.lower() in SUFFIXES)
    paths = sorted(p for p in found if not hidden(p.relative_to(folder).as_posix()))
    if not paths:
        raise InputError(f"--{option} {folder}: holds no images")
    return paths


def common(one: Sequence[Path], other: Sequence[Path]) -> int:
    """How many files are in both."""
    return len({path.resolve() for path in one} & {path.resolve() for path in other})


def other_files(config: RetrieveConfig) -> Iterator[str]:
    """A line for each folder that holds files that are not read, without hidden ones and what
    belongs to a benchmark."""
    given = (config.bank, config.queries, config.distractors, config.whitening)
    for folder in dict.fromkeys(filter(None, given)):
        found = [
            path.suffix.lower() or "no suffix"
            for path in folder.rglob("*")
            if path.suffix.lower() not in (*SUFFIXES, ".pkl") and path.name[0] != "."
            if path.is_file()
        ]
        if found:
            kinds = ", ".join(sorted(set(found))[:KINDS])
            yield f"skipped: {len(found):,} files in {folder} that are no images ({kinds})"


# -- Oxford and Paris revisited --------------------------------------------------------------------


def revisited(ground_truth: Path, images: Path) -> Collection:
    """Oxford or Paris revisited (arXiv 1803.11285): ``gnd_roxford5k.pkl`` and the folder ``jpg``.

    The pickle is read without executing anything in it.

    Raises:
        InputError: it is damaged, or names images that are missing.
    """
    try:
        tree, _ = read_pickle(ground_truth)
        names = [[str(name) for name in tree[key]] for key in ("qimlist", "imlist")]
        kinds = [
            {kind: numbers(query[kind], len(names[1])) for kind in ("easy", "hard", "junk")}
            for query in tree["gnd"]
        ]
        if len(kinds) != len(names[0]):
            raise ValueError(f"{len(kinds)} truths for {len(names[0])} queries")
    except Exception as error:  # a pickle raises many kinds
        raise InputError(
            f"{ground_truth}: not the ground truth of Oxford or Paris revisited "
            f"({one_line(error, 120)}); get the file again"
        ) from error
    paths = [[images / f"{name}.jpg" for name in part] for part in names]
    if missing := [path for part in paths for path in part if not path.is_file()]:
        raise InputError(
            f"--bank {images.parent}: {len(missing):,} of its images are missing, among them "
            f"{missing[0]}; unpack them there"
        )
    truths = {
        setup: [
            Truth(*(np.concatenate([query[kind] for kind in part]) for part in parts))
            for query in kinds
        ]
        for setup, parts in SETUPS.items()
    }
    kind = ground_truth.stem.removeprefix("gnd_")
    return Collection(kind, paths[0], paths[1], (images, images), truths)


def numbers(values: Any, count: int) -> np.ndarray:
    """int64 [n]: row numbers in a ground truth, a list or an array.

    Raises:
        ValueError: they are not from 0 to ``count`` - 1.
    """
    plain = values.array() if hasattr(values, "array") else values
    found = np.array(plain, np.float64).ravel().astype(np.int64)  # empty arrays are of floats
    if len(found) and not 0 <= found.min() <= found.max() < count:
        raise ValueError(f"image numbers from {found.min()} to {found.max()} of {count} images")
    return found


# -- Copydays --------------------------------------------------------------------------------------


def copies(folder: Path) -> Collection:
    """Copydays: ``original`` is the bank, every other folder (``strong``, ``crops/10`` ...) a
    setup. A copy has its original's name, in ``strong`` the first four characters of it.

    Raises:
        InputError: no copies, or none of an original.
    """
    bank = images_below(folder / ORIGINAL, "bank")
    known: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for row, path in enumerate(bank):
        known[False, path.stem].append(row)
        known[True, path.stem[:4]].append(row)
    everything = images_below(folder, "bank")
    queries = [path for path in everything if not path.is_relative_to(folder / ORIGINAL)]
    blocks = [path.parent.relative_to(folder).as_posix() for path in queries]
    relevant = [
        known.get((True, path.stem[:4]) if block == STRONG else (False, path.stem), [])
        for path, block in zip(queries, blocks, strict=True)
    ]
    if not any(relevant):
        raise InputError(
            f"--bank {folder}: no copy of an image in {ORIGINAL} is in the other folders; "
            "give them the same names"
        )
    names = sorted(set(blocks), key=lambda name: (name != STRONG, len(name), name))
    truths = {"": [Truth(np.array(rows, np.int64)) for rows in relevant]}
    for name in names:
        own = zip(truths[""], blocks, strict=True)
        truths[name.replace("/", "_")] = [truth if b == name else Truth() for truth, b in own]
    return Collection(
        "copydays", queries, bank, (folder, folder / ORIGINAL), truths, COPYDAYS_DEPTH
    )


# -- any folders -----------------------------------------------------------------------------------


def own_folders(config: RetrieveConfig, folder: Path) -> Collection:
    """Images of one folder in those of another, or in the others of the same; what is relevant by
    a table or by names of folders, if at all."""
    bank = images_below(folder, "bank")
    root = config.queries or folder
    queries = images_below(root, "queries") if config.queries else bank
    rows = {path.resolve(): row for row, path in enumerate(bank)}
    same = [rows.get(path.resolve()) for path in queries]
    roots = (root, folder)
    relevant = (
        by_table(config.relevant, queries, bank, roots)
        if config.relevant
        else by_folders(queries, bank, roots)
    )
    truths = [truth_of(found, own) for found, own in zip(relevant, same, strict=True)]
    return Collection("folders", queries, bank, roots, {"": truths})


def truth_of(relevant: Sequence[int], own: int | None) -> Truth:
    """The query itself is junk where it lies in the bank."""
    junk = np.array([] if own is None else [own], np.int64)
    found = np.unique(np.array(relevant, np.int64))
    return Truth(found[~np.isin(found, junk)], junk)


def by_folders(
    queries: Sequence[Path], bank: Sequence[Path], roots: tuple[Path, Path]
) -> list[list[int]]:
    """Rows of the bank in a folder of the same name as the query's, below both roots."""
    classes: dict[str, list[int]] = defaultdict(list)
    for row, path in enumerate(bank):
        if path.parent != roots[1]:
            classes[path.parent.relative_to(roots[1]).as_posix()].append(row)
    return [classes.get(path.parent.relative_to(roots[0]).as_posix(), []) for path in queries]


def by_table(
    table: Path, queries: Sequence[Path], bank: Sequence[Path], roots: tuple[Path, Path]
) -> list[list[int]]:
    """Rows of the bank that a table names for each query.

    Raises:
        InputError: it cannot be read, lacks a column, or names images that are not there.
    """
    places, rows = (
        {path.relative_to(root).as_posix(): number for number, path in enumerate(paths)}
        for paths, root in zip((queries, bank), roots, strict=True)
    )
    found: list[list[int]] = [[] for _ in queries]
    unknown = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := {"query", "image"} - set(reader.fieldnames or ()):
                raise InputError(
                    f"--relevant {table}: has no column {sorted(missing)[0]}; its first line must "
                    "be: query,image"
                )
            for line in reader:
                query, image = line["query"], line["image"]
                unknown += [name for name, known in ((query, places), (image, rows))
                            if name not in known]  # fmt: skip
                if query in places and image in rows:
                    found[places[query]].append(rows[image])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"--relevant {table}: cannot be read ({one_line(error, 120)}); give a table with "
            "columns query and image"
        ) from error
    if unknown:
        raise InputError(
            f"--relevant {table}: {len(unknown):,} of its names are not among the images, the "
            f"first is {unknown[0]}; give paths below {roots[0]} and {roots[1]}"
        )
    return found
