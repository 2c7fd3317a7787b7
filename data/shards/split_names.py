"""Names of folders that are splits, in the spellings that people use."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPLITS = ("train", "val")
WORDS = {
    word: split
    for split, words in {
        "train": "train training trn trainval",
        "val": "val valid validation dev eval",
        "test": "test testing tst",
    }.items()
    for word in words.split()
}
WORD = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})(set|data|images|imgs)?")
FILLERS = set("set data dataset image images img imgs split folder".split())


def split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """(train, val or test; the other words) of a folder's name; ("", ()) for any other name.

    ``Training``, ``test_set``, ``val2017`` and ``TrainImages`` have no other words, ``seg_train``
    has one.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = [word for word in re.findall(r"[^\W\d_]+", spaced) if word not in FILLERS]
    hits = [match for word in words if (match := WORD.fullmatch(word))]
    if len(hits) != 1:
        return "", ()
    return WORDS[hits[0][1]], tuple(word for word in words if word != hits[0][0])


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """``{folder: train | val | test}`` of those among neighbors that are splits.

    A name with words of its own (``seg_train``) counts only beside another split of these words
    (``seg_test``): alone, ``bullet train`` is a class.
    """
    known = {name: split_of(name) for name in names}
    plain = {n: s for n, (s, rest) in known.items() if s and rest in ((), ("ilsvrc",))}
    if plain:
        return plain
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name, (split, rest) in known.items():
        if split:
            groups.setdefault(rest, {})[name] = split
    found = [group for group in groups.values() if len(set(group.values())) > 1]
    return found[0] if len(found) == 1 else {}
