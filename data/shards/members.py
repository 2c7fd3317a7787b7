"""Which members of a sample are its image and its label, in shards made by any tool."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from xcit_dino.data.shards.index import KEY, MAX_LABEL
from xcit_dino.data.shards.tar import Member, ReadAt, scan
from xcit_dino.errors import InputError

MAX_TEXT = 1 << 20  # bytes of a .json that may hold a label
SHOWN = 16
NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
CAPTIONS = 1000  # so many different texts, each of them but once or twice, are no classes


class Members(NamedTuple):
    """Which members to take; the defaults are those of WebDataset."""

    image: str | None = None
    """Extension of the image (``jpg``, ``left.png``); None: the first that an image can have."""
    label: str = "cls"
    """Extension of the label; ``json:FIELD`` a field of a ``.json``, with dots for inner ones."""
    numbers: dict[str, int] | None = None
    """Numbers of labels that are words."""

    @property
    def extension(self) -> str:
        """Of the member that holds the label."""
        return self.label.partition(":")[0]

    def dump(self) -> dict[str, str | None] | None:
        """For ``index.json``; None for the defaults."""
        chosen = {"image": self.image, "label": self.label}
        return None if chosen == {"image": None, "label": "cls"} else chosen


WEBDATASET = Members()


def parse_members(image_key: str | None, label_key: str | None) -> Members:
    """The options ``--image_key`` and ``--label_key``."""
    image = image_key.lower().lstrip(".") if image_key else None
    label = (label_key or "cls").lstrip(".")
    extension, _, name = label.partition(":")
    if bool(name) != (extension.lower() == "json"):
        raise InputError(
            f"--label_key {label_key}: expected an extension such as cls or txt, or json:FIELD, "
            "such as json:label"
        )
    return Members(image, f"json:{name}" if name else extension.lower())


def members_of(meta: dict[str, Any], classes: list[str] | None) -> Members:
    """What an ``index.json`` says, with the numbers of its classes."""
    found = meta.get("members") or {}
    names = {name: number for number, name in enumerate(classes or [])}
    label = found.get("label") or "cls"
    return Members(found.get("image"), label, names if classes and label != "cls" else None)


def read_label(member: Member, read_at: ReadAt, members: Members) -> tuple[int, str]:
    """(number, or -1; what stands there)."""
    text = label_text(member, read_at, members)
    if text is None:
        return -1, ""
    if members.numbers is not None and text in members.numbers:
        return members.numbers[text], text
    digits = text.partition(".")[0] if members.label != "cls" and NUMBER.fullmatch(text) else text
    valid = digits.isascii() and digits.isdigit() and int(digits) <= MAX_LABEL
    return (int(digits) if valid else -1), text


def label_text(member: Member, read_at: ReadAt, members: Members) -> str | None:
    """The label as it is written; None where there is none."""
    if members.label == "cls":
        raw = read_at(member.offset, min(member.size, SHOWN))
        return raw.strip().decode("utf-8", "replace")
    raw = read_at(member.offset, min(member.size, MAX_TEXT))
    if members.extension != "json":
        return raw.decode("utf-8", "replace").strip() or None
    try:
        value = json.loads(raw)
        for name in members.label.partition(":")[2].split("."):
            value = value[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if value is None or isinstance(value, list | dict):
        return None
    return str(value).strip() or None


def count_labels(read_at: ReadAt, end: int, members: Members) -> Counter[str]:
    """How often each label stands in a tar."""
    return Counter(
        text
        for member in _labels(read_at, end, members)
        if (text := label_text(member, read_at, members)) is not None
    )


def _labels(read_at: ReadAt, end: int, members: Members) -> Iterator[Member]:
    for member in scan(read_at, end):
        match = KEY.match(member.name)
        if isinstance(member, Member) and match and match[2].lower() == members.extension:
            yield member


def class_names(found: Counter[str], label: str, known: list[str] | None) -> list[str] | None:
    """The classes that the labels of all shards name; None where they are numbers.

    Raises:
        InputError: there are none, or they are no classes.
    """
    if not found:
        raise InputError(f"--label_key {label}: no sample has such a label")
    words = sorted(text for text in found if not NUMBER.fullmatch(text))
    if not words:
        return known
    if known is not None:
        return known
    if len(words) < len(found):
        raise InputError(f"--label_key {label}: labels are numbers, but {words[0][:60]!r} is none")
    if len(words) > max(CAPTIONS, found.total() // 3):
        raise InputError(
            f"--label_key {label}: {len(words):,} different texts in {found.total():,} samples "
            f"are no classes (the first is {words[0][:60]!r})"
        )
    return words
