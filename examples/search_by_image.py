"""Search photos by an image: python examples/search_by_image.py FOLDER QUERY --weights runs/mine

Prints the files most similar to QUERY, with the cosine of their features.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import xcit_dino

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("query", type=Path)
    parser.add_argument("--weights", required=True, help="run folder, file, or timm/NAME")
    parser.add_argument("--most", type=int, default=10)
    args = parser.parse_args()
    files = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if args.most < 1:
        raise xcit_dino.InputError(f"--most {args.most}: must be at least 1")
    if not files:
        raise xcit_dino.InputError(f"{args.folder}: no images in it, or no such folder")
    model, transform = xcit_dino.load(args.weights)
    bank = xcit_dino.KNN(k=args.most).fit(
        xcit_dino.embed(files, model, transform), np.arange(len(files))
    )
    cosines, rows = bank.kneighbors(xcit_dino.embed(args.query, model, transform))
    for cosine, row in zip(cosines[0], rows[0], strict=True):
        print(f"{cosine:.3f}  {files[row]}")


if __name__ == "__main__":
    try:
        main()
    except xcit_dino.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
