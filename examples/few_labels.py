"""Classify with 20 labels a class: python examples/few_labels.py FOLDER --weights runs/mine

FOLDER holds one folder of images a class. Of each class, 20 images are learned from, by k-NN and by
a linear probe on frozen features; the accuracy is measured on the others. Repeated with other 20.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import xcit_dino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", required=True, help="run folder, file, or timm/NAME")
    parser.add_argument("--labels", type=int, default=20, help="a class")
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    for name in ("labels", "draws"):
        if getattr(args, name) < 1:
            raise xcit_dino.InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    files = sorted(path for path in args.folder.glob("*/*") if path.is_file())
    labels = np.array([path.parent.name for path in files])
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.max() <= args.labels:
        raise xcit_dino.InputError(
            f"{args.folder}: {len(files)} images in {len(classes)} class folders; give two or more "
            f"classes, with more than --labels {args.labels} images in at least one"
        )
    model, transform = xcit_dino.load(args.weights)
    features = xcit_dino.embed(files, model, transform)
    accuracies = {"k-NN": [], "linear": []}
    for draw in range(args.draws):
        order = np.random.default_rng(draw).permutation(len(files))
        known = np.concatenate([order[labels[order] == c][: args.labels] for c in classes])
        others = np.setdiff1d(order, known)
        for name, classifier in (("k-NN", xcit_dino.KNN(k=5)), ("linear", xcit_dino.LinearProbe())):
            classifier.fit(features[known], labels[known])
            accuracies[name].append(100 * classifier.score(features[others], labels[others]))
    for name, found in accuracies.items():
        print(f"{name}: {np.mean(found):.1f} % +- {np.std(found):.1f} over {args.draws} draws")


if __name__ == "__main__":
    try:
        main()
    except xcit_dino.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
