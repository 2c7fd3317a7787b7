"""The report's pictures: crops, attention, neighbors, confusions, a map of the features.

Each may be missing for its own reason (shards moved away, no checkpoint, no features): the page
lists the reason and shows the others.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.dense.colors import boxed, class_colors, painted
from xcit_dino.eval.dense.components import fit_colors
from xcit_dino.eval.pictures import render
from xcit_dino.eval.pictures.false_color import picture
from xcit_dino.eval.pictures.patches import GridFeatures
from xcit_dino.models.dense import OUTPUT
from xcit_dino.options import replace
from xcit_dino.report.epochs import through_epochs
from xcit_dino.report.images import Images, tile, wide_tile
from xcit_dino.report.learned import did_it_learn
from xcit_dino.report.neighbors import confusions, feature_map, nearest
from xcit_dino.report.page import Section
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.supervised.detect.predict import predicted_boxes
from xcit_dino.supervised.segment.predict import predicted_masks
from xcit_dino.train.run.reader import Run

VIDEOS = 6  # whose masks are shown
MASK_PHOTOS = 6  # whose masks are shown
BOX_PHOTOS = 6  # whose boxes are shown
CROP_SAMPLES = 3  # images whose crops are shown
ATTENTION_PHOTOS = 4
PATCH_PHOTOS = 6  # in the colors of their patches
SCENES = 6


def sections_of(
    run: Run, parts: Sequence[Section], show_channels: tuple[int, ...] = ()
) -> tuple[list[Section], list[str]]:
    """Sections with their data, and which are missing and why.

    Args:
        run: the run.
        parts: sections with a function of :class:`Images` as data.
        show_channels: of the images, as red, green and blue.
    """
    images = Images(run, show_channels)
    shown, reasons = [], dict[str, list[str]]()
    dense = run.kind in ("segment", "detect")
    for part in parts:
        if dense and part.data not in (segmentation, detection):
            continue  # they have neither crops nor one class an image
        try:
            shown.append(dataclasses.replace(part, data=part.data(images)))
        except Exception as reason:  # damaged files never prevent a report
            reasons.setdefault(str(reason), []).append(part.title.lower())
    missing = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    if count := len(images.unreadable):
        missing.append(f"{count} of the photos: not readable; see xcit-dino shards check")
    return shown, missing


def crops(images: Images) -> dict[str, Any]:
    """The crops of a few training images, as in the last epoch."""
    if images.run.kind != "pretrain":
        raise InputError("only pretraining has several crops per image")
    config = replace(PretrainConfig(), images.options | {"cache_dir": None})
    samples = neighbors.evenly_spaced(images.train.num_samples, CROP_SAMPLES + 2)[1:-1]
    made = render.TrainingCrops(config.stages, config.augment, config.loader, config.run.seed)
    rows = render.training_crops(
        made, images.train, samples.tolist(), max(0, config.run.epochs - 1), images.context
    )
    captions = [f"global {n + 1}" for n in range(config.crops.global_crops_number)]
    captions += [f"local {n + 1}" for n in range(len(rows[0]) - len(captions) if rows else 0)]
    return one_card(rows, captions)


def attention(images: Images) -> dict[str, Any]:
    """Class-attention maps of every head over validation (else training) photos."""
    rows = render.attention_rows(images.network, some_views(images), images.context)
    return one_card(rows, ["photo", *(f"head {h + 1}" for h in range(len(rows[0]) - 2)), "mean"])


def patches(images: Images) -> dict[str, Any]:
    """The patch features of validation (else training) photos as colors."""
    features = GridFeatures(images.network, OUTPUT, 0, images.context)
    views = [features.resized(view) for view in some_views(images, PATCH_PHOTOS)]
    rows = []
    for view, grid in zip(views, features.of(views), strict=True):
        colors = fit_colors([grid])
        if colors is None:
            raise InputError("the photos have a single patch")
        photo = render.resize_square(picture(view, images.context), render.SIDE)
        rows.append([photo, *colors(grid)])
    return one_card(rows, ["photo", "patches", "foreground"])


def scenes(images: Images) -> dict[str, Any]:
    """Scenes in the colors of their patches, of the newest ``embed --patches true`` in the run."""
    folders = images.run.folder.glob("embeddings/*/maps")
    found = [path for folder in sorted(folders) for path in sorted(folder.glob("*-patches.png"))]
    groups = {}
    for path in found[:SCENES]:
        name = path.name.removesuffix("-patches.png")
        shown = {"patches": path, "foreground": path.with_name(f"{name}-foreground.png")}
        row = [wide_tile(np.asarray(Image.open(p)), what) for what, p in shown.items()]
        groups[f"{name} ({path.parent.parent.name})"] = [row]
    return {"summary": "", "groups": groups} if groups else {}


def some_views(images: Images, count: int = ATTENTION_PHOTOS) -> list[NDArray[np.generic]]:
    """Center crops [H, W, C] of evenly spaced validation (else training) photos.

    Raises:
        InputError: none of them can be read.
    """
    index = images.train
    try:
        index = images.val
    except InputError:
        pass
    samples = neighbors.evenly_spaced(index.num_samples, count + 2)[1:-1].tolist()
    photos = list(images.views(index, samples).values())
    if not photos:
        raise InputError("none of the photos could be read")
    return photos


def propagated(images: Images) -> dict[str, Any]:
    """Frames of a few videos with the masks that were propagated to them."""
    run = images.run
    entry = run.entry("propagate")
    if entry is None:
        return {}
    folder = run.folder / entry["masks"] / "overlays"
    scores = entry["j_and_f_by_video"]
    names = [name for name in scores if (folder / name).is_dir()]
    if not names:
        raise InputError(f"{folder}: no overlays in it")
    groups = {}
    for number in neighbors.evenly_spaced(len(names), min(VIDEOS, len(names))).tolist():
        name = names[number]
        frames = sorted((folder / name).iterdir())
        row = [wide_tile(np.asarray(Image.open(path)), path.stem) for path in frames]
        groups[f"{name}: J&F {scores[name]:.1f} %"] = [row]
    return {"summary": "", "groups": groups}


def retrieved(images: Images) -> dict[str, Any]:
    """Some queries, each followed by the most similar images of the bank."""
    entry = images.run.entry("retrieve")
    if entry is None:
        return {}
    folder, cell = images.run.folder / entry["neighbors"], render.SIDE + render.GAP
    if not (folder / "neighbors.png").is_file():
        return {}  # of --examples 0
    with (folder / "neighbors.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    queries = list(dict.fromkeys(line["query"] for line in lines))
    pixels = np.asarray(Image.open(folder / "neighbors.png").convert("RGB"))
    rows = []
    for row, number in enumerate(neighbors.evenly_spaced(len(queries), len(pixels) // cell)):
        found = [line for line in lines if line["query"] == queries[number]]
        captions = [queries[number], *(line["cosine"] for line in found)]
        parts = (pixels[row * cell :, column * cell :][: render.SIDE, : render.SIDE]
                 for column in range(pixels.shape[1] // cell))  # fmt: skip
        rows.append([tile(*pair) for pair in zip(parts, captions, strict=False)])
    return {"summary": "", "groups": {"": rows}}


def segmentation(images: Images) -> dict[str, Any]:
    """Validation photos, their masks and the predicted ones."""
    run = images.run
    if run.kind != "segment":
        return {}
    shown, names = predicted_masks(run.folder, images.options, MASK_PHOTOS)
    colors = class_colors(len(names))
    photos = [(picture(image, images.context), *masks) for image, *masks in shown]
    rows = []
    for photo, mask, guess in photos:
        row = {"photo": photo, "mask": painted(photo, mask, colors)}
        row["predicted"] = painted(photo, guess, colors)
        rows.append([wide_tile(pixels, caption) for caption, pixels in row.items()])
    return {"summary": "", "key": legend(names, colors), "groups": {"": rows}}


def detection(images: Images) -> dict[str, Any]:
    """Validation photos with their boxes and with the predicted ones."""
    run = images.run
    if run.kind != "detect":
        return {}
    shown, names = predicted_boxes(run.folder, images.options, BOX_PHOTOS)
    colors = np.minimum(2 * class_colors(len(names) + 1)[1:].astype(int), 255).astype(np.uint8)
    rows = []
    for image, *both in shown:
        photo = picture(image, images.context)
        pictures = [
            boxed(photo if m is None else painted(photo, m, colors), boxes, labels, colors)
            for boxes, labels, m in both
        ]
        captions = f"{len(both[0].boxes)} objects", f"{len(both[1].boxes)} predicted"
        rows.append([wide_tile(*each) for each in zip(pictures, captions, strict=True)])
    return {"summary": "", "key": legend(names, colors), "groups": {"": rows}}


def legend(names: Sequence[str], colors: render.Pixels) -> list[tuple[str, str]]:
    """The first 30 classes and their colors."""
    pairs = list(zip(names, colors.tolist(), strict=True))[:30]
    return [(name, f"#{r:02x}{g:02x}{b:02x}") for name, (r, g, b) in pairs]


def one_card(rows: Sequence[Sequence[render.Pixels]], captions: Sequence[str]) -> dict[str, Any]:
    """Data of templates/tiles: rows of images under the same captions, large where they are few."""
    count = len(captions)
    large = "large" if count <= 7 else ""
    sizes = ["small" if name.startswith("local") and count > 6 else large for name in captions]
    shown = [[tile(*image) for image in zip(row, captions, sizes, strict=True)] for row in rows]
    return {"summary": "", "groups": {"": shown}}


PARTS = (
    Section("Did it learn?", "verdict", did_it_learn),
    Section(
        "Predicted masks",
        "tiles",
        segmentation,
        "Validation images, the classes of their pixels and the predicted ones; pixels that do not "
        "count are not colored.",
    ),
    Section(
        "Predicted boxes",
        "tiles",
        detection,
        "Validation images with their objects, and with the predicted ones of a score of 0.5 and "
        "more.",
    ),
    Section(
        "What the network sees",
        "tiles",
        crops,
        "Crops of training images after augmentation, as in the last epoch. The teacher sees the "
        "global ones, the student all.",
    ),
    Section(
        "Attention maps",
        "tiles",
        attention,
        "Attention of the class token to the patches, one map per head of the last layer.",
    ),
    Section(
        "Through the training",
        "epochs",
        through_epochs,
        "The same images by the checkpoints that were kept (--saveckp_freq): attention, training "
        "images with the most similar of a few hundred others (cosine similarity of their features "
        "once the mean feature is subtracted), and crops as in that epoch.",
    ),
    Section(
        "Patch features",
        "tiles",
        patches,
        "The first three principal components of the patch features as red, green and blue: "
        "similar colors within a photo, similar features. Foreground: the patches on one side of "
        "the first component, in colors of their own.",
    ),
    Section(
        "Scenes",
        "tiles",
        scenes,
        "Tiles back in their places, in the colors of their patches, the same in all scenes.",
    ),
    Section(
        "Objects followed through videos",
        "tiles",
        propagated,
        "Masks propagated from the first frame by the similarity of patches, in color. White lines "
        "are contours of the true masks.",
    ),
    Section(
        "Retrieved images",
        "tiles",
        retrieved,
        "Queries, and the most similar images of the bank with their cosine similarity. Green "
        "frame: relevant; orange frame: not; none where nothing is known of the query.",
    ),
    Section(
        "Nearest neighbors",
        "tiles",
        nearest,
        "Validation images and the most similar training images, with the cosine similarity of "
        "their features once the mean feature is subtracted. Solid frame: same class; dashed "
        "frame: another class.",
    ),
    Section("Confusions", "confusions", confusions, "Which classes k-NN (k = 20) confuses."),
    Section(
        "Map of the features",
        "map",
        feature_map,
        "Classes that overlap in this plane may be apart in the other dimensions.",
    ),
)
IN_COMPARISON = tuple(part for part in PARTS if part.data in (attention, patches, feature_map))
