"""Features of every patch on grids in files: ``patches/``, written by ``xcit-dino embed``.

``00000.npy`` ... float16 [patches, D], one file of each process: the grids of its images one after
another, row by row. ``grids.csv``: of each image its row in features.npy, file, first patch, rows
and columns. NumPy alone reads them::

    table = np.load("patches/00000.npy", mmap_mode="r")
    grid = table[first : first + rows * columns].reshape(rows, columns, -1)
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TABLE = "grids.csv"
LARGEST = float(np.finfo(np.float16).max)


class Place(NamedTuple):
    """Where an image's grid is."""

    row: int
    """Of features.npy."""
    file: str
    first: int
    """Its first patch in the file."""
    rows: int
    columns: int


class GridFile:
    """Appends grids to a new ``.npy`` file whose number of patches is known at the end."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self.patches = self.clipped = 0
        self.places: list[Place] = []
        self.file = path.open("xb")
        self._write_header()

    def write(self, rows: Iterable[int], grids: NDArray[np.float32]) -> None:
        """Append [B, h, w, D] of B rows; values beyond float16 are clipped, and counted."""
        self.clipped += int((np.abs(grids) > LARGEST).sum())
        height, width = grids.shape[1:3]
        for row in rows:
            self.places.append(Place(row, self.path.name, self.patches, height, width))
            self.patches += height * width
        self.file.write(grids.clip(-LARGEST, LARGEST).astype("<f2").tobytes())

    def close(self) -> None:
        """Complete the header and flush to disk."""
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write_header(self) -> None:
        """NumPy leaves room in it for the first side to grow."""
        self.file.seek(0)
        facts = {"descr": "<f2", "fortran_order": False, "shape": (self.patches, self.width)}
        np.lib.format.write_array_header_1_0(self.file, facts)  # pyright: ignore[reportArgumentType]


def write_table(folder: Path, places: Iterable[Place]) -> None:
    """Write ``grids.csv``."""
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Place._fields)
        writer.writerows(sorted(places))


class Grids:
    """The grids of a folder by their rows, memory-mapped: ``grids[row]`` is float16 [h, w, D]."""

    def __init__(self, folder: Path) -> None:
        with (folder / TABLE).open(newline="", encoding="utf-8") as file:
            lines = [Place(int(a), b, *map(int, c)) for a, b, *c in list(csv.reader(file))[1:]]
        self.places = {place.row: place for place in lines}
        names = {place.file for place in lines}
        self.tables = {name: np.load(folder / name, mmap_mode="r") for name in names}
        self.width: int = next((table.shape[1] for table in self.tables.values()), 0)
        """D."""

    def __getitem__(self, row: int) -> NDArray[np.float16]:
        place = self.places[row]
        last = place.first + place.rows * place.columns
        table = self.tables[place.file]
        return table[place.first : last].reshape(place.rows, place.columns, -1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, row: object) -> bool:
        return row in self.places
