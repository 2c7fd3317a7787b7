"""The report's pictures: crops, attention, neighbours, confusions, a map of the features.

Each part may fail for its own reason (shards moved away, no checkpoint, no features); the reader is
told which, and sees the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import torch

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval import gallery, pictures
from xcit_dino.eval.charts import matrix, point_map
from xcit_dino.eval.config import SubjectConfig
from xcit_dino.eval.page import card, grid, table, tile, tiles
from xcit_dino.eval.report_origin import known_options
from xcit_dino.eval.runs import Run
from xcit_dino.eval.subject import geometry
from xcit_dino.models.weights import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.config import replace
from xcit_dino.train.state import Checkpoints

CROP_SAMPLES = 3  # images whose crops are shown
ATTENTION_PHOTOS = 4
RIGHT, WRONG, SHOWN_NEIGHBOURS = 6, 6, 8
MATRIX_CLASSES = 40  # more are told in a table of the most frequent mistakes
MAPPED_CLASSES, MAPPED_POINTS = 12, 1000
PAIRS = 14


def pictures_of(run: Run, parts: Sequence[Part]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Sections (title, content, how to read it), and what could not be shown and why."""
    images = Images(run)
    shown, reasons = [], dict[str, list[str]]()
    for title, about, make in parts:
        try:
            shown.append((title, make(images), about))
        except Exception as reason:  # a report is written whatever is wrong with a run's files
            reasons.setdefault(str(reason), []).append(title.lower())
    return shown, [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]


class Images:
    """The images, network and features of a run, read when they are first needed."""

    def __init__(self, run: Run):
        self.run = run
        self.options = known_options(run)
        self.loader = LoaderConfig(num_workers=0, max_bad_fraction=1.0)

    def index(self, split: str) -> ShardIndex:
        """The shards of a split.

        Raises:
            InputError: they are not there (any more).
        """
        if not self.options.get("data_path"):
            raise InputError("the run does not say where its shards are")
        return ShardIndex.load(resolve_split(self.options["data_path"], split))

    @cached_property
    def train(self) -> ShardIndex:
        return self.index("train")

    @cached_property
    def val(self) -> ShardIndex:
        return self.index("val")

    @cached_property
    def found(self) -> gallery.Neighbours:
        return gallery.classify(self.run.folder, self.train, self.val)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(shorter side after resizing, side of the crop) of evaluations."""
        trained = self.options.get("global_crops_size") or self.options.get("input_size")
        return geometry(SubjectConfig(), trained)

    def photos(self, index: ShardIndex, samples: Sequence[int]) -> dict[int, Any]:
        """Sample number -> pixels."""
        return pictures.photos(index, samples, *self.size, self.loader)

    def name(self, label: int) -> str:
        """The name of a class."""
        classes = self.train.classes or self.val.classes
        return classes[label] if classes and label < len(classes) else f"class {label}"


def crops(images: Images) -> str:
    """The crops of a few training images, as the network got them in the last epoch."""
    if images.run.kind != "pretrain":
        raise InputError("only pretraining has several crops an image")
    config = replace(PretrainConfig(), images.options | {"cache_dir": None})
    samples = gallery.spread(images.train.num_samples, CROP_SAMPLES + 2)[1:-1]
    rows = pictures.crops_of(config, images.train, samples.tolist(), max(0, config.run.epochs - 1))
    G = config.crops.global_crops_number
    shown = []
    for row in rows:
        cells = []
        for number, crop in enumerate(row):
            kind = "global" if number < G else "local"
            small = " small" if number >= G and len(row) > 6 else size(row)
            caption = f"{kind} {number + 1 if number < G else number - G + 1}"
            cells.append(tile(pictures.data_uri(crop), caption, f"{smoothness(crop)}{small}"))
        shown.append(cells)
    return card(tiles(shown))


def attention(images: Images) -> str:
    """Class-attention maps of every head over validation (else training) photos."""
    weights = next((p for p in reversed(Checkpoints(images.run.folder).all())), None)
    if weights is None:
        raise InputError("no checkpoint in the run folder")
    model = create_model(images.options["arch"], num_classes=0)
    load_backbone(weights, model)
    index = images.train
    try:
        index = images.val
    except InputError:
        pass
    samples = gallery.spread(index.num_samples, ATTENTION_PHOTOS + 2)[1:-1].tolist()
    photos = list(images.photos(index, samples).values())
    if not photos:
        raise InputError("none of the photos could be read")
    rows = pictures.attention_of(model.eval(), photos, torch.device("cpu"))
    shown = []
    for row in rows:
        heads = len(row) - 2
        names = ["photo", *(f"head {h + 1}" for h in range(heads)), "mean"]
        kind = f"smooth{size(row)}"
        shown.append(
            [tile(pictures.data_uri(p), name, kind) for p, name in zip(row, names, strict=True)]
        )
    return card(tiles(shown))


def neighbours(images: Images) -> str:
    """Validation images with their nearest training images."""
    found = images.found
    rows = gallery.examples(found, RIGHT, WRONG)
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


def picture(pixels: Any, caption: str, kind: str) -> str:
    """A tile of a photo."""
    return tile(pictures.data_uri(pixels), caption, f"{kind} {smoothness(pixels)}")


def size(row: Sequence[Any]) -> str:
    """A row of few tiles has larger ones."""
    return " large" if len(row) <= 7 else ""


def smoothness(pixels: Any) -> str:
    """Small pictures are enlarged pixel by pixel, photos smoothly."""
    return "" if len(pixels) <= pictures.SMALL else "smooth"


def confusions(images: Images) -> str:
    """Which classes are taken for which."""
    found = images.found
    classes = (
        len(images.train.classes or []) or int(max(found.labels.max(), found.predicted.max())) + 1
    )
    rows = [
        [images.name(a), images.name(b), f"{count:,}"]
        for a, b, count in gallery.most_confused(found, PAIRS)
    ]
    pairs = card(f'<div class="texts">{table(["class", "taken for", "images"], rows)}</div>')
    if classes > MATRIX_CLASSES:
        return pairs + card(class_table(images, found))
    shares = gallery.confusion(found, classes)
    names = [images.name(label) for label in range(classes)]
    title = "True class (rows), class found (columns), % of the row"
    return grid([card(matrix(title, shares.tolist(), names)), pairs], "halves")


def class_table(images: Images, found: gallery.Neighbours) -> str:
    """Accuracy of every class that was seen, the worst first."""
    rows = []
    for label in np.unique(found.labels):
        of_class = found.labels == label
        share = 100 * found.right[of_class].mean()
        rows.append([images.name(int(label)), f"{share:.1f}", f"{of_class.sum():,}"])
    rows.sort(key=lambda row: float(row[1]))
    most = 100
    rows = rows if len(rows) <= 2 * most else rows[:most] + rows[-most:]
    return table(["class", "k-NN top-1, %", "images"], rows)


def embedding(images: Images) -> str:
    """Validation features on their first two principal components."""
    found = images.found
    plane, shares = gallery.principal_plane(found.features)
    rows = gallery.spread(len(plane), MAPPED_POINTS)
    named = gallery.common_classes(found.labels, MAPPED_CLASSES)
    names = [images.name(label) for label in named]
    groups = [named.index(label) if label in named else -1 for label in found.labels[rows].tolist()]
    axes = tuple(f"{axis} principal component, {100 * share:.0f} % of the variance"
                 for axis, share in zip(("first", "second"), shares, strict=True))  # fmt: skip
    points = [(float(x), float(y)) for x, y in plane[rows]]
    title = f"{len(rows):,} validation images"
    figure = point_map(title, points, groups, names, (axes[0], axes[1]))
    return card(f'<div class="scroll wide">{figure}</div>')


Part = tuple[str, str, Callable[[Images], str]]
PARTS: tuple[Part, ...] = (
    (
        "What the network sees",
        "Crops of training images after augmentation, as in the last epoch. The teacher sees the "
        "global ones, the student all.",
        crops,
    ),
    (
        "Where it looks",
        "Attention of the class token to the patches, one map a head of the last layer.",
        attention,
    ),
    (
        "Nearest neighbours",
        "Validation images and the training images most like them, with the cosine. A solid frame "
        "marks the same class, a dashed one another.",
        neighbours,
    ),
    ("Confusions", "Which classes k-NN (k = 20) takes for which.", confusions),
    (
        "Map of the features",
        "A plane cannot show all: classes that overlap here may lie apart in the other dimensions.",
        embedding,
    ),
)
IN_COMPARISON = tuple(part for part in PARTS if part[2] in (attention, embedding))
