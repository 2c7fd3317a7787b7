"""Cutting a large scene into tiles: ``python bench/trials/scenes.py --side 30000``.

Writes a tiled TIFF of 8-bit RGB tile by tile (deflate; ``--empty`` leaves that share of its tiles
out of the file, as scanners do with glass), cuts it with ``shards make --tile``, and prints the
time and the peak of the memory of all processes together, shared pages counted once. Afterwards
some tiles of the shards are compared with what was drawn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import tifffile
from PIL import Image

STORED = 512  # side of the file's own tiles
PATTERN = np.random.default_rng(0).integers(0, 12, (STORED, STORED, 3), dtype=np.uint8)


def drawn(row: int, column: int) -> np.ndarray:
    """The file's tile [STORED, STORED, 3] at a place of its own grid."""
    base = np.array((40 + 7 * row % 150, 60 + 5 * column % 150, 80 + (row + column) % 100))
    return (PATTERN + base).astype(np.uint8)


def write(path: Path, side: int, empty: float) -> None:
    count, chosen = -(-side // STORED), np.random.default_rng(1)

    def tiles() -> Iterator[np.ndarray | None]:
        for row in range(count):
            for column in range(count):
                is_empty = chosen.random() < empty and (row, column) != (0, 0)
                yield None if is_empty else drawn(row, column)

    tifffile.imwrite(
        path, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(STORED, STORED),
        photometric="rgb", compression="zlib", compressionargs={"level": 1}, bigtiff=True,
    )  # fmt: skip


def run_watched(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB of the process and all its children)."""
    begin, peak = time.perf_counter(), 0.0
    process = psutil.Popen(command, stderr=sys.stderr)
    while process.poll() is None:
        with suppress(psutil.Error):
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_full_info().pss for each in family))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return time.perf_counter() - begin, peak / 2**20


def check(shards: Path, side: int) -> int:
    """Compare every hundredth tile with what was drawn; returns how many were equal."""
    equal = 0
    for shard in sorted(shards.rglob("*.tar")):
        with tarfile.open(shard) as file:
            members = {member.name: member for member in file.getmembers()}
            for name in sorted(name for name in members if name.endswith(".json"))[::100]:
                place = json.loads(file.extractfile(members[name]).read())  # type: ignore[union-attr]
                png = file.extractfile(members[name.replace(".json", ".png")])
                values = np.asarray(Image.open(io.BytesIO(png.read())))  # type: ignore[union-attr]
                y, x = place["y"], place["x"]
                if y % STORED or x % STORED or not values.any():
                    continue  # at the edge, or not in the file
                assert np.array_equal(values, drawn(y // STORED, x // STORED)), place
                equal += 1
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description="Cutting a large scene into tiles")
    parser.add_argument("--side", type=int, default=30_000)
    parser.add_argument("--empty", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        source, shards = Path(scratch) / "scenes", Path(scratch) / "shards"
        source.mkdir()
        write(source / "scene.tif", args.side, args.empty)
        size = (source / "scene.tif").stat().st_size / 1e9
        words = ["--tile", str(STORED), "--splits", "none"]
        words += ["--min_foreground", "0.1"] if args.empty else []
        command = [sys.executable, "-m", "xcit_dino.cli", "shards", "make", str(source)]
        seconds, peak = run_watched([*command, str(shards), *words])
        print(
            f"{args.side} x {args.side} RGB ({3 * args.side**2 / 1e9:.1f} GB of pixels, "
            f"{size:.1f} GB file, {args.empty:.0%} of it left out): {seconds:.0f} s, peak "
            f"{peak:.0f} MiB over all processes; {check(shards, args.side)} tiles compared, equal"
        )


if __name__ == "__main__":
    main()
