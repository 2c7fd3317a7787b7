"""Splits of a source: folders by their usual names, by ``--splits``, or the rows of a list."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import Listing
from xcit_dino.data.pack.tables import read_text
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.split_names import SPLITS, split_folders
from xcit_dino.errors import InputError

NONE = ("none",)  # --splits none


class Found(NamedTuple):
    """Images by split, and how the source spells each split."""

    parts: dict[str, list[Image]]
    """The names of the images are without the folder of the split."""
    spelled: dict[str, str]
    notes: list[str]
    """What was renamed or skipped, a line each."""


def folders(image: Image) -> list[str]:
    return image.name.split("/")[:-1]


def unwrap(images: list[Image], keep: Collection[str] = (), splits: bool = True) -> list[Image]:
    """Take off folders that merely wrap everything: ``photos/CLASS/x.jpg`` -> ``CLASS/x.jpg``.

    Args:
        keep: names of classes, which are no wrappers.
        splits: a folder called like a split is no wrapper either.
    """
    while images:
        tops = {image.name.partition("/")[0] for image in images}
        flat = any("/" not in image.name for image in images)
        deeper = any(image.name.count("/") > 1 for image in images)
        if flat or len(tops) > 1 or not deeper or tops & set(keep):
            break
        if splits and split_folders(tops):
            break
        images = [image._replace(name=image.name.partition("/")[2]) for image in images]
    return images


# ---------------------------------------------------------------------------- by the names


def split_images(listing: Listing, config: MakeConfig) -> Found:
    """Images by split, the split's folder taken off their names."""
    if listing.is_list:
        return _list_splits(listing, config)
    images = unwrap(listing.images, splits=config.splits != NONE)
    if config.splits == NONE:
        return Found({"": images}, {}, [])
    if config.splits:
        if config.split is not None:
            raise InputError(f"--split {config.split}: --splits says already what becomes of it")
        found = given_splits(listing.images, config.splits, config.src)
    else:
        found = find_splits(images, config.src)
        if not found.spelled and str(config.labels or "folders") == "folders":
            found.notes.extend(_unnamed_splits(images))
    if config.split is not None and len(found.parts) > 1:
        named = " and ".join(found.spelled.values())
        raise InputError(
            f"--split {config.split}: {config.src} holds {named}; choose one with --splits "
            f"{config.split}={next(iter(found.spelled.values()))}, or give DST without its split"
        )
    return Found(_unwrapped(found), found.spelled, found.notes)


def _list_splits(listing: Listing, config: MakeConfig) -> Found:
    if config.splits:
        raise InputError(f"--splits: {config.src} is a list, whose rows say the split themselves")
    parts: dict[str, list[Image]] = {}
    for image in listing.images:
        parts.setdefault(image.split or "", []).append(image)
    if len(parts) > 1 and config.split is not None:
        raise InputError(f"--split {config.split}: the rows of {config.src} say the split")
    if len(parts) > 1 and "" in parts:
        raise InputError(f"{config.src}: {parts[''][0].name} has no split, though other rows have")
    if "test" in parts and "val" in parts:
        left = len(parts.pop("test"))
        listing.notes.append(f"skipped: {left:,} rows of the split test, because there is a val")
    return Found(parts, {}, [])


def _unwrapped(found: Found) -> dict[str, list[Image]]:
    """Take wrapping folders off each split; a folder that is a class in another one stays."""
    parts = found.parts if not found.spelled else {
        split: inner if len(top_folders(inner := unwrap(part, splits=False))) > 1 else part
        for split, part in found.parts.items()
    }  # fmt: skip
    classes = set[str]().union(*(tops for p in parts.values() if len(tops := top_folders(p)) > 1))
    return {split: unwrap(part, classes, splits=False) for split, part in parts.items()}


def top_folders(images: Sequence[Image]) -> set[str]:
    """Names of the outermost folders; images in none do not count."""
    return {above[0] for image in images if (above := folders(image))}


def find_splits(images: list[Image], src: str) -> Found:
    """Splits by the names of the folders, at whatever depth: ``train/cat/`` or ``cat/train/``.

    Raises:
        InputError: a layout that can be read in two ways; the message names the options.
    """
    paths = Counter(image.name.rpartition("/")[0] for image in images)
    above = {path: path.split("/") if path else [] for path in paths}
    for depth in range(max(map(len, above.values()), default=0)):
        known = split_folders({names[depth] for names in above.values() if len(names) > depth})
        if not known:
            continue
        others = sorted(
            "/".join(names[: depth + 1]) + "/"
            for names in above.values()
            if len(names) > depth and names[depth] not in known
        )
        shallow = any(len(names) <= depth for names in above.values())
        if not others and (depth == 0 or not shallow):
            return _taken(images, depth, known, src)
        if depth == 0 or len(set(known.values())) > 1:
            raise InputError(_ambiguous(src, depth, known, sorted(set(others))))
    return Found({"": images}, {}, [])


def _unnamed_splits(images: list[Image]) -> list[str]:
    """Note top folders that may be splits under other names: all hold folders of the same names."""
    inside: dict[str, set[str]] = {}
    for top, *deeper in filter(None, map(folders, images)):
        inside.setdefault(top, set()).add(deeper[0] if deeper else "")
    if len(inside) < 2 or "" in set().union(*inside.values()):
        return []
    shared = set.intersection(*inside.values())
    if len(shared) < 2 or 2 * len(shared) < len(set().union(*inside.values())):
        return []
    tops, within = sorted(inside), sorted(shared)
    pairs = " ".join(shlex.quote(f"{s}={top}") for s, top in zip(SPLITS, tops, strict=False))
    return [
        f"{_listed(tops)} are taken for classes, though all hold folders of the same names "
        f"({_listed(within)}); if they are splits: --splits {pairs}"
    ]


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 4 else ""
    return ", ".join(f"{name}/" for name in names[:4]) + more


def _ambiguous(src: str, depth: int, known: dict[str, str], others: list[str]) -> str:
    named = " and ".join(f"{name}/" for name in sorted(known))
    other = " ".join(others[:4])
    chosen = {split: name for name, split in sorted(known.items())}
    chosen = {s: chosen.get(s) or chosen.get("test" if s == "val" else "") for s in SPLITS}
    pairs = [f"{s}={'*/' * depth}{name}" for s, name in chosen.items() if name]
    option = " ".join(map(shlex.quote, pairs))
    return (
        f"{src}: {named} {'is' if len(known) == 1 else 'are'} called like a split, and beside it "
        f"there {'is' if len(others) == 1 else 'are'} {other or 'images without one'}; "
        f"--splits none: no splits, all are classes; --splits {option}: the others are skipped"
    )


def _taken(images: list[Image], depth: int, known: dict[str, str], src: str) -> Found:
    by_split: dict[str, list[str]] = {}
    for name, split in sorted(known.items()):
        by_split.setdefault(split, []).append(name)
    for split, names in by_split.items():
        if len(names) > 1:
            pairs = " ".join(shlex.quote(f"{s}={'*/' * depth}{n[0]}") for s, n in by_split.items())
            raise InputError(
                f"{src}: {' and '.join(names)} are both called like {split}; choose with "
                f"--splits, such as --splits {pairs} (--splits none: they are classes)"
            )
    notes = []
    if "val" in by_split and "test" in by_split:
        name = by_split.pop("test")[0]
        left = sum(folders(i)[depth : depth + 1] == [name] for i in images)
        notes.append(
            f"skipped: {left:,} images in {name}/, because {by_split['val'][0]}/ is the "
            "validation set; --splits says it otherwise"
        )
    elif "test" in by_split:
        by_split["val"] = by_split.pop("test")
    spelled = {split: names[0] for split, names in by_split.items()}
    parts: dict[str, list[Image]] = {split: [] for split in SPLITS if split in spelled}
    target = {name: split for split, name in spelled.items()}
    shallow = 0
    for image in images:
        above = folders(image)
        if len(above) <= depth:
            shallow += 1
        elif split := target.get(above[depth]):
            rest = [*above[:depth], *image.name.split("/")[depth + 1 :]]
            parts[split].append(image._replace(name="/".join(rest)))
    if shallow:
        notes.append(f"skipped: {shallow:,} files outside {' and '.join(sorted(target))}")
    return Found(parts, {s: "*/" * depth + name for s, name in spelled.items()}, notes)


# ---------------------------------------------------------------------------- --splits


def given_splits(raw: list[Image], options: Sequence[str], src: str) -> Found:
    """Splits as ``--splits SPLIT=FOLDER ...`` names them.

    FOLDER is a path below the source (or below the folder that wraps all of it); a ``*`` stands
    for any one folder and stays in the names: ``train=*/train`` for ``CLASS/train/x.jpg``.

    Raises:
        InputError: no such folder, or options that are none.
    """
    patterns: dict[str, list[str]] = {}
    for option in options:
        split, _, folder = option.partition("=")
        if not split.isidentifier() or not folder.strip("/"):
            raise InputError(
                f"--splits {option}: expected SPLIT=FOLDER, such as train=Training, or none"
            )
        patterns[split] = folder.strip("/").split("/")
    if lists := {s: o.partition("=")[2] for s, o in zip(patterns, options, strict=True)
                 if o.endswith(".txt")}:  # fmt: skip
        if len(lists) < len(patterns):
            raise InputError("--splits: name folders or text files, not both")
        return listed_splits(raw, lists, src)
    for images in (raw, unwrap(raw)):
        parts, left = _matched(images, patterns)
        if all(parts.values()):
            _check_inner(parts, patterns)
            notes = [f"skipped: {left:,} images outside --splits"] if left else []
            spelled = {split: "/".join(parts) for split, parts in patterns.items()}
            return Found(parts, spelled, notes)
    parts, _ = _matched(raw, patterns)
    missing = next(split for split, part in parts.items() if not part)
    there = sorted({"/".join(folders(image)[:2]) for image in raw} - {""})
    raise InputError(
        f"--splits {missing}={'/'.join(patterns[missing])}: {src} has no images in such a folder; "
        f"it has {', '.join(there[:6]) or 'no folders'}"
    )


def listed_splits(raw: list[Image], lists: dict[str, str], src: str) -> Found:
    """Splits by text files that name an image per line, with or without folder and suffix.

    Raises:
        InputError: a file cannot be read, or names no image, or one image is in two of them.
    """
    by_stem: dict[str, list[Image]] = {}
    for image in raw:
        by_stem.setdefault(PurePosixPath(image.name).stem, []).append(image)
    parts: dict[str, list[Image]] = {}
    notes, taken = [], dict[str, str]()
    for split, file in lists.items():
        path = Path(file) if Path(file).is_file() else Path(src) / file
        if not path.is_file():
            raise InputError(f"--splits {split}={file}: no such file, neither here nor in {src}")
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        parts[split], missing = [], []
        for name in names:
            fitting = _fitting(name, by_stem)
            if len(fitting) > 1:
                raise InputError(
                    f"--splits {split}={file}: {name} may be {fitting[0].name} or "
                    f"{fitting[1].name}; write the folder too"
                )
            if not fitting:
                missing.append(name)
                continue
            if (other := taken.setdefault(fitting[0].name, split)) != split:
                raise InputError(f"--splits {split}={file}: {name} is in {other} too")
            parts[split].append(fitting[0])
        if not parts[split]:
            first = names[0] if names else "missing"
            raise InputError(
                f"--splits {split}={file}: none of its {len(names):,} lines names an image of "
                f"{src} (the first is {first})"
            )
        if missing:
            notes.append(
                f"skipped: {len(missing):,} images of {file} that {src} lacks (the first: "
                f"{missing[0]})"
            )
    if left := len(raw) - len(taken):
        notes.append(f"skipped: {left:,} images outside --splits")
    return Found(parts, {split: split for split in parts}, notes)


def _fitting(name: str, by_stem: dict[str, list[Image]]) -> list[Image]:
    """The images that a line of a list may mean."""
    path = PurePosixPath(name)
    exact = [i for i in by_stem.get(path.stem, []) if f"/{i.name}".endswith("/" + name.lstrip("/"))]
    found = exact or [i for i in by_stem.get(path.name, []) if _ends(i.name, path)]
    return found


def _ends(name: str, path: PurePosixPath) -> bool:
    """Whether a name without its suffix ends with a path."""
    return f"/{PurePosixPath(name).with_suffix('')}".endswith(f"/{path}")


def _check_inner(parts: dict[str, list[Image]], patterns: dict[str, list[str]]) -> None:
    """Refuse splits inside a split, which would be taken for classes."""
    for split, part in parts.items():
        tops = {above[0] for image in part if (above := folders(image))}
        inner = split_folders(tops)
        if set(inner) == tops and len(set(inner.values())) > 1:
            folder = "/".join(patterns[split])
            pairs = " ".join(shlex.quote(f"{s}={folder}/{n}") for n, s in sorted(inner.items()))
            raise InputError(
                f"--splits {split}={folder}: that folder holds splits itself; name them: "
                f"--splits {pairs}"
            )


def _matched(
    images: list[Image], patterns: dict[str, list[str]]
) -> tuple[dict[str, list[Image]], int]:
    parts: dict[str, list[Image]] = {split: [] for split in patterns}
    left = 0
    for image in images:
        above, file = folders(image), image.name.rpartition("/")[2]
        for split, pattern in patterns.items():
            if len(above) >= len(pattern) and all(map(fnmatchcase, above, pattern)):
                kept = [name for name, part in zip(above, pattern, strict=False) if part == "*"]
                name = "/".join([*kept, *above[len(pattern) :], file])
                parts[split].append(image._replace(name=name))
                break
        else:
            left += 1
    return parts, left
