"""The report on single images: nearest neighbours, confusions, a map of the features."""

from __future__ import annotations

from html import escape

import numpy as np

from xcit_dino.eval import neighbors
from xcit_dino.report.figures import matrix, point_map
from xcit_dino.report.images import Images, picture
from xcit_dino.report.page import card, fold, grid, table, tiles

RIGHT, WRONG, SHOWN_NEIGHBOURS = 6, 6, 8
MATRIX_CLASSES = 40  # more are told in a table of the most frequent mistakes
MAPPED_CLASSES, MAPPED_POINTS = 12, 1000
PAIRS = 14
CLASSES_AT_AN_END = 100


def neighbours(images: Images) -> str:
    """Validation images with their nearest training images; without labels see :func:`alike`."""
    if images.train.labels.max() < 0:
        return alike(images)
    found = images.found
    rows = neighbors.examples(found, RIGHT, WRONG)
    shown_neighbours = found.neighbours[rows, :SHOWN_NEIGHBOURS]
    queries = images.photos(images.val, found.queries[rows].tolist())
    bank = images.photos(images.train, shown_neighbours.ravel().tolist())
    groups: dict[bool, list[list[str]]] = {True: [], False: []}
    for row in rows:
        query, label = int(found.queries[row]), int(found.labels[row])
        if query not in queries:
            continue
        right = bool(found.right[row])
        words = images.name(label)
        if not right:
            words += f", taken for {images.name(int(found.predicted[row]))}"
        cells = [picture(queries[query], words, "query")]
        for column in range(shown_neighbours.shape[1]):
            neighbour = int(found.neighbours[row, column])
            same = int(found.neighbour_labels[row, column])
            if neighbour in bank:
                caption = f"{images.name(same)} {found.similarities[row, column]:.3f}"
                cells.append(
                    picture(bank[neighbour], caption, "right" if same == label else "wrong")
                )
        groups[right].append(cells)
    share = f"{100 * found.right.mean():.1f} % of {len(found.right):,} validation images are right."
    parts = [f'<p class="about">{escape(share)}</p>']
    for right, title in ((True, "Class found"), (False, "Class missed")):
        if groups[right]:
            parts.append(card(f"<h3>{title}</h3>{tiles(groups[right])}"))
    return "".join(parts)


def alike(images: Images) -> str:
    """Training images with the others most like them."""
    features, samples, _ = neighbors.cached(images.run.folder, "train", images.train)
    features = features if len(samples) == len(features) else features[samples]
    rows = neighbors.spread(len(samples), RIGHT + WRONG)
    nearest, cosines = neighbors.nearest_others(features, rows, SHOWN_NEIGHBOURS)
    numbers = samples[np.column_stack((rows, nearest))]
    photos = images.photos(images.train, numbers.ravel().tolist())
    shown = []
    for (query, *others), values in zip(numbers.tolist(), cosines.tolist(), strict=True):
        if query in photos:
            known = [(n, cosine) for n, cosine in zip(others, values, strict=True) if n in photos]
            neighbours = [picture(photos[n], f"{cosine:.3f}") for n, cosine in known]
            shown.append([picture(photos[query], "", "query"), *neighbours])
    return card(tiles(shown))


def confusions(images: Images) -> str:
    """Which classes are taken for which."""
    found = images.found
    classes = (
        len(images.train.classes or []) or int(max(found.labels.max(), found.predicted.max())) + 1
    )
    rows = [
        [images.name(a), images.name(b), f"{count:,}"]
        for a, b, count in neighbors.most_confused(found, PAIRS)
    ]
    pairs = card(f'<div class="texts">{table(["class", "taken for", "images"], rows)}</div>')
    if classes > MATRIX_CLASSES:
        return pairs + card(class_table(images, found))
    shares = neighbors.confusion(found, classes)
    names = [images.name(label) for label in range(classes)]
    title = "True class (rows), class found (columns), % of the row"
    return grid([card(matrix(title, shares.tolist(), names)), pairs], "halves")


def class_table(images: Images, found: neighbors.Neighbours) -> str:
    """Accuracy of every class that was seen, the worst first; of very many the two ends. Folded."""
    rows = []
    for label in np.unique(found.labels):
        of_class = found.labels == label
        share = 100 * found.right[of_class].mean()
        rows.append([images.name(int(label)), f"{share:.1f}", f"{of_class.sum():,}"])
    rows.sort(key=lambda row: float(row[1]))
    title = f"All {len(rows):,} classes"
    if len(rows) > 2 * CLASSES_AT_AN_END:
        rows = rows[:CLASSES_AT_AN_END] + rows[-CLASSES_AT_AN_END:]
        title = f"{title}: the {CLASSES_AT_AN_END} worst and the {CLASSES_AT_AN_END} best"
    return fold(title, table(["class", "k-NN top-1, %", "images"], rows))


def embedding(images: Images) -> str:
    """Validation features on their first two principal components."""
    found = images.found
    plane, shares = neighbors.principal_plane(found.features)
    rows = neighbors.spread(len(plane), MAPPED_POINTS)
    named = neighbors.common_classes(found.labels, MAPPED_CLASSES)
    names = [images.name(label) for label in named]
    groups = [named.index(label) if label in named else -1 for label in found.labels[rows].tolist()]
    axes = tuple(f"{axis} principal component, {100 * share:.0f} % of the variance"
                 for axis, share in zip(("first", "second"), shares, strict=True))  # fmt: skip
    points = [(float(x), float(y)) for x, y in plane[rows]]
    title = f"{len(rows):,} validation images"
    figure = point_map(title, points, groups, names, (axes[0], axes[1]))
    return card(f'<div class="scroll wide">{figure}</div>')
