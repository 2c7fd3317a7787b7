"""The report on single images: nearest neighbors, confusions, a map of the features."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from xcit_dino.eval import neighbors
from xcit_dino.report.figures import matrix, point_map
from xcit_dino.report.images import Images, tile
from xcit_dino.report.page import Table, Tile

RIGHT, WRONG, SHOWN_NEIGHBORS = 6, 6, 8
MATRIX_CLASSES = 40  # more are shown as a table of the most frequent confusions
MAPPED_CLASSES, MAPPED_POINTS = 12, 1000
PAIRS = 14
CLASSES_AT_AN_END = 100


def nearest(images: Images) -> dict[str, Any]:
    """Validation images with their nearest training images; {} without labels, where *Did it
    learn?* shows neighbors."""
    if not images.labeled:
        return {}
    found = images.found
    rows = neighbors.examples(found, RIGHT, WRONG)
    numbers = found.neighbors[rows, :SHOWN_NEIGHBORS]
    queries = images.photos(images.val, found.queries[rows].tolist())
    bank = images.photos(images.train, numbers.ravel().tolist())
    groups: dict[str, list[list[Tile]]] = {"Class found": [], "Class missed": []}
    for row in rows:
        query, label = int(found.queries[row]), int(found.labels[row])
        if query not in queries:
            continue
        right = bool(found.right[row])
        caption = images.name(label)
        if not right:
            caption += f", classified as {images.name(int(found.predicted[row]))}"
        tiles = [tile(queries[query], caption, "query")]
        for column, number in enumerate(found.neighbors[row, :SHOWN_NEIGHBORS].tolist()):
            other = int(found.neighbor_labels[row, column])
            if number in bank:
                caption = f"{images.name(other)} {found.centered[row, column]:.2f}"
                style = "right" if other == label else "wrong"
                tiles.append(tile(bank[number], caption, style))
        groups["Class found" if right else "Class missed"].append(tiles)
    accuracy = f"{100 * found.right.mean():.1f} % of {len(found.right):,} validation images"
    shown = {title: rows for title, rows in groups.items() if rows}
    return {"summary": f"k-NN finds the class of {accuracy}.", "groups": shown}


def confusions(images: Images) -> dict[str, Any]:
    """Which classes are confused with which; {} without labels."""
    if not images.labeled:
        return {}
    found = images.found
    classes = (
        len(images.train.classes or []) or int(max(found.labels.max(), found.predicted.max())) + 1
    )
    rows = [
        [images.name(a), images.name(b), f"{count:,}"]
        for a, b, count in neighbors.most_confused(found, PAIRS)
    ]
    pairs = Table(["class", "classified as", "images"], rows, prose=True)
    if classes > MATRIX_CLASSES:
        title, table = class_table(images, found)
        return {"pairs": pairs, "matrix": "", "classes_title": title, "classes": table}
    shares = neighbors.confusion(found, classes)
    names = [images.name(label) for label in range(classes)]
    title = "True class (rows), predicted class (columns), % of the row"
    return {"pairs": pairs, "matrix": matrix(title, shares.tolist(), names)}


def class_table(images: Images, found: neighbors.Neighbors) -> tuple[str, Table]:
    """Accuracy of every class with images, the worst first; of very many classes the two ends."""
    rows = []
    for label in np.unique(found.labels):
        of_class = found.labels == label
        accuracy = 100 * found.right[of_class].mean()
        rows.append([images.name(int(label)), f"{accuracy:.1f}", f"{of_class.sum():,}"])
    rows.sort(key=lambda row: float(row[1]))
    title = f"All {len(rows):,} classes"
    if len(rows) > 2 * CLASSES_AT_AN_END:
        rows = rows[:CLASSES_AT_AN_END] + rows[-CLASSES_AT_AN_END:]
        title = f"{title}: the {CLASSES_AT_AN_END} worst and the {CLASSES_AT_AN_END} best"
    return title, Table(["class", "k-NN top-1, %", "images"], rows)


def feature_map(images: Images) -> Markup:
    """Validation features on their first two principal components; empty without labels."""
    if not images.labeled:
        return Markup()
    found = images.found
    plane, shares = neighbors.principal_plane(found.features)
    rows = neighbors.evenly_spaced(len(plane), MAPPED_POINTS)
    mapped = neighbors.common_classes(found.labels, MAPPED_CLASSES)
    names = [images.name(label) for label in mapped]
    groups = [mapped.index(n) if n in mapped else -1 for n in found.labels[rows].tolist()]
    axes = tuple(f"{axis} principal component, {100 * share:.0f} % of the variance"
                 for axis, share in zip(("first", "second"), shares, strict=True))  # fmt: skip
    points = [(float(x), float(y)) for x, y in plane[rows]]
    return point_map(f"{len(rows):,} validation images", points, groups, names, (axes[0], axes[1]))
