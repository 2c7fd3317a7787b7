"""The report's pictures: crops, attention, neighbours, confusions, a map of the features.

Each part may fail for its own reason (shards moved away, no checkpoint, no features); the reader is
told which, and sees the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.pictures import render
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.report.images import Images, picture
from xcit_dino.report.neighbors import confusions, embedding, neighbours
from xcit_dino.report.page import card, tiles
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.config import replace
from xcit_dino.train.run.reader import Run
from xcit_dino.train.state import newest_checkpoint

CROP_SAMPLES = 3  # images whose crops are shown
ATTENTION_PHOTOS = 4


def pictures_of(run: Run, parts: Sequence[Part]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Sections (title, content, how to read it), and what could not be shown and why."""
    images = Images(run)
    shown, reasons = [], dict[str, list[str]]()
    for title, about, make in parts:
        try:
            shown.append((title, make(images), about))
        except Exception as reason:  # a report is written whatever is wrong with a run's files
            reasons.setdefault(str(reason), []).append(title.lower())
    missing = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    if count := len(images.unreadable):
        missing.append(f"{count} of the photos: they cannot be read; see xcit-dino shards check")
    return shown, missing


def crops(images: Images) -> str:
    """The crops of a few training images, as the network got them in the last epoch."""
    if images.run.kind != "pretrain":
        raise InputError("only pretraining has several crops an image")
    config = replace(PretrainConfig(), images.options | {"cache_dir": None})
    samples = neighbors.spread(images.train.num_samples, CROP_SAMPLES + 2)[1:-1]
    made = render.TrainingCrops(config.crops, config.augment, config.loader, config.run.seed)
    rows = render.crops_of(made, images.train, samples.tolist(), max(0, config.run.epochs - 1))
    G = config.crops.global_crops_number
    shown = []
    for row in rows:
        cells = []
        for number, crop in enumerate(row):
            kind = "global" if number < G else "local"
            width = "small" if number >= G and len(row) > 6 else size(row)
            caption = f"{kind} {number + 1 if number < G else number - G + 1}"
            cells.append(picture(crop, caption, width))
        shown.append(cells)
    return card(tiles(shown))


def attention(images: Images) -> str:
    """Class-attention maps of every head over validation (else training) photos."""
    weights = newest_checkpoint(images.run.folder)
    if weights is None:
        raise InputError("no whole checkpoint in the run folder")
    model = create_model(images.options["arch"], num_classes=0)
    load_backbone(weights, model)
    index = images.train
    try:
        index = images.val
    except InputError:
        pass
    samples = neighbors.spread(index.num_samples, ATTENTION_PHOTOS + 2)[1:-1].tolist()
    photos = list(images.photos(index, samples).values())
    if not photos:
        raise InputError("none of the photos could be read")
    rows = render.attention_of(model.eval(), photos, images.context)
    shown = []
    for row in rows:
        heads = len(row) - 2
        names = ["photo", *(f"head {h + 1}" for h in range(heads)), "mean"]
        shown.append([picture(p, name, size(row)) for p, name in zip(row, names, strict=True)])
    return card(tiles(shown))


def size(row: Sequence[Any]) -> str:
    """A row of few tiles has larger ones."""
    return "large" if len(row) <= 7 else ""


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
        "Validation images (without labels: training images) and the training images most like "
        "them, with the cosine. A solid frame marks the same class, a dashed one another.",
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
