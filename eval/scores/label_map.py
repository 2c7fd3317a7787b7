"""Classes of data as classes of a head that has others: ``evaluate --label_map``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xcit_dino.data.pack.labels import read_label_map
from xcit_dino.errors import InputError, suggest


@dataclass(frozen=True)
class LabelMap:
    """Which outputs of a head stand for each class of the data."""

    groups: list[list[int]]
    """Numbers of outputs, from 0, one list a class."""

    @property
    def checksum(self) -> str:
        """Part of the protocol."""
        return hashlib.sha256(json.dumps(self.groups).encode()).hexdigest()[:16]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, outputs) -> (B, classes), whose softmax is that over the outputs that stand
        for a class; of several outputs of a class the probabilities add up."""
        if all(len(group) == 1 for group in self.groups):
            return logits[:, [group[0] for group in self.groups]]
        return torch.stack([logits[:, group].logsumexp(1) for group in self.groups], 1)


def read_map(path: Path, classes: Sequence[str] | None, outputs: int) -> LabelMap:
    """The map in a file: text with the name of each output of the head in a line, in order, or JSON
    {"class of the data": number, or [numbers]}.

    Args:
        classes: names of the data's classes.
        outputs: of the head.

    Raises:
        InputError: it cannot be read, lacks a class of the data, or names an output that the head
            does not have.
    """
    if classes is None:
        raise InputError(
            "--label_map: the data have numbers for classes, no names; pack them with names, or "
            "leave it out"
        )
    numbers = _read(path)
    if missing := [name for name in classes if name not in numbers]:
        raise InputError(
            f"--label_map {path}: lacks {len(missing):,} classes of the data, among them "
            f"{missing[0]!r}{suggest(missing[0], numbers)}"
        )
    groups = [numbers[name] for name in classes]
    highest = max(map(max, groups))
    if highest >= outputs:
        raise InputError(
            f"--label_map {path}: names output {highest}, and the head has outputs 0 to "
            f"{outputs - 1}; correct it, or name the head that it belongs to"
        )
    taken = [number for group in groups for number in group]
    if len(set(taken)) < len(taken):
        twice = next(number for number in taken if taken.count(number) > 1)
        raise InputError(
            f"--label_map {path}: output {twice} stands for two classes; give each one class"
        )
    return LabelMap(groups)


def _read(path: Path) -> dict[str, list[int]]:
    if path.suffix != ".json":
        return {name: [number] for name, number in read_label_map(path).items()}
    try:
        content = json.loads(path.read_bytes())
        found = {name: [n] if isinstance(n, int) else list(n) for name, n in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        found = {}
    plain = (type(n) is int and n >= 0 for group in found.values() for n in group)
    if not found or not all(plain) or not all(found.values()):
        raise InputError(
            f'--label_map {path}: must be {{"class of the data": number of the head from 0 on, '
            "or [numbers], ...}"
        )
    return found
