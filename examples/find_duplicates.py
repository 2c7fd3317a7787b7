"""Find near-duplicates among photos: python examples/find_duplicates.py FOLDER --weights runs/mine

Prints pairs of files whose features are nearly the same, the most similar first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import xcit_dino

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


def pairs(features: np.ndarray, least: float) -> list[tuple[float, int, int]]:
    """(cosine, row, row) of the pairs above ``least``, by each row's 10 nearest."""
    rows = np.arange(len(features))
    search = xcit_dino.KNN(k=min(11, len(features))).fit(features, rows)
    cosines, neighbors = search.kneighbors(features)
    found = {
        (min(a, b), max(a, b)): float(cosine)
        for a in rows.tolist()
        for cosine, b in zip(cosines[a].tolist(), neighbors[a].tolist(), strict=True)
        if a != b and cosine >= least
    }
    return sorted(((cosine, a, b) for (a, b), cosine in found.items()), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", required=True, help="run folder, file, or timm/NAME")
    parser.add_argument("--least", type=float, default=0.97, help="cosine of a pair, at most 1")
    args = parser.parse_args()
    files = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise xcit_dino.InputError(
            f"{args.folder}: {len(files)} images in it; give a folder of two or more"
        )
    model, transform = xcit_dino.load(args.weights)
    features = xcit_dino.embed(files, model, transform)
    for cosine, a, b in pairs(features, args.least):
        print(f"{cosine:.3f}  {files[a]}  {files[b]}")


if __name__ == "__main__":
    try:
        main()
    except xcit_dino.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
